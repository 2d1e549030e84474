"""What happens to a run: rates that rise, restarts, bad batches, slow drift, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

BETA, ALPHA, BATCH, DRIFT, NOTHING = "beta", "alpha", "batch", "drift", "nothing"
# Strengths that a family gives a number for.
RATE, INNER, GAIN = "rate", "inner", "gain"


@dataclass(frozen=True)
class Scenario:
    """One thing that happens to a run.

    Attributes:
        cause: What is to blame if the run dies.
        course: Factor of the outer rate over the run, for a strength of 1 or the family's.
        strength: Which of the family's numbers a course, or a drift, goes up to.
        by_hand: Set the rate in a hook instead of a scheduler: no schedule can be read ahead.
        outliers: Shares of the run at which a batch is bad.
    """

    cause: str = NOTHING
    course: Callable[[float, float], float] | None = None
    strength: str = ""
    by_hand: bool = False
    outliers: tuple[float, ...] = ()


def _cosine(share: float, _: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _constant(_: float, high: float) -> float:
    return high


def _hot(_: float, high: float) -> float:
    """Well below what a schedule goes up to: such a run may learn for a while."""
    return high**0.6


def _ramp(share: float, high: float) -> float:
    """Constant for a fifth of the run, then a geometric rise."""
    return high ** max((share - 0.2) / 0.8, 0.0)


def _linear(share: float, high: float) -> float:
    """A linear rise over the whole run."""
    return 1 + (high - 1) * share


def _late(share: float, high: float) -> float:
    """Constant for two thirds of the run, then a geometric rise over a tenth of it."""
    return high ** min(max((share - 0.65) / 0.1, 0.0), 1.0)


def _restarts(share: float, high: float) -> float:
    """Three cosine cycles whose peaks rise."""
    cycle = min(int(3 * share), 2)
    return high ** (cycle / 2) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (3 * share - cycle))))


def _warmup(share: float, _: float) -> float:
    return min((share + 0.01) / 0.1, 1.0) * 0.5 * (1 + math.cos(math.pi * share))


SCENARIOS: dict[str, Scenario] = {
    "steady": Scenario(),
    "cosine": Scenario(course=_cosine),
    "warm-up": Scenario(course=_warmup),
    "hot": Scenario(BETA, _hot, RATE),
    "ramp": Scenario(BETA, _ramp, RATE),
    "linear ramp by hand": Scenario(BETA, _linear, RATE, by_hand=True),
    "late rise by hand": Scenario(BETA, _late, RATE, by_hand=True),
    "cosine restarts": Scenario(BETA, _restarts, RATE),
    "bad batch": Scenario(BATCH, outliers=(0.5,)),
    "bad batches": Scenario(BATCH, outliers=(0.3, 0.31, 0.7, 0.71)),
    "drift": Scenario(DRIFT, _ramp, GAIN),
    "inner rate too large": Scenario(ALPHA, _constant, INNER),
    "inner rate rises": Scenario(ALPHA, _ramp, INNER),
}
# References of a column: the base, under a cosine schedule, and at a third and at three times its rate.
FACTORS = {"slow": 1 / 3, "fast": 3.0}
REFERENCES = ("steady", "cosine", *FACTORS)
