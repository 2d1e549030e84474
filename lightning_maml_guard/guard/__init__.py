"""The guard: measure, decide, act, leave no trace."""
