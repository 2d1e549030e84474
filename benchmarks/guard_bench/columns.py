"""The runs, in columns: meta-trainings that differ in the outer learning rate alone."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.common.data import DATA
from benchmarks.common.schedules import make_optimizer
from lightning_maml_guard import EpisodeBatch, MetaLearningModule
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.tasks.episodes import TaskFamily, episode_generator
from lightning_maml_guard.tasks.images import Omniglot
from lightning_maml_guard.tasks.regression import LinearRegression, Sinusoid

STEPS = 100
# Runs go on this much longer before they count as healthy: a warning ahead of a later divergence is not a false alarm.
AFTERMATH = 20
ORDERS = ("exact", "first", "simplified")
OPTIMIZERS = ("sgd", "momentum", "adam")
# Rates from far inside to far outside the stable region, set by hand from the networks' sharpness at the start, without
# the guard.
BETA_STEPS = (0.15, 0.5, 1.2, 3.0, 12.0)
ALPHA_STEPS = (0.1, 0.4, 0.9, 2.5)


@dataclass(frozen=True)
class Kind:
    """A family of problems, with the rates in the middle of its grid.

    Attributes:
        alpha: Inner learning rate near its limit at the start.
        beta: Outer learning rate of SGD near its limit at the start.
        adam: Outer learning rate of Adam near the largest that trains.
        tasks: Tasks per meta-batch.
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
    """Runs that differ in the outer learning rate alone.

    Attributes:
        family: One of KINDS.
        order: Order of the meta-gradient.
        inner_steps: ``K``.
        optimizer: ``"sgd"``, ``"momentum"`` or ``"adam"``.
        resample: Draw new tasks at every step.
        level: Index of the inner learning rate in ALPHA_STEPS.
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
        """The inner learning rate; K simplified steps act as one of K times the length, so each gets a Kth."""
        shorter = self.inner_steps if self.order == "simplified" else 1
        return KINDS[self.family].alpha * ALPHA_STEPS[self.level] / shorter

    @property
    def betas(self) -> tuple[float, ...]:
        """The outer learning rates."""
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
        """Draw the tasks on which the final loss is measured: the training tasks, or new ones where they are resampled."""
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


def columns(seeds: range) -> list[Column]:
    """Cross family, order, K and optimizer for every seed; sampling and inner learning rate are assigned evenly, at random.

    Omniglot's runs take ten times as long, so its optimizers are assigned too instead of crossed.

    Args:
        seeds: The seeds.

    Returns:
        60 columns per seed.
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
