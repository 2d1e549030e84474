"""What several benchmarks share: hand-written modules, data, schedules, kept runs, detectors."""
