"""The category of all warnings of this package, so that users can filter them; failures that cost no more than one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class GuardWarning(UserWarning):
    """A warning of lightning_maml_guard."""


class ReportedFailure:
    """A context that passes an exception to a function and ends it there, unless it is a GuardWarning made an error.

    A class, because a generator's context takes three times as long and several are entered at every step.
    """

    def __init__(self, tell: Callable[[Exception], None]) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        """Enter it."""

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> bool:
        """Report an exception."""
        if not isinstance(error, Exception) or isinstance(error, GuardWarning):
            return False
        self._tell(error)
        return True
