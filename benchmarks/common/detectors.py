"""Signals of losses and norms that others warn by, as scores per step, and how well a score tells runs apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

Series = list[tuple[int, float]]  # (step, score)

# Stands for infinity; its negative for no score at all. Scores are only ranked.
HUGE = 1e9
LEFT = 5.0  # times its start that a loss exceeds when it has left


def finite(value: float) -> float:
    """Bring a score into the range of numbers."""
    return HUGE if math.isnan(value) else max(min(value, HUGE), -HUGE)


def up_to(series: Series, last: int) -> float:
    """The largest score by a step."""
    return max((finite(value) for step, value in series if step <= last), default=-HUGE)


def spike_ratios(values: Sequence[float]) -> Series:
    """Each value divided by the running mean of the values before it."""
    running, found = math.nan, []
    for step, value in enumerate(values):
        found.append((step, value / running if not math.isnan(running) else 1.0))
        if math.isfinite(value):
            running = value if math.isnan(running) else 0.9 * running + 0.1 * value
    return found


def early_stopping(losses: Sequence[float], start: float) -> Series:
    """EarlyStopping(check_finite=True, divergence_threshold=5x the start): yes or no."""
    bar = LEFT * start
    return [(step, 0.0 if math.isfinite(loss) and loss <= bar else 1.0) for step, loss in enumerate(losses)]


def spike_detection(losses: Sequence[float]) -> Series:
    """SpikeDetection(rtol=2, atol=None): not finite, or above the running mean by twice that mean."""
    return [(s, 1.0 if not math.isfinite(v) or v >= 1 + 2.0 else 0.0) for s, v in spike_ratios(losses)]


def time_matched(positives: list[tuple[Series, int]], negatives: list[tuple[Series, int]], lead: int) -> float | None:
    """Compute the AUROC where every dying run is compared with the others at its own time.

    A maximum over more steps is larger: without the match, a score that only grows with time tells late deaths from
    short looks, and early deaths lose to whole runs.

    Args:
        positives: Scores of runs that die, with the step of the death.
        negatives: Scores of runs that do not, with the steps that are known.
        lead: Steps before the death up to which scores count.

    Returns:
        The share of pairs in which the dying run has the larger score, a tie counting half; None without pairs.
    """
    shares = []
    for series, death in positives:
        last = death - lead
        others = [up_to(each, last) for each, known in negatives if known > last]
        if last < 0 or not others:
            continue
        own = up_to(series, last)
        shares.append(sum((own > each) + 0.5 * (own == each) for each in others) / len(others))
    return sum(shares) / len(shares) if shares else None
