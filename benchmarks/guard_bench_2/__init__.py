"""Late deaths, lost learning and their rescue in runs of 300 and 1000 steps (GuardBench 2): ``python -m benchmarks.guard_bench_2``."""
