"""Time of a meta-training step against other packages: ``python -m benchmarks.meta_step``; see :mod:`.run`."""
