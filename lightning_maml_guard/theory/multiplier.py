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
"""

from __future__ import annotations

import math
import sys
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
