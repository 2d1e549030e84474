"""Is the training diverging? Running statistics of its loss and gradient norm, and a lookahead's threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import median
from typing import NamedTuple

# The start is the median of this many first losses: one odd batch does not move it.
FIRST_LOSSES = 8
# A loss or a gradient norm this many times its running mean is a spike.
_LOSS_SPIKE, _NORM_SPIKE = 2.0, 4.0
# Weight of the past in a running mean.
_MEMORY = 0.9
# What a loss that may be negative is compared with, in units of its mean step-to-step change: about 4.5 standard
# deviations of independent noise. No single change counts for more than `_LARGEST_CHANGE` times that mean.
_SPREADS, _LARGEST_CHANGE = 4.0, 4.0
# A loss above this share of an earlier one has not fallen; one above that share of the loss without learning is stuck.
_PROGRESS, _STUCK = 0.85, 0.9
_JUDGED_FROM = 64  # before this step hardly any run's loss has fallen by so much
_ROUNDING = 1e-6  # differences from the mean below this share of a loss are rounding (float32)
SETTLED = 16  # steps after which the running mean counts for the lowest one
# A run can lose what it learned only if that was this share of the start, or if its mean is this many times the start.
_LEARNED, _FAR_ABOVE_START = 0.2, 1.5
# The running mean of a run that keeps what it learned varies by this share of a batch's noise (5 standard deviations).
_MEAN_NOISE = 0.375
# Share of that, or of half of what was learned, from which on a rise of the mean calls a check.
_CALLS_CHECK = 0.5
# Of the first losses, which are asked for several times a step.
_median = lru_cache(16)(median)


def severity(end: float, start: float, unit: float | None = None) -> float:
    """Measure how far a lookahead takes the loss: ``log(end / start)``, with the loss that training started from.

    With a unit (:class:`Scale`) it is ``log(1 + (end - start) / unit)``, the same number if the unit is the start.
    ``inf`` if the loss is not finite, ``nan`` without a unit if the start is not above 0.
    """
    if not math.isfinite(end):
        return math.inf
    if unit is not None:
        if math.isnan(start) or not unit > 0:
            return math.nan
        far = (end - start) / unit
        return math.log1p(far) if far > -1 else -math.inf
    if math.isnan(start) or start <= 0:
        return math.nan
    ratio = end / start  # which may underflow
    return math.log(ratio) if ratio > 0 else -math.inf


class Scale(NamedTuple):
    """How losses are compared: by their ratio while all of them are positive, by their distance as soon as one is not.

    A ratio says nothing of losses that may be negative (log-likelihoods, surrogates of reinforcement learning). Where a
    positive loss has ``start`` to fall, these have fallen from the start to the lowest loss seen, or are moved by noise
    alone: the unit is the larger of the two. A constant added to every loss then changes nothing.

    Attributes:
        start: Loss that training started from; ``nan`` before the first step.
        unit: What distances are measured in; None while every loss was positive.
        settled: Whether there were enough losses to tell; else a lookahead's own are taken in.
        best: The lowest running mean; ``nan`` before anything was learned.
        rise_unit: Unit of a rise above ``best``: twice that is half of what was learned or, if that is more, beyond the
            noise of a batch.
    """

    start: float = math.nan
    unit: float | None = None
    settled: bool = False
    best: float = math.nan
    rise_unit: float = math.nan

    def times(self, factor: float, loss: float) -> float:
        """``factor`` times a loss; with a unit, as much above it as that is above the start of positive losses."""
        return factor * loss if self.unit is None else loss + (factor - 1) * self.unit

    def severity(self, end: float, begin: float = math.nan) -> float:
        """Measure how far the loss is from the start; see :func:`severity`.

        Given the batch's loss before, its rise above the best mean counts too, as ``log(1 + rise / rise_unit)``: a run
        that has learned diverges before it is back at its start.
        """
        from_start = severity(end, self.start, self.unit)
        if math.isnan(begin) or math.isnan(self.best) or not math.isfinite(end):
            return from_start
        rise = severity(end, max(begin, self.best), self.rise_unit)
        return max(from_start, rise) if rise > 0 else from_start

    def diverged(self, loss: float, ratio: float) -> bool:
        """Return True if a loss is not finite, or above ``ratio`` times the one that training started from."""
        return not math.isfinite(loss) or loss > self.times(ratio, self.start)

    def completed_by(self, losses: Sequence[float]) -> Scale:
        """Estimate the start and the unit from a lookahead's losses if the run had too few of its own."""
        if self.settled:
            return self
        start = losses[0] if math.isnan(self.start) else self.start
        known = [loss for loss in losses if math.isfinite(loss)]
        if self.unit is None and all(loss > 0 for loss in known) and not start <= 0:
            return self._replace(start=start)
        # The median change: that of a lookahead that diverges is small beside its end.
        least = start if self.unit is None else self.unit
        return self._replace(start=start, unit=max(least, _SPREADS * _typical_change(known)))


