"""Spectra from matrix-vector products: an algorithm takes a matvec and nothing else about the matrix."""
