"""MAML written by hand, as users write it: networks and a LightningModule that share no code with the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.common.schedules import Schedule, lr_scheduler, make_optimizer
from lightning_maml_guard import MetaProblem

Params = dict[str, Tensor]


class Lstm(nn.Module):
    """An LSTM whose last state is regressed; the cell by hand, as the fused one has no double backward."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Linear(1 + hidden, 4 * hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(shots, length, 1)`` to ``(shots, 1)``."""
        h = c = x.new_zeros(x.shape[0], self.hidden)
        for token in x.unbind(1):
            i, f, g, o = self.gates(torch.cat([token, h], -1)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


class Transformer(nn.Module):
    """One pre-norm block with attention written out, and a head on the last token."""

    def __init__(self, length: int = 6, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(1, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(shots, length, 1)`` to ``(shots, 1)``."""
        h = self.embed(x) + self.position
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in self.qkv(self.norm1(h)).chunk(3, -1)
        )
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        h = h + self.out((attention @ v).transpose(-3, -2).flatten(-2))
        h = h + self.mlp(self.norm2(h))
        return self.head(self.norm3(h)[..., -1, :])


class Conv(nn.Sequential):
    """Four strided convolutions with batch statistics, for 28 x 28 images."""

    def __init__(self, classes: int = 3, filters: int = 8) -> None:
        layers: list[nn.Module] = []
        for channels in (1, filters, filters, filters):
            layers += [
                nn.Conv2d(channels, filters, 3, stride=2, padding=1),
                nn.BatchNorm2d(filters, track_running_stats=False),
                nn.ReLU(),
            ]
        super().__init__(*layers, nn.Flatten(), nn.Linear(4 * filters, classes))


def perceptron(activation: type[nn.Module]) -> nn.Sequential:
    """Build the sinusoid regressor of Finn et al."""
    return nn.Sequential(nn.Linear(1, 40), activation(), nn.Linear(40, 40), activation(), nn.Linear(40, 1))


class HandMAML(pl.LightningModule):
    """A loop over tasks and ``autograd.grad``, as in most repositories; with ``vectorised`` the same by torch.func."""

    def __init__(
        self,
        net: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        *,
        alpha: float,
        beta: float,
        inner_steps: int,
        first_order: bool,
        optimizer: str,
        schedule: Schedule,
        steps: int,
        vectorised: bool,
    ) -> None:
        super().__init__()
        self.net, self.criterion, self.alpha, self.lr = net, criterion, alpha, beta
        self.inner_steps, self.first_order, self.vectorised = inner_steps, first_order, vectorised
        self.optimizer_name, self.schedule_name, self.steps = optimizer, schedule, steps

    def task_loss(self, params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the loss of one task."""
        return self.criterion(functional_call(self.net, params, (data[0],)), data[1])

    def adapted(self, params: Params, data: tuple[Tensor, Tensor]) -> Params:
        """Take the inner steps."""
        for _ in range(self.inner_steps):
            if self.vectorised:
                grads = grad(self.task_loss)(params, data)
                if self.first_order:
                    grads = {name: g.detach() for name, g in grads.items()}
            else:
                loss = self.task_loss(params, data)
                found = torch.autograd.grad(loss, list(params.values()), create_graph=not self.first_order)
                grads = dict(zip(params, found, strict=True))
            params = {name: p - self.alpha * grads[name] for name, p in params.items()}
        return params

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean query loss after adaptation."""
        xs, ys, xq, yq = batch
        params: Params = dict(self.net.named_parameters())

        def loss_of(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
            return self.task_loss(self.adapted(params, (xs, ys)), (xq, yq))

        if self.vectorised:
            loss = vmap(loss_of)(xs, ys, xq, yq).mean()
        else:
            loss = torch.stack([loss_of(*task) for task in zip(xs, ys, xq, yq, strict=True)]).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Make the optimizer and its schedule."""
        optimizer = make_optimizer(self.optimizer_name, self.net.parameters(), self.lr)
        schedule = lr_scheduler(self.schedule_name, optimizer, self.lr, self.steps)
        return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": schedule}


def meta_problem(module: HandMAML, batch: Any) -> MetaProblem:
    """State a hand-written module's step to the guard, as docs/guide.md shows."""
    xs, ys, xq, yq = batch
    return MetaProblem(
        params=dict(module.net.named_parameters()),
        task_loss=module.task_loss,
        support=(xs, ys),
        query=(xq, yq),
        inner_lr=module.alpha,
        inner_steps=module.inner_steps,
        order="first" if module.first_order else "exact",
    )
