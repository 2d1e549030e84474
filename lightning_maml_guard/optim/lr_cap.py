"""Caps on learning rates, applied inside the optimizer's step and nowhere else.

A pre-step hook caps the rate, a post-step hook puts the scheduled one back, so that no scheduler ever
sees, multiplies or overwrites a cap. A closure runs at the scheduled rates as well: what a training step
reads and writes there is the schedule. A step that GradScaler skips calls neither hook.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer

from lightning_maml_guard.optim.stability_limits import Optimizers, listed
from lightning_maml_guard.utils.shards import local


@dataclass
class _Step:
    """A step in progress: the call that runs its hooks, and the scheduled rates while others are applied."""

    call: FrameType
    scheduled: list[Any] | None = None


# Shared by all caps of an optimizer: post hooks run in the order of registration, not in reverse, so the
# first to restore must know the schedule and not what another cap left.
_STEPS: WeakKeyDictionary[Optimizer, _Step] = WeakKeyDictionary()


class LRCap:
    """Holds the learning rates of some optimizers at or below a cap.

    The largest rate over the optimizers' parameter groups is brought down to the cap (None: the scheduled rates are
    applied); one factor scales all of them, so that optimizers which step together keep the ratio of their rates. Of
    several caps on one optimizer the lowest is applied. A cap of 0 moves nothing, whatever the gradients are. ``holds``
    tells at each step whether the cap holds; None: always.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], cap: float | None = None, holds: Callable[[], bool] | None = None
    ) -> None:
        self.cap = cap
        self._holds = holds
        self._handles = []
        self._optimizers = list(optimizers)
        try:
            for optimizer in optimizers:
                self._handles.append(optimizer.register_step_pre_hook(self._begin))
                self._handles.append(optimizer.register_step_post_hook(_end))
        except BaseException:
            self.remove()  # a pre hook alone would lower a rate that nothing puts back
            raise

    def remove(self) -> None:
        """Take the hooks out, and put back a rate that a step which raised left capped."""
        for optimizer in self._optimizers:
            _forget(optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = sys._getframe(1)
        step = _STEPS.get(optimizer)
        if step is not None and step.call is not call:
            if _is_running(step.call):
                return None  # a subclass's step called its base class's, where torch runs the same hooks again
            _forget(optimizer)  # the last step raised before its post hook
            step = None
        if step is None:
            step = _STEPS[optimizer] = _Step(call)
        self._apply(optimizer, step)
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._at_the_scheduled_rates(optimizer, args[1], step), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._at_the_scheduled_rates(optimizer, kwargs["closure"], step)}
        return None

    def _at_the_scheduled_rates(
        self, optimizer: Optimizer, closure: Callable[[], Any], step: _Step
    ) -> Callable[[], Any]:
        def evaluate() -> Any:
            _put_back(optimizer, step)
            value = closure()
            self._apply(optimizer, step)
            return value

        return evaluate

    def _apply(self, optimizer: Optimizer, step: _Step) -> None:
        if self.cap == 0:
            _drop_non_finite(optimizer)
        highest = max(max(map(float, _scheduled(each))) for each in self._optimizers)
        if self.cap is None or not highest > self.cap or not (self._holds is None or self._holds()):
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        if step.scheduled is None:
            # A tensor rate (capturable, fused) is written into, never replaced: compiled steps hold it.
            step.scheduled = [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]
        capped = [self.cap * (rate / highest) for rate in step.scheduled]
        # All before the first is written: torch gives groups of one tensor rate the same tensor.
        _write(optimizer, [new if new < old else old for new, old in zip(capped, rates, strict=False)])


@torch.no_grad()
def _drop_non_finite(optimizer: Optimizer) -> None:
    """Set what is not finite of the gradients to 0: a rate of 0 times that is nan."""
    for gradient in [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]:
        values = gradient._values() if gradient.is_sparse else local(gradient)
        values.masked_fill_(~torch.isfinite(values), 0)


def _is_running(call: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None


def _end(optimizer: Optimizer, *_: Any) -> None:
    step = _STEPS.get(optimizer)
    if step is not None and step.call is sys._getframe(1):
        _forget(optimizer)


def _forget(optimizer: Optimizer) -> None:
    step = _STEPS.pop(optimizer, None)
    if step is not None:
        _put_back(optimizer, step)


def _scheduled(optimizer: Optimizer) -> list[Any]:
    """The rates of the schedule, also while a cap is applied."""
    step = _STEPS.get(optimizer)
    kept = None if step is None else step.scheduled
    return [group["lr"] for group in optimizer.param_groups] if kept is None else kept


def _put_back(optimizer: Optimizer, step: _Step) -> None:
    if step.scheduled is not None:
        _write(optimizer, step.scheduled)
        step.scheduled = None


def _write(optimizer: Optimizer, rates: Sequence[Any]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=False):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def scheduled_rate(optimizers: Optimizers) -> float:
    """Read the largest learning rate over the parameter groups of one optimizer, or of several."""
    return max(float(group["lr"]) for optimizer in listed(optimizers) for group in optimizer.param_groups)


def rates_differ(optimizers: Sequence[Optimizer]) -> bool:
    """Return True if the parameter groups have several learning rates."""
    return len({float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups}) > 1


def known_rate(optimizers: Sequence[Optimizer]) -> float:
    """Read the largest learning rate where that costs nothing; ``nan`` of one that lies on a device."""
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    if any(isinstance(rate, torch.Tensor) and not rate.is_cpu for rate in rates):
        return math.nan
    return max(map(float, rates), default=math.nan)
