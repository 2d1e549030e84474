"""Families of tasks and the data module that samples episodes from them."""
