"""Advice: what a run is told at once, over MAML written by hand, and that a run that follows it trains."""

import math
import warnings
from functools import cache

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, GuardWarning, LookaheadOptions, MetaProblem
from lightning_maml_guard.utils.lightning_compat import Callback, LightningModule, Trainer
from tests.helpers import QUIET, one_line

TASKS, SHOTS = 4, 10


@cache
def sinusoids(steps, seed=0, shots=SHOTS):
    """Batches of sine curves, drawn anew at each step: (x, y) to adapt on and (x, y) to be judged by."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(steps):
        phase, height = (torch.rand(TASKS, 1, 1, generator=generator) for _ in range(2))
        x = torch.rand(TASKS, 2 * shots, 1, generator=generator) * 10 - 5
        y = (0.1 + 4.9 * height) * torch.sin(x - math.pi * phase)
        batches.append((x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:]))
    return batches


class HandWritten(LightningModule):
    """A loop over the tasks, as users write it; ``warmup``: steps over which lr rises to what is configured."""

    def __init__(self, alpha=0.01, lr=0.01, inner_steps=1, optimizer=SGD, warmup=None, hidden=40):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        self.alpha, self.lr, self.inner_steps, self.optimizer, self.warmup = alpha, lr, inner_steps, optimizer, warmup
        self.losses = []

    def task_loss(self, params, data):
        x, y = data
        return ((functional_call(self.net, params, (x,)) - y) ** 2).mean()

    def training_step(self, batch, batch_idx):
        losses = []
        for xs, ys, xq, yq in zip(*batch, strict=True):
            params = dict(self.net.named_parameters())
            for _ in range(self.inner_steps):
                grads = torch.autograd.grad(self.task_loss(params, (xs, ys)), list(params.values()), create_graph=True)
                params = {n: p - self.alpha * g for (n, p), g in zip(params.items(), grads, strict=True)}
            losses.append(self.task_loss(params, (xq, yq)))
        loss = torch.stack(losses).mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        optimizer = self.optimizer(self.net.parameters(), lr=self.lr)
        if self.warmup is None:
            return optimizer
        rising = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rising, "interval": "step"}}


def problem_of(module, batch):
    xs, ys, xq, yq = batch
    params = dict(module.net.named_parameters())
    return MetaProblem(params, module.task_loss, (xs, ys), (xq, yq), module.alpha, inner_steps=module.inner_steps)


def guarded(module, batches, callbacks=(), **arguments):
    """Run with a guard at its defaults; the guard, and what it said."""
    guard = ConvergenceGuard(problem=problem_of, **arguments)
    trainer = Trainer(max_epochs=1, callbacks=[*callbacks, guard], gradient_clip_val=None, **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(list(batches), batch_size=None))
    said = [one_line(each.message) for each in caught if issubclass(each.category, GuardWarning)]
    assert not [text for text in said if "failed" in text or "could not" in text], said
    return guard, said


def ends_at(module):
    return sum(module.losses[-10:]) / 10


@cache
def healthy_end(steps, **arguments):
    module = HandWritten(**arguments)
    Trainer(max_epochs=1, **QUIET).fit(module, DataLoader(sinusoids(steps), batch_size=None))
    return ends_at(module)
