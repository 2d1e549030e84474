"""The loss over a whole run, in a few hundred points however long the run is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

# When there are twice as many points, they are merged in pairs.
_POINTS = 200


class LossPoint(NamedTuple):
    """The losses of some consecutive steps: how many were finite, their mean, and the ends with what was not finite."""

    step: int
    mean: float
    low: float
    high: float
    finite: int

    def joined(self, later: LossPoint) -> LossPoint:
        """Join this point with the next one."""
        count = self.finite + later.finite
        if self.finite and later.finite:
            mean = self.mean * (self.finite / count) + later.mean * (later.finite / count)
        else:
            mean = self.mean if self.finite else later.mean  # of no finite loss it is nan
        return LossPoint(self.step, mean, min(self.low, later.low), max(self.high, later.high), count)


@dataclass
class LossCurve:
    """The losses of a run's steps, and at the checks those before and after adaptation.

    Attributes:
        points: The steps' losses, ``stride`` steps each.
        stride: Steps per point.
        adapted: Step, mean query loss before adaptation and after it, at the latest checks that looked.
        end: Steps taken so far, whether or not their losses are known.
    """

    points: list[LossPoint] = field(default_factory=list)
    stride: int = 1
    adapted: list[tuple[int, float, float]] = field(default_factory=list)
    end: int = 0

    def add(self, loss: float) -> None:
        """Add the loss of the latest step, ``end - 1``; what is not finite counts as ``inf``."""
        step, finite = self.end - 1, math.isfinite(loss)
        value = loss if finite else math.inf
        point = LossPoint(step, loss if finite else math.nan, value, value, int(finite))
        self._put(point)
        if len(self.points) == 2 * _POINTS:
            points, self.points, self.stride = self.points, [], 2 * self.stride
            for each in points:
                self._put(each)

    def _put(self, point: LossPoint) -> None:
        """Append a point, or join it to the latest one if that is less than a stride old."""
        if self.points and point.step - self.points[-1].step < self.stride:
            self.points[-1] = self.points[-1].joined(point)
        else:
            self.points.append(point)

    def note_adaptation(self, step: int, before: float, after: float) -> None:
        """Add the losses before and after adaptation."""
        self.adapted = [*self.adapted, (step, before, after)][-2 * _POINTS :]

    @property
    def final(self) -> float:
        """The mean loss of the latest two points; ``inf`` where the latest is not finite, ``nan`` without any."""
        if not self.points:
            return math.nan
        latest = self.points[-1]
        if not latest.finite or math.isinf(latest.high):
            return math.inf
        before = self.points[-2] if len(self.points) > 1 else latest
        return before.joined(latest).mean if math.isfinite(before.high) else latest.mean
