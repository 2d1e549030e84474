"""Many trainings that differ in their rates alone, as one vmapped program."""
