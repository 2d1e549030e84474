"""A meta-training step against its peers: ``python -m benchmarks.meta_step``; see :mod:`.run`."""
