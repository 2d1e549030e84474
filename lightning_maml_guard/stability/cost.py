"""What the operators of a measurement cost, in training steps, so that the same run checks at the same steps."""

from __future__ import annotations

from typing import NamedTuple


class Price(NamedTuple):
    """What an operator costs, in training steps: its graph once, and each matrix-vector product with it."""

    graph: float
    product: float


# The upper end of what `python -m benchmarks.hvp_cost` measures: the Jacobian of the update that trains (MAML's or
# plain training's), and the Hessian of the task loss beside it.
UPDATE, CURVATURE = Price(1.2, 2.1), Price(0.5, 0.75)
