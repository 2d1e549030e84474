"""Detection and rescue of diverging runs (GuardBench): ``python -m benchmarks.guard_bench``."""
