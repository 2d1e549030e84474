"""Optional kernels for the CPU, each tested against torch's own layers."""
