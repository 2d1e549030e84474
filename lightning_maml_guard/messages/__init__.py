"""Reasons as data (reasons.py), and what turns them into words: sentences.py, with the other files for its parts."""
