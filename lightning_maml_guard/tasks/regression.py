"""Families of regression tasks: linear regression (Takagi et al.) and sinusoids (Finn et al.)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_maml_guard.tasks.episodes import EpisodeBatch, TaskFamily, check_sampling
from lightning_maml_guard.utils.checks import check_choice, check_count, check_flag, check_number


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        check_count(name, number)


class LinearRegression(TaskFamily):
    """Noisy linear maps ``y = w.x + noise`` with ``w ~ N(0, I)`` and inputs of prescribed spread.

    With ``same_query=True``, one task and data that is not resampled, all assumptions of Takagi et al. hold: the loss
    is quadratic and its Hessian constant. The network then learns that one task, and its loss on other tasks rises (in
    expectation to twice that of ``w = 0``), because their ``w`` are drawn independently.

    Args:
        features: Dimension of ``x``.
        shots: Support points per task.
        queries: Query points per task.
        noise: Standard deviation of the noise on ``y``.
        condition: Ratio of the largest to the smallest standard deviation of the input features.
        same_query: Use the support set as the query set.
        dtype: ``"float32"`` or ``"float64"``.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        features: int = 10,
        shots: int = 40,
        queries: int = 40,
        noise: float = 0.1,
        condition: float = 3.0,
        same_query: bool = False,
        dtype: str = "float32",
    ) -> None:
        _check_positive(features=features, shots=shots, queries=queries)
        check_number("noise", noise, least=0)
        check_number("condition", condition, least=1)
        check_flag("same_query", same_query)
        check_choice("dtype", dtype, ("float32", "float64"))
        self.features, self.shots, self.queries = features, shots, queries
        self.noise, self.condition, self.same_query = noise, condition, same_query
        self.dtype = getattr(torch, dtype)

    def sample(self, n_tasks: int, generator: torch.Generator, split: str = "train") -> EpisodeBatch:
        """Sample tasks.

        Args:
            n_tasks: Number of tasks.
            generator: Source of all randomness.
            split: All splits are independent draws from the same distribution.

        Returns:
            ``x`` of shape ``(n_tasks, shots, features)`` and ``y`` of shape ``(n_tasks, shots, 1)``.
        """
        check_sampling(n_tasks, generator, split)
        spread = torch.logspace(0, -math.log10(self.condition), self.features, dtype=self.dtype)
        weight = torch.randn(n_tasks, self.features, 1, generator=generator, dtype=self.dtype)

        def draw(points: int) -> tuple[Tensor, Tensor]:
            x = spread * torch.randn(n_tasks, points, self.features, generator=generator, dtype=self.dtype)
            noise = torch.randn(n_tasks, points, 1, generator=generator, dtype=self.dtype)
            return x, x @ weight + self.noise * noise

        support = draw(self.shots)
        return EpisodeBatch(support, support if self.same_query else draw(self.queries))


class Sinusoid(TaskFamily):
    """Sinusoid regression (Finn et al. 2017): ``y = a * sin(x - p)``, ``a`` in [0.1, 5], ``p`` in [0, pi].

    Args:
        shots: Support points per task, ``x`` uniform in [-5, 5].
        queries: Query points per task.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, shots: int = 10, queries: int = 10) -> None:
        _check_positive(shots=shots, queries=queries)
        self.shots, self.queries = shots, queries

    def sample(self, n_tasks: int, generator: torch.Generator, split: str = "train") -> EpisodeBatch:
        """Sample tasks.

        Args:
            n_tasks: Number of tasks.
            generator: Source of all randomness.
            split: All splits are independent draws from the same distribution.

        Returns:
            ``x`` and ``y`` of shape ``(n_tasks, shots, 1)``.
        """
        check_sampling(n_tasks, generator, split)
        amplitude = 0.1 + 4.9 * torch.rand(n_tasks, 1, 1, generator=generator)
        phase = math.pi * torch.rand(n_tasks, 1, 1, generator=generator)
        x = 10 * torch.rand(n_tasks, self.shots + self.queries, 1, generator=generator) - 5
        y = amplitude * torch.sin(x - phase)
        cut = self.shots
        return EpisodeBatch((x[:, :cut], y[:, :cut]), (x[:, cut:], y[:, cut:]))
