"""A problem in, a StabilityReport out; no Lightning."""
