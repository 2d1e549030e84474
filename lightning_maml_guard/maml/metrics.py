"""Means over episodes with their confidence interval."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class EpisodeMean(Metric):
    """Mean of one value an episode, with the half-width of its 95 % confidence interval.

    The half-width is ``1.96 * s / sqrt(n)`` with the sample standard deviation ``s`` over ``n`` episodes,
    the form few-shot papers report.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add episodes.

        Args:
            values: One value an episode, any shape.
        """
        self.values.append(values.detach().flatten().float())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Compute the mean and the half-width (``nan`` for a single episode).

        Returns:
            Mean and half-width, scalars.
        """
        values = dim_zero_cat(self.values)
        if len(values) < 2:
            return values.mean(), torch.full_like(values.mean(), float("nan"))
        return values.mean(), 1.96 * values.std() / len(values) ** 0.5
