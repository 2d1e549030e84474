"""The multiplier of the meta update along one eigenvector, for each order of MAML.

Near a minimum the meta update multiplies the error along the i-th eigenvector of the Hessian ``H`` by
``1 - beta * f(lambda_i)``. The *multiplier* ``f`` depends on how the meta-gradient is taken:

=============  ==================================  =====================================
order          f(lambda)                           largest inner rate alpha_c
=============  ==================================  =====================================
simplified     lambda * (1 - K*alpha*lambda)       1 / (K * lambda_max)   (Takagi et al.: K = 1)
first          lambda * (1 - alpha*lambda)^K       1 / lambda_max for odd K, else 2 / lambda_max
exact          lambda * (1 - alpha*lambda)^(2K)    2 / lambda_max (the inner loop's own limit)
=============  ==================================  =====================================

With a rate ``alpha_k = alpha*r_k`` of each step (``alpha`` the largest, ``0 <= r_k <= 1``) the inner loop multiplies
the error by ``p(z) = prod_k (1 - r_k*z)``, ``z = alpha*lambda``, in place of ``(1 - z)^K``. Exact MAML's limit is the
first ``z`` at which ``|p(z)| = 1``, first-order MAML's the first at which ``p`` turns negative, if that is lower, and
simplified MAML's ``1 / sum_k r_k``: :func:`inner_limit`. With momentum ``m`` in the inner loop ``p`` is that of the
recursion, and the limit that of its linear response, ``2*(1 + m)``; fewer steps than it settles in may still grow.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_maml_guard.utils.checks import check_choice, check_count, check_number

ORDERS = ("exact", "first", "simplified")

Interval = tuple[float, float]


@dataclass(frozen=True)
class Multiplier:
    """``f(lambda) = lambda * (1 - rate*lambda)^power``, with ``alpha_c = inner_limit / lambda_max``."""

    rate: float
    power: int
    inner_limit: float  # alpha_c = inner_limit / lambda_max

    def __call__(self, eigenvalue: float) -> float:
        with np.errstate(over="ignore"):
            return float(eigenvalue * np.float64(1.0 - self.rate * eigenvalue) ** self.power)

    def range_over(self, low: float, high: float) -> Interval:
        """Smallest and largest value on ``[low, high]``: at the ends or where the derivative is 0."""
        points = [low, high]
        if self.rate > 0:
            stationary = (1.0 / self.rate, 1.0 / (self.rate * (1 + self.power)))
            points += [point for point in stationary if low < point < high]
        values = [self(point) for point in points]
        return min(values), max(values)


def multiplier(alpha: float, order: str, inner_steps: int) -> Multiplier:
    """Return the multiplier of an order; see the table of this module."""
    if order == "simplified":
        return Multiplier(min(alpha * inner_steps, sys.float_info.max), 1, 1.0 / inner_steps)
    if order == "first":
        return Multiplier(alpha, inner_steps, 1.0 if inner_steps % 2 else 2.0)
    return Multiplier(alpha, 2 * inner_steps, 2.0)


def inner_limit(order: str, ratios: Sequence[float]) -> float:
    """Compute ``alpha_c * lambda_max`` for inner rates ``alpha * ratios``, one for each step.

    Args:
        order: How the meta-gradient is taken.
        ratios: Each step's rate over the largest one: between 0 and 1, the largest 1.

    Returns:
        The limit of ``alpha * lambda_max``: 2 for equal rates and exact MAML.
    """
    if order == "simplified":
        return 1.0 / sum(ratios)
    # Between two zeros of p, log |p| is concave, so each piece has one peak; beyond the last it rises for ever.
    zeros = sorted({1 / ratio for ratio in ratios if ratio > 0})
    turns = [zero for zero in zeros if sum(1 / ratio == zero for ratio in ratios if ratio > 0) % 2]
    first_turn = turns[0] if turns and order == "first" else math.inf
    for left, right in zip(zeros, [*zeros[1:], math.inf], strict=True):
        peak = right if right < math.inf else 2 * left
        if right < math.inf:
            low, high = left, right
            for _ in range(100):
                low, high = _third(low, high, ratios)
            peak = (low + high) / 2
        else:
            while _growth(peak, ratios) <= 0:
                peak *= 2
        if _growth(peak, ratios) > 0:
            low, high = left, peak
            for _ in range(100):
                middle = (low + high) / 2
                low, high = (middle, high) if _growth(middle, ratios) <= 0 else (low, middle)
            return min(low, first_turn)
    return math.inf


def _third(low: float, high: float, ratios: Sequence[float]) -> tuple[float, float]:
    """Drop the third of an interval in which the peak does not lie."""
    one, other = (2 * low + high) / 3, (low + 2 * high) / 3
    return (one, high) if _growth(one, ratios) < _growth(other, ratios) else (low, other)


def _growth(z: float, ratios: Sequence[float]) -> float:
    """``log |p(z)|``."""
    factors = [abs(1 - ratio * z) for ratio in ratios]
    return sum(map(math.log, factors)) if all(factors) else -math.inf


def turns_at(contraction: Callable[[float], float], limit: float) -> float:
    """Find the first ``z`` up to a limit at which the inner loop's factor ``p(z)`` turns negative; else the limit."""
    grid = np.linspace(0.0, limit, 4097)
    negative = [index for index, z in enumerate(grid) if contraction(float(z)) < 0]
    if not negative:
        return limit
    low, high = float(grid[negative[0] - 1]), float(grid[negative[0]])
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if contraction(middle) < 0 else (middle, high)
    return low


def rate_limit(numerator: float, curvature: float) -> float:
    """Divide by a curvature; ``inf`` (no finite limit) if it is not positive."""
    if curvature <= 0:
        return math.inf
    with np.errstate(over="ignore"):
        return float(np.float64(numerator) / np.float64(curvature))


def check_rate(alpha: float, name: str = "alpha") -> None:
    """Raise a ValueError if a learning rate is not a finite number of at least 0."""
    check_number(name, alpha, least=0)


def check_order(order: str, inner_steps: int) -> None:
    """Raise a ValueError if the order or the number of inner steps is not allowed."""
    check_choice("order", order, ORDERS)
    check_count("inner_steps", inner_steps)
