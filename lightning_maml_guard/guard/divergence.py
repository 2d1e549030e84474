"""Is the training diverging? Running statistics of its loss and gradient norm, and a lookahead's threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn
from torch.optim import Optimizer

# The start is the median of this many first losses: one odd batch does not move it.
FIRST_LOSSES = 8
_LOSS_SPIKE, _NORM_SPIKE = 2.0, 4.0
_MEMORY = 0.9


@dataclass
class RunningStatistics:
    """The loss and the gradient norm of the steps so far.

    Attributes:
        first: The first losses.
        loss: Running mean of the loss.
        norm: Running mean of the gradient norm.
        looked: Loss at the first lookahead, which stands for the start while no step has told its loss.
    """

    first: tuple[float, ...] = ()
    loss: float = math.nan
    norm: float = math.nan
    looked: float = math.nan

    @property
    def start(self) -> float:
        """Loss that training started from; ``nan`` before the first lookahead or step."""
        return median(self.first) if self.first else self.looked

    def look(self, loss: float) -> None:
        """Take the loss of a lookahead in."""
        if math.isnan(self.looked) and math.isfinite(loss):
            self.looked = loss

    def update(self, loss: float, norm: float = math.nan) -> bool:
        """Take a step in, and return True if its loss or its norm spiked or is not finite."""
        # A run that diverges within its first steps must not move its start.
        if (
            math.isfinite(loss)
            and len(self.first) < FIRST_LOSSES
            and (not self.first or loss <= _LOSS_SPIKE * self.first[0])
        ):
            self.first = (*self.first, loss)
        spiked = not math.isfinite(loss) or loss > _LOSS_SPIKE * self.loss or norm > _NORM_SPIKE * self.norm
        if math.isfinite(loss):
            self.loss = loss if math.isnan(self.loss) else _MEMORY * self.loss + (1 - _MEMORY) * loss
        if math.isfinite(norm):
            self.norm = norm if math.isnan(self.norm) else _MEMORY * self.norm + (1 - _MEMORY) * norm
        return spiked

    def diverged(self, loss: float, ratio: float) -> bool:
        """Return True if a loss is not finite, or above ``ratio`` times the one that training started from."""
        return not math.isfinite(loss) or loss > ratio * self.start


def severity(end: float, start: float) -> float:
    """Measure how far a lookahead takes the loss: ``log(end / start)``, with the loss that training started from.

    ``inf`` where the loss is not finite, ``nan`` where there is nothing to compare with (a start at or below 0).
    """
    if math.isnan(start) or start <= 0:
        return math.nan if math.isfinite(end) else math.inf
    if not math.isfinite(end):
        return math.inf
    return math.log(end / start) if end > 0 else -math.inf


def fails(severe: float, ratio: float) -> bool:
    """Return True if a lookahead diverges: its severity is ``log(ratio)`` or more."""
    return severe >= math.log(ratio)


def passes(severe: float, ratio: float) -> bool:
    """Return True if a lookahead passes: half of ``log(ratio)`` or less. Between the two nothing is decided."""
    return severe <= 0.5 * math.log(ratio)


def undecided(ratio: float) -> float:
    """Return a severity at which nothing is decided."""
    return 0.75 * math.log(ratio)


def gradient_norm(optimizer: Optimizer) -> torch.Tensor | float | None:
    """Compute the norm of the gradient an optimizer is about to use: on a CPU a number, None without a gradient."""
    known = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [g.coalesce().values() if g.is_sparse else g for g in known]
    if not gradients:
        return None
    # Equal to get_total_norm here; its sorting by device and type takes 1 % of a small network's step.
    if all(gradient.is_cpu for gradient in gradients):
        return math.hypot(*[norm.item() for norm in torch._foreach_norm(gradients)])
    if len({(gradient.device, gradient.dtype) for gradient in gradients}) == 1:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return nn.utils.get_total_norm(gradients)
