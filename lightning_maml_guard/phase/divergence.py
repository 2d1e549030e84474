"""When the loss of a training diverges."""

from __future__ import annotations

import numpy as np

NEVER = -1
_WINDOW = 5


def divergence_steps(losses: np.ndarray, start: np.ndarray | float, factor: float) -> np.ndarray:
    """First step at which each loss exceeds ``factor`` times its start for good, shape ``(...)``; -1 if it never does.

    ``losses`` has shape ``(steps, ...)``. One bad batch does not count: the loss has to be too large (or not finite) in
    most of five steps from there.
    """
    outside = ~(np.asarray(losses, dtype=np.float64) <= factor * np.asarray(start, dtype=np.float64))
    steps = len(outside)
    # Prefix sums: how many of the steps t .. t + _WINDOW - 1 lie outside, the last windows being shorter.
    total = np.concatenate([np.zeros((1, *outside.shape[1:]), dtype=int), outside.cumsum(0)])
    ends = np.minimum(np.arange(steps) + _WINDOW, steps)
    counts = total[ends] - total[:-1]
    lengths = (ends - np.arange(steps)).reshape(-1, *[1] * (outside.ndim - 1))
    diverged = outside & (2 * counts > lengths)
    return np.where(diverged.any(0), diverged.argmax(0), NEVER)
