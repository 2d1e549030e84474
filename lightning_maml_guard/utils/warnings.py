"""The category of all warnings of this package, so that users can filter them."""


class GuardWarning(UserWarning):
    """A warning of lightning_maml_guard."""
