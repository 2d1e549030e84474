"""What became of a training: whether and when its loss left, and which columns trained how far."""

from __future__ import annotations

import numpy as np

NEVER = -1


def departures(losses: np.ndarray, start: np.ndarray | float, factor: float = 5.0, window: int = 5) -> np.ndarray:
    """Find the first step at which each loss has left ``factor`` times its start.

    One bad batch is no departure: the loss has to be out (or not finite) in most of the ``window`` steps from there.

    Args:
        losses: Loss of each step, shape ``(steps, ...)``.
        start: Loss before training; a number or shape ``(...)``.
        factor: How far out.
        window: Steps looked at.

    Returns:
        The steps, shape ``(...)``; -1 where the loss never left.
    """
    outside = ~(np.asarray(losses, dtype=np.float64) <= factor * np.asarray(start, dtype=np.float64))
    steps = len(outside)
    # Prefix sums: how many of the steps t .. t + window - 1 lie outside, the last windows being shorter.
    total = np.concatenate([np.zeros((1, *outside.shape[1:]), dtype=int), outside.cumsum(0)])
    ends = np.minimum(np.arange(steps) + window, steps)
    inside = total[ends] - total[:-1]
    lengths = (ends - np.arange(steps)).reshape(-1, *[1] * (outside.ndim - 1))
    left = outside & (2 * inside > lengths)
    return np.where(left.any(0), left.argmax(0), NEVER)
