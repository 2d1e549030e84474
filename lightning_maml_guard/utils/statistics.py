"""Mean and standard deviation from primitives, right at every order of differentiation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Statistics over some dimensions, each kept with size 1."""

    mean: Tensor
    centred: Tensor
    inverse_std: Tensor


def statistics(x: Tensor, dims: tuple[int, ...], eps: float) -> Statistics:
    """Compute the mean, ``x - mean`` and ``1 / sqrt(variance + eps)``."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    return Statistics(mean, centred, torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps))
