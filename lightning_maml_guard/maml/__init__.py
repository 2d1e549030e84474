"""The algorithm: functional, batched over tasks."""
