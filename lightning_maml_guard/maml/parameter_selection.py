"""Which parameters the inner loop moves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from lightning_maml_guard.utils.checks import shown


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
        TypeError: If they are not strings.
    """
    names = list(names)
    if patterns is None:
        return names
    wanted = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(wanted, Sequence) or not all(isinstance(pattern, str) for pattern in wanted):
        raise TypeError(
            f"Expected argument `adapt` to be a name or a list of names but got {shown(patterns)}. Pass parameter "
            "names, shell patterns or module prefixes, or None for all."
        )
    if not wanted:
        raise ValueError(
            "Argument `adapt` is empty: the inner loop would move nothing. Name a parameter, or pass None for all."
        )
    chosen: set[str] = set()
    for pattern in wanted:
        hits = {name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")}
        if not hits:
            raise ValueError(
                f"Argument `adapt` holds {pattern!r}, which matches no trainable parameter. There are: {names}. Pass "
                "one of these, a shell pattern or a prefix of them."
            )
        chosen |= hits
    return [name for name in names if name in chosen]
