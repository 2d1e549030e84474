"""LadderOptions: how rates are tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_maml_guard.utils.checks import check_count, check_flag, check_rates


@dataclass(frozen=True)
class LadderOptions:
    """How :func:`~lightning_maml_guard.suggest_rates` tries rates: each pair is trained on copies.

    Args:
        steps: Training steps at each pair of rates; 0 trains none, and then no outer rate is suggested.
        longest: Training steps at the pairs that are tried longest.
        alphas: Inner rates to try (None: the configured one, and some around the critical one).
        progress: Show a progress bar.

    Raises:
        ValueError: If a value is not allowed.

    Example:
        >>> from lightning_maml_guard import LadderOptions
        >>> LadderOptions(alphas=(0.1, 0.4)).steps
        40
    """

    steps: int = 40
    longest: int = 160
    alphas: tuple[float, ...] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 0)
        check_count("longest", self.longest, self.steps)
        check_flag("progress", self.progress)
        if self.alphas is not None:
            object.__setattr__(self, "alphas", tuple(check_rates("alphas", self.alphas)))


def check_ladder(value: Any) -> None:
    """Raise a TypeError if a value is no LadderOptions."""
    if not isinstance(value, LadderOptions):
        raise TypeError(
            f"Expected argument `ladder` to be a LadderOptions but got {type(value).__name__}. Pass "
            "LadderOptions(steps=20), say, with the options that differ from their defaults."
        )
