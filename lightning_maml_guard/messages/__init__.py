"""Reasons as data (reasons.py), and the one place that turns them into words (sentences.py)."""
