"""Families of problems: what is learned, by which network, with which rates near the best."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.common.data import DATA, draw
from benchmarks.common.modules import Conv, HandMAML, Lstm, Params, Transformer, perceptron
from benchmarks.common.schedules import Schedule, lr_scheduler, make_optimizer
from lightning_maml_guard import EpisodeBatch, MetaLearningModule
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.images import Omniglot

OURS, BY_HAND, PLAIN = "MetaLearningModule", "by hand", "plain training"
TOGETHER = 20  # states evaluated at once
HELD_OUT = "transformer"  # no threshold of the guard was chosen on it: it is in the report set alone


@dataclass(frozen=True)
class Family:
    """A family of problems, with rates near the best, set by hand without the guard on seed 0.

    Attributes:
        data: What is drawn.
        module: OURS, BY_HAND or PLAIN.
        optimizer: ``"sgd"``, ``"momentum"``, ``"adam"`` or ``"adamw"``.
        alpha: Inner rate.
        beta: Outer rate.
        rate: Factor at which an outer rate kills the run.
        inner: Factor of an inner rate that is too large.
        gain: Factor that the inputs drift by.
        inner_steps: ``K``.
        order: ``"exact"`` or ``"first"``.
        classes: Of a classification; None in regression.
        tasks: Tasks of a batch, or its examples in plain training.
        judged: The same of the validation batch.
    """

    data: str
    module: str
    optimizer: str
    alpha: float
    beta: float
    rate: float
    inner: float = 1.0
    gain: float = 2.0
    inner_steps: int = 1
    order: str = "exact"
    classes: int | None = None
    tasks: int = 4
    judged: int = 16

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss function."""
        return nn.functional.mse_loss if self.classes is None else nn.functional.cross_entropy


FAMILIES = {
    "relu": Family("harmonic", OURS, "sgd", 0.03, 0.03, rate=40, inner=25),
    "gelu": Family("harmonic", OURS, "momentum", 0.03, 0.005, rate=40, inner=15, gain=4.0),
    "softplus": Family("harmonic", BY_HAND, "adam", 0.03, 0.005, rate=60, inner=20, gain=10.0, inner_steps=2),
    "lstm": Family("sequence", BY_HAND, "adam", 0.1, 0.03, rate=30, inner=30, gain=8.0),
    "blobs": Family("blobs", BY_HAND, "momentum", 0.3, 0.02, rate=40, inner=30, gain=8.0, order="first", classes=5),
    "conv": Family("omniglot", BY_HAND, "sgd", 0.4, 0.2, rate=60, inner=30, classes=3, tasks=2, judged=8),
    "plain": Family("teacher", PLAIN, "sgd", 0.0, 0.15, rate=12, gain=3.0, tasks=16, judged=128),
    "plain conv": Family("characters", PLAIN, "adam", 0.0, 0.004, rate=150, gain=6.0, classes=10, tasks=16, judged=50),
    "transformer": Family("sequence", BY_HAND, "adamw", 0.02, 0.01, rate=40, inner=50, gain=6.0),
}


def network(name: str) -> nn.Module:
    """Build a family's network."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "relu": mlp,
        "gelu": lambda: perceptron(nn.GELU),
        "softplus": lambda: perceptron(nn.Softplus),
        "lstm": Lstm,
        "blobs": lambda: nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5)),
        "conv": Conv,
        "plain": lambda: nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1)),
        "plain conv": lambda: Conv(classes=10),
        "transformer": Transformer,
    }
    return makers[name]()


@cache
def _characters() -> tuple[Tensor, Tensor]:
    """Ten characters by twenty writers: ``(10, 20, 1, 28, 28)`` and their labels."""
    images, _, _ = Omniglot(DATA).load()
    x = images.unflatten(0, (-1, 20))[:10].float()
    return 1 - x / x.max(), torch.arange(10)[:, None].expand(10, 20)


def batch(family: Family, seed: int, split: str, index: int) -> Any:
    """Draw a batch: tasks ``(xs, ys, xq, yq)``, or ``(x, y)`` in plain training."""
    size = family.judged if split == "val" else family.tasks
    if family.module != PLAIN:
        return draw(family.data, size, seed, split, index)
    generator = episode_generator(seed, split, index)
    if family.data == "teacher":
        x = torch.randn(size, 4, generator=generator)
        y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3] + 0.1 * torch.randn(size, 1, generator=generator)
        return x, y
    images, labels = (each[:, 15:] if split == "val" else each[:, :15] for each in _characters())
    at = torch.randperm(labels.numel(), generator=generator)[:size]
    return images.flatten(0, 1)[at], labels.flatten()[at]


def constant_loss(family: Family, given: Any) -> float:
    """The loss of the best constant answer."""
    if family.classes is not None:
        return math.log(family.classes)
    return float(given[-1].var(unbiased=False))


class _Ours(MetaLearningModule):
    lr: float
    family: Family
    schedule: Schedule

    def configure_optimizers(self) -> Any:
        """Make the optimizer and its schedule."""
        return _optimizers(self.network, self.family, self.lr, self.schedule)


class Plain(pl.LightningModule):
    """Plain training: nothing of it is stated to the guard."""

    def __init__(self, net: nn.Module, family: Family, lr: float, schedule: Schedule) -> None:
        super().__init__()
        self.net, self.family, self.lr, self.schedule = net, family, lr, schedule

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss."""
        x, y = batch
        return self.family.loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        """Make the optimizer and its schedule."""
        return _optimizers(self.net, self.family, self.lr, self.schedule)


