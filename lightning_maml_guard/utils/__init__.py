"""Helpers that every room may import."""
