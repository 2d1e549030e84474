"""Families of problems: data, network and module of each, hand-written or a MetaLearningModule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.func import functional_call

from benchmarks.common.data import Batch
from benchmarks.common.modules import Conv, HandMAML, Lstm, Params, Transformer, perceptron
from benchmarks.common.schedules import lr_scheduler, make_optimizer
from lightning_maml_guard import EpisodeBatch, MetaLearningModule
from lightning_maml_guard.networks import conv4, mlp

TASKS = 4
JUDGED_TASKS = 20


@dataclass(frozen=True)
class Family:
    """A family of problems.

    Attributes:
        data: ``"sinusoid"``, ``"sequence"`` or ``"omniglot"``.
        steps: Steps of a run with one inner step.
        ours: Whether the module is a MetaLearningModule.
        vectorised: Whether a hand-written module goes over the tasks by ``vmap``.
    """

    data: str
    steps: int
    ours: bool = False
    vectorised: bool = False


FAMILIES = {
    "relu": Family("sinusoid", 250),
    "tanh": Family("sinusoid", 250, vectorised=True),
    "lstm": Family("sequence", 120),
    "transformer": Family("sequence", 120),
    "conv": Family("omniglot", 100, vectorised=True),
    "our relu": Family("sinusoid", 250, ours=True),
    "our conv": Family("omniglot", 100, ours=True),
}


def criterion(family: Family) -> Any:
    """Return the loss function of a family."""
    return nn.functional.cross_entropy if family.data == "omniglot" else nn.functional.mse_loss


def network(name: str) -> nn.Module:
    """Build a family's network."""
    if name == "our conv":
        return conv4(3, filters=8, strided=True)
    makers: dict[str, Callable[[], nn.Module]] = {
        "relu": lambda: perceptron(nn.ReLU),
        "tanh": lambda: perceptron(nn.Tanh),
        "lstm": Lstm,
        "transformer": Transformer,
        "conv": Conv,
        "our relu": mlp,
    }
    return makers[name]()


class _Ours(MetaLearningModule):
    """A subclass with an optimizer and a schedule of its own."""

    lr: float  # where Lightning's finder looks for it
    setting: Any

    def configure_optimizers(self) -> Any:
        """Make the optimizer and its schedule."""
        optimizer = make_optimizer(self.setting.optimizer, self.network.parameters(), self.lr)
        schedule = lr_scheduler(self.setting.schedule, optimizer, self.lr, self.setting.steps)
        return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": schedule}


def make_module(name: str, setting: Any, seed: int) -> pl.LightningModule:
    """Build the module of a run, with the learning rates of its setting."""
    torch.manual_seed(seed)
    family, net = FAMILIES[name], network(name)
    if not family.ours:
        return HandMAML(
            net,
            criterion(family),
            alpha=setting.alpha,
            beta=setting.beta,
            inner_steps=setting.inner_steps,
            first_order=setting.order == "first",
            optimizer=setting.optimizer,
            schedule=setting.schedule,
            steps=setting.steps,
            vectorised=family.vectorised,
        )
    module = _Ours(net, criterion(family), inner_lr=setting.alpha, inner_steps=setting.inner_steps, order=setting.order)
    module.lr, module.setting = setting.beta, setting
    return module


def as_given(name: str, batch: Batch) -> Any:
    """Give a batch the form that the family's module takes."""
    return EpisodeBatch(batch[:2], batch[2:]) if FAMILIES[name].ours else batch


def evaluate(name: str, module: Any, alpha: float, inner_steps: int, batch: Batch) -> tuple[float, float]:
    """Compute the mean query loss before and after adaptation."""
    net = module.network if FAMILIES[name].ours else module.net
    loss = criterion(FAMILIES[name])
    start: Params = {n: p.detach() for n, p in net.named_parameters()}
    before, after = [], []
    for xs, ys, xq, yq in zip(*batch, strict=True):
        params = start
        for _ in range(inner_steps):
            params = {n: p.detach().requires_grad_() for n, p in params.items()}
            grads = torch.autograd.grad(loss(functional_call(net, params, (xs,)), ys), list(params.values()))
            params = {n: p - alpha * g for (n, p), g in zip(params.items(), grads, strict=True)}
        with torch.no_grad():
            before.append(loss(functional_call(net, start, (xq,)), yq))
            after.append(loss(functional_call(net, params, (xq,)), yq))
    return float(torch.stack(before).mean()), float(torch.stack(after).mean())


def dead_share(name: str, module: Any) -> float | None:
    """Compute the share of ReLUs that no input of the sinusoid's range activates; None for other networks and for NaN."""
    if name not in {"relu", "our relu"}:
        return None
    x, alive = torch.linspace(-5, 5, 200)[:, None], []
    with torch.no_grad():
        for layer in module.network if FAMILIES[name].ours else module.net:
            x = layer(x)
            if not x.isfinite().all():
                return None
            if isinstance(layer, nn.ReLU):
                alive.append((x > 0).any(0))
    return 1 - float(torch.cat(alive).float().mean())
