"""Models that no process holds as a whole: vectors, gradients and meta-gradients of parameters split by FSDP2."""
