"""Checks of arguments that every room makes in the same words."""

from __future__ import annotations

from typing import Any


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse a count that is not an integer of at least ``least``.

    Args:
        name: What the message calls it.
        value: The count.
        least: Smallest that is allowed.

    Raises:
        ValueError: If it is not allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected argument `{name}` to be an integer of at least {least} but got {value!r}.")
