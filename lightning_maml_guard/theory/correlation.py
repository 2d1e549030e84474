"""Rank correlation: does what is predicted order things as what happened does?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def average_ranks(values: Any) -> np.ndarray:
    """Rank values from 1; equal ones share the mean of their ranks.

    Args:
        values: Numbers, shape ``(n,)``.

    Returns:
        The ranks, shape ``(n,)``.
    """
    array = np.asarray(values, dtype=np.float64)
    _, group, counts = np.unique(array, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[group]


def spearman(one: Any, other: Any) -> float:
    """Compute Spearman's rank correlation coefficient, ties sharing their ranks.

    Args:
        one: Numbers, shape ``(n,)``, none of them nan.
        other: As many.

    Returns:
        The coefficient in ``[-1, 1]``; ``nan`` for fewer than 3 pairs, or if either does not vary.

    Raises:
        ValueError: If the two differ in length.
    """
    first, second = average_ranks(one), average_ranks(other)
    if len(first) != len(second):
        raise ValueError(f"Expected `one` and `other` to be of one length but got {len(first)} and {len(second)}.")
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])
