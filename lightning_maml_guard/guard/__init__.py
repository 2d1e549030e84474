"""The guard: when to check, what a check does, the actions, the advice."""
