"""MAML: the problem of a step, the inner loop, the meta-gradient, and the module that trains with it."""
