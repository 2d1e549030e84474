"""What checks have cost, counted so that the same run checks at the same steps."""

from __future__ import annotations

from typing import Any, NamedTuple


class Price(NamedTuple):
    """What an operator takes, in training steps.

    Attributes:
        graph: To build it: its gradient with a graph.
        product: A product with it.
    """

    graph: float
    product: float


# The dearer end of what `python -m benchmarks.prices` measures: the Jacobian of the update that trains (MAML's or
# plain training's), the Hessian of the task loss beside it, and a step of a trial.
UPDATE, CURVATURE = Price(1.2, 2.1), Price(0.5, 0.75)
TRIAL_STEP = 1.2


class Budget:
    """Lets a scheduled check wait until the steps taken pay for it.

    Args:
        share: Share of the training's work that checks may take; None: no limit.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self._spent = self._latest = 0.0

    def allows(self, step: int) -> bool:
        """Say whether one more check like the latest stays within the share.

        Args:
            step: Training steps taken.

        Returns:
            Whether it does; the first check always does.
        """
        return self.share is None or self._spent == 0 or self._spent + self._latest <= self.share * step

    def charge(self, *, trial_steps: int, measured: float) -> None:
        """Count a check.

        Args:
            trial_steps: Gradients its trials took.
            measured: What its measurement took, in training steps.
        """
        self._latest = TRIAL_STEP * trial_steps + measured
        self._spent += self._latest

    def state(self) -> dict[str, Any]:
        """Collect the state as primitives.

        Returns:
            What :meth:`load` takes.
        """
        return {"spent": [self._spent, self._latest]}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state.

        Args:
            state: What :meth:`state` collected.
        """
        self._spent, self._latest = state.get("spent", (0.0, 0.0))
