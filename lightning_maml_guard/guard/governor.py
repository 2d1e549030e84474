"""Scheduled rate -> applied rate, inside the optimizer's step and nowhere else.

A pre-step hook caps the rate, a post-step hook puts the scheduled one back, so that no scheduler ever
sees, multiplies or overwrites a cap. A step that GradScaler skips calls neither hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class RateGovernor:
    """Holds the learning rates of some optimizers at or below a cap.

    The largest rate over an optimizer's parameter groups is brought down to the cap; one factor scales all
    of its groups.

    Args:
        optimizers: The optimizers to govern.
        cap: Largest rate to apply; None applies the scheduled rates.
    """

    def __init__(self, optimizers: Sequence[Optimizer], cap: float | None = None) -> None:
        self.cap = cap
        self._scheduled: dict[int, list[Any]] = {}
        self._handles = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._apply))
            self._handles.append(optimizer.register_step_post_hook(self._restore))
        self._optimizers = list(optimizers)

    def remove(self) -> None:
        """Take the hooks out, and put back a rate that a step which raised left capped."""
        for optimizer in self._optimizers:
            self._restore(optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _apply(self, optimizer: Optimizer, *_: Any) -> None:
        self._restore(optimizer)
        highest = scheduled_rate(optimizer)
        if self.cap is None or not highest > self.cap:
            return
        saved: list[Any] = []
        for group in optimizer.param_groups:
            rate = group["lr"]
            # A tensor rate (capturable, fused) is written into, never replaced: compiled steps hold it.
            saved.append(rate.clone() if isinstance(rate, torch.Tensor) else rate)
            _write(group, self.cap * (rate / highest))
        self._scheduled[id(optimizer)] = saved

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._scheduled.pop(id(optimizer), []), strict=False):
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
