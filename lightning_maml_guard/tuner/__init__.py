"""Learning rates before training."""