@dataclass
class RunningStatistics:
    """The loss and the gradient norm of the steps so far.

    Attributes:
        first: The first losses.
        loss: Running mean of the loss.
        norm: Running mean of the gradient norm.
        last: The latest loss; None before the first.
        lowest: The lowest loss.
        spread: Running mean of the loss's change from step to step.
        looked: Loss at the first lookahead, which stands for the start while no step has told its loss.
        steps: Steps whose loss was finite.
        before: The running mean when half as many steps were taken, or when the number was last a power of two.
        stalled: Whether the loss did not fall between the last two powers of two.
        best: The lowest running mean.
        since: Steps that the running mean is of.
        chance: Loss of a classifier that guesses; ``nan`` where it is not known.
        recent: The latest losses, before the steps on their batches.
    """

    first: tuple[float, ...] = ()
    loss: float = math.nan
    norm: float = math.nan
    last: float | None = None
    lowest: float = math.inf
    spread: float = math.nan
    looked: float = math.nan
    steps: int = 0
    before: float = math.nan
    stalled: bool = False
    best: float = math.inf
    since: int = 0
    chance: float = math.nan
    recent: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self.lowest = min(self.lowest, *self.first, math.inf)  # a checkpoint of an older version holds none

    @property
    def start(self) -> float:
        """Loss that training started from; ``nan`` before the first lookahead or step."""
        return _median(self.first) if self.first else self.looked

    def note_lookahead(self, loss: float) -> None:
        """Take the loss at the first lookahead as the start of training, until steps have told their losses."""
        if math.isnan(self.looked) and math.isfinite(loss):
            self.looked = loss

    @property
    def scale(self) -> Scale:
        """How losses are compared."""
        return self._scale(self.start)

    def _scale(self, start: float) -> Scale:
        settled = len(self.first) == FIRST_LOSSES
        unit = None if self.lowest > 0 else max(start - self.lowest, self._noise)
        if not self._has_learned(start):
            return Scale(start, unit, settled)
        rise_unit = max((self.untrained_from(start) - self.best) / 4, self._noise / 2)
        return Scale(start, unit, settled, self.best, min(rise_unit, start if unit is None else unit))

    def untrained_from(self, start: float) -> float:
        """The loss without learning: that of the start, or of guessing where that is lower."""
        return start if math.isnan(self.chance) else min(start, self.chance)

    def _has_learned(self, start: float) -> bool:
        return self.untrained_from(start) - self.best > (_LEARNED * start if self.lowest > 0 else self._noise / 2)

    @property
    def has_lost_half(self) -> bool:
        """Whether half of what was learned is lost: the running mean is that far from its lowest value."""
        return self.is_above_best(self.loss, 1.0)

    @property
    def has_left_best(self) -> bool:
        """Whether the running mean is so far above its lowest value that a check is due."""
        return self.is_above_best(self.loss)

    def is_above_best(self, mean: float, share: float = _CALLS_CHECK) -> bool:
        """Whether a mean over some batches is above the lowest one by this share of half of what was learned."""
        untrained = self.untrained_from(self.start)
        least = max((untrained - self.best) / 2, _MEAN_NOISE * self._noise)
        if self.since < FIRST_LOSSES or not mean - self.best > share * least:
            return False
        return self._has_learned(self.start) or mean > self.scale.times(_FAR_ABOVE_START, untrained)

    @property
    def stuck(self) -> bool:
        """Whether the loss does not fall, and is still nearly that without learning."""
        untrained = self.untrained_from(self.start)
        return self.stalled and self.loss > self.scale.times(_STUCK, untrained)

    @property
    def near_best(self) -> bool:
        """Whether the last loss is no spike and the running mean is near its lowest value."""
        finite = self.last is not None and math.isfinite(self.last)
        return finite and not self.has_left_best and not (self.since > 1 and self._is_above_mean(self.last or 0.0))

    def rebase(self, mean: float) -> bool:
        """Raise the best mean, and the start, to the level of tasks that became harder; True if either changed."""
        changes = mean > min(self.best, self.start)
        if changes and self.best < math.inf:
            self.best = mean
        if mean > self.start:
            self.first, self.stalled = (mean,) * len(self.first), False
        return changes

    @property
    def _noise(self) -> float:
        return 0.0 if math.isnan(self.spread) else _SPREADS * self.spread

    def update(self, loss: float, norm: float = math.nan) -> bool:
        """Add a step; return True if its loss or its gradient norm spiked, or the loss is not finite."""
        finite = math.isfinite(loss)
        if finite:
            self._take_spread(loss)
            self.lowest = min(self.lowest, loss)
        counted = min(loss, max(self.recent, default=loss))  # one odd batch moves no mean, a loss that stays does
        self.last, self.recent = loss, (*self.recent, loss if finite else math.inf)[-FIRST_LOSSES:]
        if finite and len(self.first) < FIRST_LOSSES and self._is_near_first(loss):
            self.first = (*self.first, loss)
        spiked = not finite or self._is_above_mean(loss) or norm > _NORM_SPIKE * self.norm
        if finite:
            self.loss = loss if math.isnan(self.loss) else _updated(self.loss, counted)
            self.since += 1
            if self.since >= SETTLED:
                self.best = min(self.best, self.loss)
            self._take_progress()
        if math.isfinite(norm):
            self.norm = norm if math.isnan(self.norm) else _updated(self.norm, norm)
        return spiked

    def _is_near_first(self, loss: float) -> bool:
        """Whether a loss may count for the start, which a run that diverges within its first steps must not move."""
        return not self.first or loss <= self._scale(self.first[0]).times(_LOSS_SPIKE, self.first[0])

    def reset_means(self) -> None:
        """Drop the running means of a run that was rolled back: beside a lost loss nothing is a spike."""
        self.loss, self.norm, self.since, self.recent = math.nan, math.nan, 0, ()

    def _take_progress(self) -> None:
        self.steps += 1
        if self.steps & (self.steps - 1) == 0:
            scale = self.scale
            remains = self.loss > scale.times(_PROGRESS, self.before) and self.loss > scale.times(0.5, scale.start)
            self.stalled = remains and self.steps >= _JUDGED_FROM
            self.before = self.loss

    def _is_above_mean(self, loss: float) -> bool:
        """Whether a loss is twice the mean, or above it by more than noise and half of what was learned."""
        if self.lowest > 0:
            return loss > _LOSS_SPIKE * self.loss
        return loss - self.loss > max((self.start - self.lowest) / 2, self._noise, _ROUNDING * abs(loss))

    def _take_spread(self, loss: float) -> None:
        """Update the mean change; the median of the first ones counts, so that early divergence does not raise it."""
        if self.last is None or not math.isfinite(self.last):
            return
        change = abs(loss - self.last)
        if len(self.first) < FIRST_LOSSES:
            self.spread = _typical_change((*self.first, loss))
        elif not self.spread > 0:
            self.spread = change
        else:
            self.spread = _updated(self.spread, min(change, _LARGEST_CHANGE * self.spread))


def _updated(mean: float, value: float) -> float:
    return _MEMORY * mean + (1 - _MEMORY) * value


def _typical_change(losses: Sequence[float]) -> float:
    """Median change from one loss to the next; 0 of a single one."""
    return median([abs(after - before) for before, after in pairwise(losses)] or [0.0])


def fails(severe: float, ratio: float) -> bool:
    """Return True if a lookahead diverges: its severity is ``log(ratio)`` or more."""
    return severe >= math.log(ratio)


def passes(severe: float, ratio: float) -> bool:
    """Return True if a lookahead passes: half of ``log(ratio)`` or less. Between the two nothing is decided."""
    return severe <= 0.5 * math.log(ratio)


def undecided_severity(ratio: float) -> float:
    """Return a severity at which nothing is decided."""
    return 0.75 * math.log(ratio)
