"""Broken runs started again as the guard's first advice says (AdviceBench): ``python -m benchmarks.advice``."""
