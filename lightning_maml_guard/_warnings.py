"""The category of every warning this package gives, so that users can filter it as one."""


class GuardWarning(UserWarning):
    """A warning of lightning_maml_guard."""


def first_line(error: BaseException) -> str:
    """Say what an error says, in one line.

    Args:
        error: The error.

    Returns:
        The first line of its text; its type's name where it has none.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
