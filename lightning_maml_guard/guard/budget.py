"""What checks have cost, counted so that the same run checks at the same steps."""

from __future__ import annotations

from typing import Any

# In training steps: a step of a trial, and a product on the whole batch, of the Hessian or of the update's Jacobian
# (python -m tests.benchmarks.check_cost; the dearer end of what is measured there).
TRIAL_STEP, PRODUCT = 1.2, 1.75


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

    def charge(self, *, trial_steps: int, products: float) -> None:
        """Count a check.

        Args:
            trial_steps: Gradients its trials took.
            products: Products it took, in products on the whole batch.
        """
        self._latest = TRIAL_STEP * trial_steps + PRODUCT * products
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
