"""The problems: networks, tasks and optimizers, and the module and data that a user would have."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.common.modules import Lstm, Transformer, perceptron
from benchmarks.common.schedules import make_optimizer
from lightning_maml_guard import EpisodeBatch, MetaLearningModule, TaskDataModule
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.stability.problems import PlainProblem, Problem, training_step_problem
from lightning_maml_guard.tasks.episodes import TaskFamily, episode_generator
from lightning_maml_guard.tasks.images import MiniImageNet, Omniglot
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import LightningModule

os.environ.setdefault("LMG_DATA", str(Path(__file__).parents[3] / "shared" / "data"))
JUDGED_TASKS = 40


class Sequences(TaskFamily):
    """Windows of a sine; a task asks for the next value times its own gain."""

    def sample(self, n_tasks: int, generator: torch.Generator, split: str = "train") -> EpisodeBatch:
        """Draw tasks of 10 windows each for support and query."""
        gain = 0.5 + 2.5 * torch.rand(n_tasks, 1, 1, generator=generator)
        speed = 0.6 + 0.6 * torch.rand(n_tasks, 1, 1, generator=generator)
        begin = 2 * math.pi * torch.rand(n_tasks, 20, 1, generator=generator)
        wave = torch.sin(begin + speed * torch.arange(7))
        x, y = wave[..., :6, None], gain * wave[..., 6:]
        y = y + 0.3 * torch.randn(y.shape, generator=generator)
        return EpisodeBatch((x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]))


class Classifier(LightningModule):
    """Plain training: an MLP that separates rings of points."""

    def __init__(self, optimizer: str, beta: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
        self.name, self.lr = optimizer, beta

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Make the optimizer."""
        return make_optimizer(self.name, self.net.parameters(), self.lr)


def _rings(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    label = torch.randint(3, (count,), generator=generator)
    radius = 1.0 + label + 0.25 * torch.randn(count, generator=generator)
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label


@dataclass(frozen=True)
class Setting:
    """One problem.

    Attributes:
        network: Builds it; None for plain classification.
        tasks: The task family.
        optimizer: ``"sgd"``, ``"momentum"`` or ``"adam"``.
        alpha: The default inner rate, which the rules that do not choose one keep.
        inner_steps: ``K``.
        order: ``"exact"`` or ``"first"``.
        meta_batch: Tasks per step.
        columns: Inner rates of the grid, lowest and highest exponent of 10.
        steps: Training steps of the grid.
    """

    network: Callable[[], nn.Module] | None
    tasks: Callable[[], TaskFamily] | None
    optimizer: str
    alpha: float = 0.01
    inner_steps: int = 1
    order: str = "exact"
    meta_batch: int = 4
    columns: tuple[float, float] = (-2.5, -0.5)
    steps: int = 500


def _conv(filters: int, channels: int = 1, size: int = 28) -> Callable[[], nn.Module]:
    return lambda: conv4(5, channels=channels, filters=filters, image_size=size, strided=True)


SINUSOID = {"tasks": lambda: Sinusoid(10, 10), "meta_batch": 8}
SEQUENCES = {"tasks": Sequences, "columns": (-2.0, 0.0)}
OMNIGLOT = {"tasks": lambda: Omniglot(n_way=5, k_shot=1, queries=1), "columns": (-2.0, 0.5), "alpha": 0.1}
MINI = {"tasks": lambda: MiniImageNet(n_way=5, k_shot=1, queries=1, image_size=32), "columns": (-2.5, 0.0)}
SETTINGS = {
    "relu sgd": Setting(mlp, optimizer="sgd", **SINUSOID),
    "relu adam K=5": Setting(mlp, optimizer="adam", inner_steps=5, **SINUSOID),
    "relu momentum first": Setting(mlp, optimizer="momentum", order="first", **SINUSOID),
    "tanh adam": Setting(lambda: perceptron(nn.Tanh), optimizer="adam", **SINUSOID),
    "omniglot-8 sgd": Setting(_conv(8), optimizer="sgd", meta_batch=2, steps=300, **OMNIGLOT),
    "omniglot-8 adam first K=5": Setting(
        _conv(8), optimizer="adam", order="first", inner_steps=5, meta_batch=2, steps=150, **OMNIGLOT
    ),
    "omniglot-32 momentum": Setting(_conv(32), optimizer="momentum", meta_batch=2, steps=100, **OMNIGLOT),
    "miniimagenet-8 adam": Setting(_conv(8, 3, 32), optimizer="adam", meta_batch=2, steps=200, **MINI),
    "lstm adam": Setting(Lstm, optimizer="adam", **SEQUENCES),
    "transformer sgd": Setting(Transformer, optimizer="sgd", **SEQUENCES),
    "rings momentum": Setting(None, None, "momentum", alpha=math.nan),
}
BETAS = {"sgd": 0.1, "momentum": 0.01, "adam": 1e-3}


class Problems:
    """A problem at a seed: the module and data a user would pass, and its batches as problems."""

    def __init__(self, name: str, seed: int) -> None:
        self.setting, self.seed = SETTINGS[name], seed
        self.module = self._module()
        self.family = None if self.setting.tasks is None else self.setting.tasks()
        if self.family is not None:
            self.family.setup()

    def _module(self) -> Any:
        setting = self.setting
        torch.manual_seed(self.seed)
        beta = BETAS[setting.optimizer]
        if setting.network is None:
            return Classifier(setting.optimizer, beta)
        return MetaLearningModule(
            setting.network(),
            inner_lr=setting.alpha,
            inner_steps=setting.inner_steps,
            order=setting.order,
            optimizer=lambda parameters: make_optimizer(setting.optimizer, parameters, beta),
        )

    def batch(self, index: int, split: str = "train", tasks: int | None = None) -> Any:
        """Draw a batch, which depends on seed, split and index alone."""
        generator = episode_generator(self.seed, split, index)
        if self.family is None:
            return _rings(64 if tasks is None else 64 * tasks, generator)
        # Judged on tasks of the training classes: the question is how well a pair trains.
        return self.family.sample(tasks or self.setting.meta_batch, generator, "train")

    def problem(self, batch: Any) -> Problem:
        """State a batch's problem."""
        return (
            self.module.meta_problem(batch) if self.family is not None else training_step_problem(self.module, batch, 0)
        )

    def stream(self, begin: int = 0) -> Iterator[Problem]:
        """Yield training batches without end."""
        for index in itertools.count(begin):
            yield self.problem(self.batch(index))

    def judged(self) -> Problem:
        """State the problem that final losses are taken on, which no run trains on."""
        return self.problem(self.batch(0, "val", JUDGED_TASKS))

    def data(self) -> Any:
        """What a user would pass to ``trainer.fit``."""
        if self.family is None:
            return DataLoader([self.batch(index) for index in range(400)], batch_size=None)
        return TaskDataModule(self.family, self.setting.meta_batch, val_episodes=0, seed=10_000 + self.seed)

    def optimizer(self) -> Any:
        """The module's optimizer."""
        return self.module.configure_optimizers()


__all__ = ["BETAS", "SETTINGS", "PlainProblem", "Problems"]
