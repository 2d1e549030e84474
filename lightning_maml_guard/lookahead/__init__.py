"""The next steps tried on copies: whether the loss survives them, and at which rates it would."""
