"""Small problem families, each as a phase diagram takes it and as a Trainer trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_maml_guard import EpisodeBatch, MetaLearningModule, MetaProblem
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.regression import LinearRegression, Sinusoid
from lightning_maml_guard.utils.lightning_compat import Trainer
from tests.helpers import QUIET

OPTIMIZERS = {
    "sgd": SGD,
    "momentum": lambda params, lr: SGD(params, lr=lr, momentum=0.8),
    "nesterov": lambda params, lr: SGD(params, lr=lr, momentum=0.8, nesterov=True),
    "adam": Adam,
}


def double(batch) -> EpisodeBatch:
    return EpisodeBatch(*tree_map(lambda x: x.double() if x.is_floating_point() else x, tuple(batch)))


@dataclass(frozen=True)
class Kind:
    network: Callable[[], nn.Module]
    batch: Callable[[int], EpisodeBatch]
    points: tuple[tuple[float, float], ...]
    order: str = "exact"
    inner_steps: int = 1


def _regression(family, tasks, resample=True):
    return lambda step: double(family.sample(tasks, episode_generator(0, "train", step if resample else 0)))


def _images(step: int) -> EpisodeBatch:
    """Three classes of blobs at places of their own, 2 shots, in noise."""
    generator = torch.Generator().manual_seed(step)
    x = 0.2 * torch.rand(2, 12, 1, 16, 16, generator=generator, dtype=torch.float64)
    y = torch.arange(3).repeat_interleave(4).expand(2, 12)
    for task in range(2):
        for index in range(12):
            x[task, index, 0, 4 * int(y[task, index]) : 4 * int(y[task, index]) + 6, 3 * task : 3 * task + 6] += 0.8
    even, odd = torch.arange(0, 12, 2), torch.arange(1, 12, 2)
    return EpisodeBatch((x[:, even], y[:, even]), (x[:, odd], y[:, odd]))


KINDS = {
    "linear": Kind(
        lambda: mlp(4, hidden=()),
        _regression(LinearRegression(4, 12, 12, same_query=True), 1, resample=False),
        ((0.05, 0.2), (0.2, 0.5), (0.3, 1.5)),
        order="simplified",
    ),
    "sinusoid": Kind(
        lambda: mlp(hidden=(12, 12), activation="tanh"), _regression(Sinusoid(5, 6), 3), ((0.01, 0.02), (0.05, 0.05), (0.1, 0.002))
    ),
    "first": Kind(
        lambda: mlp(hidden=(8,)), _regression(Sinusoid(5, 6), 3), ((0.005, 0.01), (0.02, 0.003), (0.03, 0.001)), order="first", inner_steps=3
    ),
    "conv4": Kind(
        lambda: conv4(3, filters=4, image_size=16), _images, ((0.05, 0.05), (0.2, 0.1), (0.5, 0.01)), inner_steps=2
    ),
}  # fmt: skip


def network(kind: Kind) -> nn.Module:
    torch.manual_seed(0)
    return kind.network().double()


def module(kind: Kind, alpha: float = 0.01, beta: float = 0.01, optimizer: str = "sgd") -> MetaLearningModule:
    return MetaLearningModule(
        network(kind),
        inner_lr=alpha,
        inner_steps=kind.inner_steps,
        order=kind.order,
        optimizer=lambda params: OPTIMIZERS[optimizer](params, lr=beta),
    )


def family(kind: Kind) -> Callable[[int], MetaProblem]:
    one = module(kind)
    return lambda step: one.meta_problem(kind.batch(step))


def trained(kind: Kind, alpha: float, beta: float, steps: int, optimizer: str = "sgd") -> MetaLearningModule:
    """One run, by a Trainer."""
    one = module(kind, alpha, beta, optimizer)
    trainer = Trainer(
        max_epochs=1,
        **QUIET,
    )
    trainer.fit(one, DataLoader([kind.batch(step) for step in range(steps)], batch_size=None))
    return one


def error(one: MetaLearningModule, batch: EpisodeBatch) -> float:
    """Mean query loss after adaptation, task by task in a plain loop of autograd."""
    total = 0.0
    for xs, ys, xq, yq in zip(*batch.support, *batch.query, strict=True):
        params = {n: p.detach().clone().requires_grad_() for n, p in one.theta().items()}
        for _ in range(one.inner_steps):
            gradients = torch.autograd.grad(one.task_loss(params, (xs, ys)), list(params.values()))
            params = {
                n: (p - one.inner_lr * g).detach().requires_grad_()
                for (n, p), g in zip(params.items(), gradients, strict=True)
            }
        total += float(one.task_loss(params, (xq, yq)).detach())
    return total / len(batch.support[0])
