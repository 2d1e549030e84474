"""Which parameters the inner loop moves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def select(names: Iterable[str], patterns: str | Sequence[str] | None) -> list[str]:
    """Select parameter names by pattern.

    Args:
        names: The names to choose from.
        patterns: Names (``"head.weight"``), shell patterns (``"*.bias"``) or module prefixes (``"head"``);
            None selects all.

    Returns:
        The selected names, in their order.

    Raises:
        ValueError: If a pattern selects nothing.
    """
    names = list(names)
    if patterns is None:
        return names
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    if not wanted:
        raise ValueError(
            "Argument `adapt` is empty: the inner loop would move nothing. Name a parameter, or pass None for all."
        )
    chosen: set[str] = set()
    for pattern in wanted:
        hits = {name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")}
        if not hits:
            raise ValueError(
                f"Argument `adapt` holds {pattern!r}, which matches no trainable parameter. There are: {names}."
            )
        chosen |= hits
    return [name for name in names if name in chosen]
