"""A configured learning rate beside its critical value, as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_maml_guard.theory.multiplier import Interval
from lightning_maml_guard.utils.checks import check_number

SAFE, EDGE, UNSAFE, UNRESOLVED = "safe", "edge", "unsafe", "unresolved"


@dataclass(frozen=True)
class Limit:
    """One configured rate beside its critical value.

    Attributes:
        value: The rate as configured; ``nan`` when it is not known.
        critical: Its critical value; ``nan`` when it could not be determined.
        interval: Where the critical value lies.
    """

    value: float
    critical: float
    interval: Interval

    @property
    def ratio(self) -> float:
        """``value / critical``: above 1 is unsafe; ``inf`` when no positive rate is stable."""
        if self.critical == 0:
            return math.inf if self.value > 0 else 0.0
        return self.value / self.critical

    def status(self, margin: float, *, strict: bool) -> str:
        """Compare with ``margin`` times the critical value.

        The threshold itself is unsafe if ``strict`` (``beta < beta_c``) and safe if not (``alpha <= alpha_c``). A rate
        inside the interval is unresolved.
        """
        if math.isnan(self.value) or math.isnan(self.critical):
            return UNRESOLVED
        low, high = (margin * end for end in self.interval)
        if self.value > high or (strict and self.value == high):
            return UNSAFE
        if self.value < low or (not strict and self.value == low) or low == math.inf:
            return SAFE
        return UNRESOLVED


def worst(*statuses: str) -> str:
    """Combine statuses: unsafe if any is, else unresolved if any is, else safe."""
    return next((status for status in (UNSAFE, UNRESOLVED) if status in statuses), SAFE)


def check_margin(margin: float) -> None:
    """Raise a ValueError if the margin is not a number above 0 and at most 1: beyond a limit, training diverges."""
    check_number("margin", margin, above=0, most=1)
