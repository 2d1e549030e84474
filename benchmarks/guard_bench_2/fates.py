"""What became of a run: the four fates, and the step of its death, from losses on tasks that stay the same.

This definition was fixed before any run under a guard was looked at, and is not changed for what comes out.

All losses are on the same validation tasks, after adaptation. ``start`` is the smallest of the loss at the initial
parameters before adaptation, after it, and that of the best constant answer; ``best`` is the lowest final loss of the
column's references, which are trained without a guard at rates near the best: the base, under a cosine schedule, and
at a third and three times its outer rate. The *gain* of a loss is the share of the
way from ``start`` to ``best`` that it stands for: 0 at the start, 1 at the best. A run has

- **diverged** if its final loss is not finite, or as far above the start as the best is below it (gain below -1);
- **collapsed** if it had a gain of 0.2 or more and ends with less than half of the largest it had;
- **stalled** if it ends with a gain below 0.2 otherwise;
- **learned** otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import numpy as np

LEARNING, STALLED, COLLAPSED, DIVERGED = "learning", "stalled", "collapsed", "diverged"
FATES = (LEARNING, STALLED, COLLAPSED, DIVERGED)
GAINED = 0.2  # gain from which on a run has learned something that it can lose
LOST = 0.5  # share of the largest gain so far below which a run has lost it
THROWN = -1.0  # gain below which it has diverged
TOGETHER = 3  # losses whose median counts, for the largest gain and for the end
FOR_GOOD = 0.8  # share of the remaining steps without which a departure is an excursion
SAMPLES = 60  # losses per run that decide its fate


def stride(steps: int) -> int:
    """Steps between the losses that decide a fate."""
    return max(steps // SAMPLES, 1)


def gains(losses: Sequence[float], start: float, best: float) -> list[float]:
    """Compute the gain of each loss; ``-inf`` where it is not finite."""
    return [(start - each) / (start - best) if math.isfinite(each) else -math.inf for each in losses]


def _largest(found: Sequence[float]) -> float:
    """The largest gain that lasted: of the medians of three in a row."""
    lasting = [median(found[at : at + TOGETHER]) for at in range(len(found) - TOGETHER + 1)]
    return max(lasting, default=-math.inf)


def final_loss(losses: Sequence[float]) -> float:
    """The median of the last losses of a run; ``inf`` where it is not finite."""
    return median(each if math.isfinite(each) else math.inf for each in losses[-TOGETHER:])


def fate(losses: Sequence[float], start: float, best: float) -> str:
    """Tell what became of a run.

    Args:
        losses: Losses at every :func:`stride` steps.
        start: Loss that training starts from.
        best: Final loss of the column's best reference.

    Returns:
        One of FATES.
    """
    end = gains([final_loss(losses)], start, best)[0]
    if end < THROWN:
        return DIVERGED
    largest = _largest(gains(losses, start, best))
    if largest >= GAINED and end < LOST * largest:
        return COLLAPSED
    return STALLED if end < GAINED else LEARNING


def dead_steps(losses: Sequence[float], start: float, best: float) -> np.ndarray:
    """Tell for each step whether the run has diverged there, or has lost half of what it had learned by then."""
    found = np.array(gains(losses, start, best))
    middles = np.array([median(found[max(at - TOGETHER + 1, 0) : at + 1]) for at in range(len(found))])
    largest = np.maximum.accumulate(middles)
    return (found < THROWN) | ((largest >= GAINED) & (found < LOST * largest))


def death(losses: Sequence[float], start: float, best: float) -> int | None:
    """Find the step at which a run died: the first dead one of which most of the steps that follow are dead.

    Args:
        losses: Losses at every step.
        start: Loss that training starts from.
        best: Final loss of the column's best reference.

    Returns:
        The step; None where it did not die.
    """
    dead = dead_steps(losses, start, best)
    shares = np.cumsum(dead[::-1])[::-1] / np.arange(len(dead), 0, -1)
    found = np.flatnonzero(dead & (shares >= FOR_GOOD))
    return int(found[0]) if len(found) else None


def had_excursion(losses: Sequence[float], start: float, best: float) -> bool:
    """Return True if a run was dead in most of five steps in a row, whether or not it came back."""
    dead = dead_steps(losses, start, best).astype(int)
    return bool((np.convolve(dead, np.ones(5, int), "valid") >= 3).any())


def onset(reference: Sequence[float], start: float, best: float) -> int:
    """Find the step at which a stalled run should have learned: the reference has half of the gain there.

    Args:
        reference: Losses of the column's base at every step.
        start: Loss that training starts from.
        best: Final loss of the column's best reference.

    Returns:
        The step; the number of steps where the reference does not get there.
    """
    learned = np.flatnonzero(np.array(gains(reference, start, best)) >= LOST)
    return int(learned[0]) if len(learned) else len(reference)
