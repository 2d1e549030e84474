"""Everything that touches torch.optim."""
