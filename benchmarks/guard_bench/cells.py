"""The runs: columns of meta-trainings that differ in the meta rate alone."""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lightning_maml_guard import EpisodeBatch, MetaLearningModule
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.tasks.episodes import TaskFamily, episode_generator
from lightning_maml_guard.tasks.images import Omniglot
from lightning_maml_guard.tasks.regression import LinearRegression, Sinusoid

DATA = os.environ.get("LMG_DATA", str(Path(__file__).parents[3] / "shared" / "data"))
STEPS = 100
# Runs are watched this much longer before they count as healthy: a guard that sees the end coming is not wrong.
AFTERMATH = 20
ORDERS = ("exact", "first", "simplified")
OPTIMIZERS = ("sgd", "momentum", "adam")
# Rates from far inside to far outside. By hand, from the networks' sharpness at the start: the guard has no say in it.
BETA_STEPS = (0.15, 0.5, 1.2, 3.0, 12.0)
ALPHA_STEPS = (0.1, 0.4, 0.9, 2.5)


@dataclass(frozen=True)
class Kind:
    """A family of problems, with the rates around which its grid lies.

    Attributes:
        alpha: An inner rate near its limit at the start.
        beta: A meta rate of SGD near its limit at the start.
        adam: A meta rate of Adam near the largest that trains.
        tasks: Tasks a meta-batch.
    """

    alpha: float
    beta: float
    adam: float
    tasks: int


KINDS = {
    "linear": Kind(alpha=0.5, beta=1.0, adam=0.3, tasks=5),
    "tanh": Kind(alpha=0.06, beta=0.12, adam=0.03, tasks=10),
    "relu": Kind(alpha=0.05, beta=0.1, adam=0.03, tasks=10),
    "omniglot": Kind(alpha=0.5, beta=1.0, adam=0.03, tasks=4),
}


@dataclass(frozen=True)
class Column:
    """Runs that share everything but the meta rate.

    Attributes:
        family: One of KINDS.
        order: How the meta-gradient is taken.
        inner_steps: ``K``.
        optimizer: ``"sgd"``, ``"momentum"`` or ``"adam"``.
        resample: Whether tasks are drawn anew at every step.
        level: Index of the inner rate in ALPHA_STEPS.
        seed: Seed of the weights and the tasks.
    """

    family: str
    order: str
    inner_steps: int
    optimizer: str
    resample: bool
    level: int
    seed: int

    @property
    def alpha(self) -> float:
        """The inner rate; K simplified steps act as one of K times the length, so each is given a Kth."""
        shorter = self.inner_steps if self.order == "simplified" else 1
        return KINDS[self.family].alpha * ALPHA_STEPS[self.level] / shorter

    @property
    def betas(self) -> tuple[float, ...]:
        """The meta rates."""
        kind = KINDS[self.family]
        centre = kind.adam if self.optimizer == "adam" else kind.beta
        return tuple(centre * step for step in BETA_STEPS)

    def tasks(self) -> TaskFamily:
        """Build the family of tasks."""
        if self.family == "linear":
            return LinearRegression(features=6, shots=30, queries=30)
        return Omniglot(DATA) if self.family == "omniglot" else Sinusoid()

    def batch(self, index: int, family: TaskFamily) -> EpisodeBatch:
        """Draw the meta-batch of a step."""
        at = index if self.resample else 0
        return family.sample(KINDS[self.family].tasks, episode_generator(self.seed, "train", at))

    def judged_on(self, family: TaskFamily) -> EpisodeBatch:
        """Draw the tasks the final loss is measured on: the training tasks, or new ones where they are resampled."""
        if not self.resample:
            return self.batch(0, family)
        return family.sample(5 * KINDS[self.family].tasks, episode_generator(self.seed, "val", 0), "val")

    def network(self) -> nn.Module:
        """Build the network at its start."""
        torch.manual_seed(self.seed)
        if self.family == "linear":
            return mlp(6, hidden=())
        if self.family == "omniglot":
            return conv4(filters=8, strided=True)
        return mlp(activation=self.family)

    def module(self, beta: float) -> MetaLearningModule:
        """Build the module of one run."""
        return MetaLearningModule(
            self.network(),
            nn.functional.cross_entropy if self.family == "omniglot" else nn.functional.mse_loss,
            inner_lr=self.alpha,
            inner_steps=self.inner_steps,
            order=self.order,
            optimizer=lambda params: make_optimizer(self.optimizer, params, beta),
        )


def make_optimizer(name: str, params, lr: float) -> Optimizer:
    """Build a meta-optimizer."""
    if name == "adam":
        return Adam(params, lr=lr)
    return SGD(params, lr=lr, momentum=0.9 if name == "momentum" else 0.0)


def columns(seeds: range) -> list[Column]:
    """Cross family, order, K and optimizer for every seed; sampling and inner rate are dealt out evenly, at random.

    Omniglot's runs take ten times as long, so its optimizers are dealt out as well instead of crossed.

    Args:
        seeds: The seeds.

    Returns:
        60 columns a seed.
    """
    found = []
    for seed in seeds:
        draw = random.Random(seed)
        cells = [cell for cell in itertools.product(KINDS, ORDERS, (1, 5), OPTIMIZERS) if cell[0] != "omniglot"]
        slow = list(itertools.product(ORDERS, (1, 5)))
        optimizers = list(OPTIMIZERS) * (len(slow) // len(OPTIMIZERS))
        draw.shuffle(optimizers)
        cells += [("omniglot", *cell, optimizer) for cell, optimizer in zip(slow, optimizers, strict=True)]
        dealt = list(itertools.product((False, True), range(len(ALPHA_STEPS)))) * (len(cells) // 8 + 1)
        draw.shuffle(dealt)
        found += [Column(*cell, *rest, seed) for cell, rest in zip(cells, dealt, strict=False)]
    return found