class Capped(HandMAML):
    """A module written by hand with the attribute ``inner_lr_cap``, as docs/guide.md shows."""

    inner_lr_cap: float | None = None

    @property
    def alpha(self) -> float:
        """The inner rate as it is applied."""
        return self.configured if self.inner_lr_cap is None else min(self.configured, self.inner_lr_cap)

    @alpha.setter
    def alpha(self, rate: float) -> None:
        self.configured = rate


def _optimizers(net: nn.Module, family: Family, lr: float, schedule: Schedule) -> Any:
    optimizer = make_optimizer(family.optimizer, net.parameters(), lr)
    found = lr_scheduler(schedule, optimizer, lr, 0)
    return optimizer if found is None else {"optimizer": optimizer, "lr_scheduler": found}


def make_module(
    name: str, seed: int, *, alpha: float, beta: float, schedule: Schedule, steps: int, capped: bool = False
) -> Any:
    """Build the module of a run; ``capped``: one written by hand lets a guard lower its inner rate."""
    torch.manual_seed(seed)
    family, net = FAMILIES[name], network(name)
    if family.module == PLAIN:
        return Plain(net, family, beta, schedule)
    if family.module == BY_HAND:
        return (Capped if capped else HandMAML)(
            net,
            family.loss,
            alpha=alpha,
            beta=beta,
            inner_steps=family.inner_steps,
            first_order=family.order == "first",
            optimizer=family.optimizer,
            schedule=schedule,
            steps=steps,
            vectorised=True,
        )
    module = _Ours(net, family.loss, inner_lr=alpha, inner_steps=family.inner_steps, order=family.order)
    module.lr, module.family, module.schedule = beta, family, schedule
    return module


def as_given(family: Family, given: Any) -> Any:
    """Give a batch the form that the family's module takes."""
    return EpisodeBatch(given[:2], given[2:]) if family.module == OURS else given


def set_alpha(module: Any, alpha: float) -> None:
    """Set the inner rate of a run, as its user would."""
    if isinstance(module, MetaLearningModule):
        module.inner_lr = alpha
    elif isinstance(module, HandMAML):
        module.alpha = alpha


def alpha_of(module: Any) -> float:
    """The inner rate as it is applied."""
    if isinstance(module, MetaLearningModule):
        cap = module.inner_lr_cap
        return module.inner_lr if cap is None else min(module.inner_lr, cap)
    return getattr(module, "alpha", 0.0)


@dataclass(frozen=True)
class State:
    """What a run is evaluated with at one step: its parameters, its inner rate, and the factor of its inputs."""

    params: Params
    alpha: float
    gain: float


def evaluate(net: nn.Module, family: Family, states: list[State], given: Any) -> list[tuple[float, float]]:
    """Compute the mean loss before and after adaptation at each state; in plain training both are the loss."""

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return family.loss(functional_call(net, params, (x,)), y)

    def ends(params: Params, alpha: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        if family.module == PLAIN:
            found = loss(params, gain * given[0], given[1])
            return found, found

        def of_task(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> tuple[Tensor, Tensor]:
            adapted = params
            for _ in range(family.inner_steps):
                grads = grad(loss)(adapted, gain * xs, ys)
                adapted = {n: p - alpha * grads[n] for n, p in adapted.items()}
            return loss(params, gain * xq, yq), loss(adapted, gain * xq, yq)

        before, after = vmap(of_task)(*given)
        return before.mean(), after.mean()

    found: list[tuple[float, float]] = []
    with torch.no_grad():
        for first in range(0, len(states), TOGETHER):
            some = states[first : first + TOGETHER]
            params = {n: torch.stack([each.params[n] for each in some]) for n in some[0].params}
            rest = [torch.tensor([getattr(each, name) for each in some]) for name in ("alpha", "gain")]
            before, after = vmap(ends)(params, *rest)
            found += zip(before.tolist(), after.tolist(), strict=True)
    return found


def spoiled(family: Family, given: Any) -> Any:
    """Make a batch bad: in half of it, targets 10 times too large, or inputs if the targets are classes."""
    half = max(len(given[0]) // 2, 1)
    parts = list(given)
    for at in range(len(parts)):
        if (at % 2 == 1) == (family.classes is None):
            parts[at] = torch.cat([10 * parts[at][:half], parts[at][half:]])
    return tuple(parts)


def scaled(given: Any, factor: float) -> Any:
    """Multiply the inputs of a batch, as a sensor does whose gain drifts."""
    return tuple(each * factor if at % 2 == 0 else each for at, each in enumerate(given))
