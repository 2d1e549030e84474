"""Scheduled rate -> applied rate, inside the optimizer's step and nowhere else.

A pre-step hook caps the rate, a post-step hook puts the scheduled one back, so that no scheduler ever
sees, multiplies or overwrites a cap. A step that GradScaler skips calls neither hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer


@dataclass
class _Step:
    """A step in progress: the scheduled rates, and the governors that capped them."""

    scheduled: list[Any]
    governors: set[int] = field(default_factory=set)


# Shared by all governors of an optimizer: post hooks run in the order of registration, not in reverse, so the
# first to restore must know the schedule and not what another governor left.
_STEPS: WeakKeyDictionary[Optimizer, _Step] = WeakKeyDictionary()


class RateGovernor:
    """Holds the learning rates of some optimizers at or below a cap.

    The largest rate over an optimizer's parameter groups is brought down to the cap; one factor scales all
    of its groups. Several governors of one optimizer apply the lowest of their caps.

    Args:
        optimizers: The optimizers to govern.
        cap: Largest rate to apply; None applies the scheduled rates.
    """

    def __init__(self, optimizers: Sequence[Optimizer], cap: float | None = None) -> None:
        self.cap = cap
        self._handles = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._apply))
            self._handles.append(optimizer.register_step_post_hook(_restore))
        self._optimizers = list(optimizers)

    def remove(self) -> None:
        """Take the hooks out, and put back a rate that a step which raised left capped."""
        for optimizer in self._optimizers:
            _restore(optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _apply(self, optimizer: Optimizer, *_: Any) -> None:
        step = _STEPS.get(optimizer)
        if step is not None and id(self) in step.governors:
            _restore(optimizer)  # the last step raised before its post hook
            step = None
        highest = scheduled_rate(optimizer)
        if self.cap is None or not highest > self.cap:
            return
        if step is None:
            # A tensor rate (capturable, fused) is written into, never replaced: compiled steps hold it.
            rates = [group["lr"] for group in optimizer.param_groups]
            step = _STEPS[optimizer] = _Step([r.clone() if isinstance(r, torch.Tensor) else r for r in rates])
        step.governors.add(id(self))
        for group in optimizer.param_groups:
            _write(group, self.cap * (group["lr"] / highest))


def _restore(optimizer: Optimizer, *_: Any) -> None:
    step = _STEPS.pop(optimizer, None)
    if step is not None:
        for group, rate in zip(optimizer.param_groups, step.scheduled, strict=False):
            _write(group, rate)


def scheduled_rate(optimizer: Optimizer) -> float:
    """Read an optimizer's largest learning rate.

    Args:
        optimizer: The optimizer.

    Returns:
        The largest over its parameter groups.
    """
    return max(float(group["lr"]) for group in optimizer.param_groups)


def _write(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
