"""What a guard that rescales holds: the caps, the governor that applies them, the snapshot to go back to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_maml_guard.guard.rescale import Caps
from lightning_maml_guard.optim.lr_cap import RateGovernor
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.utils.distributed import Ranks


class Rescue:
    """Applies caps to a run, and takes it back.

    Args:
        active: Whether anything is applied at all.
        device: Where snapshots are kept; None: where the tensors are.
    """

    def __init__(self, active: bool, device: str | None = None) -> None:
        self.active = active
        self.caps = Caps()
        self.governed: list[int] = []
        self.rollbacks = 0
        self.snapshot: Snapshot | None = None
        self._device = device
        self._governor: RateGovernor | None = None

    def govern(self, optimizers: Sequence[Optimizer], holds: Callable[[], bool] | None = None) -> None:
        """Cap the steps of these optimizers and of no others.

        Args:
            optimizers: The optimizers.
            holds: Says at each step whether the cap holds; None: always.
        """
        self.release()
        self._governor = RateGovernor(optimizers, self.caps.beta, holds) if self.active else None

    def release(self) -> None:
        """Take the hooks out of the optimizers."""
        if self._governor is not None:
            self._governor.remove()
            self._governor = None

    def apply(self, pl_module: Any, caps: Caps) -> None:
        """Apply caps from the coming step on.

        Args:
            pl_module: The module; its inner rate is capped if it can be.
            caps: The caps.
        """
        self.caps = caps
        if reaches_alpha(pl_module):
            pl_module.inner_lr_cap = caps.alpha
        if self._governor is not None:
            self._governor.cap = caps.beta

    def keep(self, pl_module: Any, optimizers: Sequence[Optimizer], step: int, ranks: Ranks) -> None:
        """Keep the state of a run as one to go back to.

        Args:
            pl_module: The module.
            optimizers: Its optimizers.
            step: Training step.
            ranks: The processes that keep it: all of them, or none.
        """
        with ranks.together():
            snapshot = Snapshot(pl_module, optimizers, step, self._device)
        self.snapshot = snapshot

    def state(self) -> dict[str, Any]:
        """Collect the state as primitives; a snapshot is not part of it.

        Returns:
            What :meth:`load` takes.
        """
        return {
            "alpha_cap": self.caps.alpha,
            "beta_cap": self.caps.beta,
            "governed": list(self.governed),
            "rollbacks": self.rollbacks,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state.

        Args:
            state: What :meth:`state` collected.
        """
        self.caps = Caps(state.get("alpha_cap"), state.get("beta_cap"))
        self.governed = list(state.get("governed", []))
        self.rollbacks = state.get("rollbacks", 0)


def reaches_alpha(pl_module: Any) -> bool:
    """Say whether a module lets its inner rate be capped.

    Args:
        pl_module: The module.

    Returns:
        Whether it has an ``inner_lr_cap``.
    """
    return hasattr(pl_module, "inner_lr_cap")


def critical_caps(report: StabilityReport, caps: Caps, margin: float, reach_alpha: bool) -> Caps:
    """Cap at ``margin`` times the limits just measured, also where the schedule is below them and may rise.

    Args:
        report: The measurement.
        caps: The caps so far; what could not be measured stays capped as it was.
        margin: Fraction of the critical values.
        reach_alpha: Whether the inner rate can be capped.

    Returns:
        The caps.
    """
    return Caps(
        margin * report.alpha_c if reach_alpha and not math.isnan(report.alpha_c) else caps.alpha,
        caps.beta if math.isnan(report.safe_beta_c) else margin * report.safe_beta_c,
    )
