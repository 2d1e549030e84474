"""Optimizers and learning-rate schedules, as Lightning takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
)

Schedule = str | Callable[[int], float]  # a name, or the factor of each step
EPOCHS = 10  # of a run whose schedule steps by epochs; others have one
SCHEDULES = ("", "warmup", "warmup epochs", "restarts", "warmup restarts", "onecycle", "cosine")


def make_optimizer(name: str, params: Iterable[Any], lr: float) -> Optimizer:
    """Build a meta-optimizer."""
    if name in {"adam", "adamw"}:
        return (Adam if name == "adam" else AdamW)(params, lr=lr)
    return SGD(params, lr=lr, momentum=0.9 if name == "momentum" else 0.0)


def _warmup_restarts(step: int, steps: int) -> float:
    """Warm up over the first 0.4 of the run, then two cosine cycles with hard restarts."""
    warm = int(0.4 * steps)
    if step < warm:
        return (step + 1) / warm
    along = 2 * (step - warm) / max(steps - warm, 1)
    return 0.5 * (1 + math.cos(math.pi * (along % 1.0)))


def lr_scheduler(name: Schedule, optimizer: Optimizer, lr: float, steps: int) -> dict[str, Any] | None:
    """Build a schedule that peaks at ``lr``, in Lightning's dict; one given as a function multiplies ``lr``."""
    made: LRScheduler
    if callable(name):
        return {"scheduler": LambdaLR(optimizer, name), "interval": "step"}
    if not name:
        return None
    if name == "warmup epochs":
        made = LambdaLR(optimizer, lambda epoch: min(1.0, (epoch + 1) / (0.8 * EPOCHS)))
        return {"scheduler": made, "interval": "epoch"}
    if name == "warmup":
        made = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (0.7 * steps)))
    elif name == "warmup restarts":
        made = LambdaLR(optimizer, lambda step: _warmup_restarts(step, steps))
    elif name == "restarts":
        made = CosineAnnealingWarmRestarts(optimizer, T_0=max(steps // 4, 1))
    elif name == "onecycle":
        cycled = "momentum" not in optimizer.defaults or optimizer.defaults["momentum"] > 0
        made = OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, pct_start=0.4, cycle_momentum=cycled)
    elif name == "cosine":
        made = CosineAnnealingLR(optimizer, T_max=steps)
    else:
        raise ValueError(f"Expected a schedule among {SCHEDULES} but got {name!r}.")
    return {"scheduler": made, "interval": "step"}


def peak_step(name: str, steps: int) -> int | None:
    """Find the first step taken at the schedule's largest rate; None without a schedule."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    found = lr_scheduler(name, optimizer, 1.0, steps)
    if found is None:
        return None
    every = steps // EPOCHS if found["interval"] == "epoch" else 1
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            found["scheduler"].step()
    return next(step for step, rate in enumerate(rates) if rate >= 0.999 * max(rates))
