"""The category of every warning this package gives, so that users can filter it as one."""


class GuardWarning(UserWarning):
    """A warning of lightning_maml_guard."""
