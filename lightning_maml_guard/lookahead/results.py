"""What lookaheads, trials of rates and a search among them found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

# Steps of a trial: rates that survive 10 steps may diverge within 30.
TRIAL_STEPS = 30


@dataclass(frozen=True)
class LookaheadResult:
    """What a lookahead saw.

    Attributes:
        losses: Loss before each step, on that step's batch; the last is the loss after all of them, on the batch of
            the first step.
    """

    losses: tuple[float, ...]

    @property
    def begin(self) -> float:
        """Loss of the first batch before the steps."""
        return self.losses[0]

    @property
    def end(self) -> float:
        """Loss of the first batch after the steps; ``inf`` if any loss on the way was not finite."""
        return self.losses[-1] if all(map(math.isfinite, self.losses)) else math.inf

    @property
    def late(self) -> float:
        """Mean loss of the later half; ``inf`` if any loss on the way was not finite."""
        return fmean(self.losses[len(self.losses) // 2 :]) if all(map(math.isfinite, self.losses)) else math.inf

    @property
    def growth(self) -> float:
        """Factor per step by which the loss grew."""
        steps = len(self.losses) - 1
        return (self.end / self.begin) ** (1 / steps) if self.begin > 0 and self.end >= 0 else math.nan


class Factors(NamedTuple):
    """Factors on the inner rates and on the outer rate."""

    alpha: float = 1.0
    beta: float = 1.0


@dataclass(frozen=True)
class Trial:
    """The next steps, tried at some rates.

    Attributes:
        factors: Factors on the rates.
        end: Mean loss over the last quarter of the steps; ``inf`` if the loss diverged.
        learned: By how much ``end`` is below the loss before training.
        outer_gain: By how much ``end`` is below the loss before the first step with the same inner rates.
        trains: Whether the loss never diverged and ended no higher than before training.
        steps: Number of steps.
    """

    factors: Factors
    end: float
    learned: float
    outer_gain: float
    trains: bool
    steps: int = TRIAL_STEPS


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        present: The trial of the rates as they are.
        best: The trial of lowered rates that learned most.
        lowest_beta: The lowest factor on the outer rate that learns nearly as much; 1 if that rate is not to blame.
        highest_beta: The highest factor on the outer rate to set for a whole run.
        highest_alpha: The highest factor on the inner rates that learns nearly as much; if the outer rate is lowered
            too, the highest that adapts nearly as well.
    """

    present: Trial
    best: Trial
    lowest_beta: float = 1.0
    highest_beta: float = 1.0
    highest_alpha: float = 1.0


def mean_of(losses: Sequence[float]) -> float:
    """Mean of losses; infinite if one is not finite."""
    return sum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf


def mean_at_end(losses: Sequence[float], steps: int) -> float:
    """Mean loss over the last quarter of the steps, each on its batch."""
    return mean_of([losses[step % len(losses)] for step in range(steps)[-max(steps // 4, 1) :]])


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial that learned most; of several, the first."""
    return max(trials, key=lambda each: each.learned)
