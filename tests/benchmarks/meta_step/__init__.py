"""A meta-training step against its peers: ``python -m tests.benchmarks.meta_step``; see :mod:`.run`."""
