"""A grid of trainings as one vmapped program."""
