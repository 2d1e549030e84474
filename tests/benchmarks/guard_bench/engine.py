"""The unguarded runs and the remedies people use today: one vmapped program a column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_maml_guard.maml.gradients import task_meta_gradient
from tests.benchmarks.guard_bench.cells import AFTERMATH, STEPS, Column, make_optimizer

UNGUARDED, CLIP_1, CLIP_10, HALVE = "unguarded", "clip 1", "clip 10", "halve on a spike"
REMEDIES = (UNGUARDED, CLIP_1, CLIP_10, HALVE)
SPIKE = 2.0
LEFT = 5.0


@dataclass(frozen=True)
class Trace:
    """One run.

    Attributes:
        losses: Training loss of each step's batch, before the step.
        norms: Norm of the meta-gradient at each step.
        start: Loss on the tasks judged on, before training.
        final: The same after training; ``nan`` or ``inf`` if it blew up.
    """

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    start: float
    final: float

    @property
    def departure(self) -> int | None:
        """First step at which the loss has left 5 times its start: in most of five steps, not in one bad batch."""
        outside = [not loss <= LEFT * self.start for loss in self.losses]
        for step in range(len(outside)):
            window = outside[step : step + 5]
            if outside[step] and 2 * sum(window) > len(window):
                return step
        return None

    @property
    def fate(self) -> str:
        """``"diverged"``: left and did not come back; ``"healthy"``: ended no worse than it began; else ``"neither"``.

        A network that its rates have killed sits near the loss of its start, so coming back means going below it.
        """
        if self.departure is not None:
            return "healthy" if self.final <= 0.9 * self.start else "diverged"
        return "healthy" if self.final <= 1.2 * self.start else "neither"


def train_column(column: Column, steps: int = STEPS + AFTERMATH) -> dict[str, list[Trace]]:
    """Train a column's runs unguarded and with every remedy, all at once.

    Args:
        column: The column.
        steps: Training steps.

    Returns:
        Traces by remedy, one a meta rate.
    """
    family = column.tasks()
    module = column.module(1.0)
    betas = torch.tensor(column.betas).repeat(len(REMEDIES))
    runs = len(betas)
    kind = torch.arange(len(REMEDIES)).repeat_interleave(len(column.betas))
    clip = torch.full((runs,), torch.inf)
    clip[kind == 1], clip[kind == 2] = 1.0, 10.0
    params = {n: p.detach().expand(runs, *p.shape).clone() for n, p in module.theta().items()}
    leaves = {n: torch.nn.Parameter(p) for n, p in params.items()}
    # A step of these optimizers is linear in the rate, so they run at rate 1 and each run takes its share of the step.
    optimizer = make_optimizer(column.optimizer, list(leaves.values()), 1.0)
    rates, running = betas.clone(), torch.full((runs,), torch.nan)
    losses, norms = [], []

    def gradient(theta, batch):
        def one(support, query):
            (found, _), (loss, _) = task_meta_gradient(
                module.task_loss,
                theta,
                column.alpha,
                support,
                query,
                inner_steps=column.inner_steps,
                order=column.order,
            )
            return found, loss

        found, loss = torch.func.vmap(one)(*batch)
        return {n: g.mean(0) for n, g in found.items()}, loss.mean()

    vectorized = torch.func.vmap(gradient, in_dims=(0, None))

    def values(batch) -> Tensor:
        return vectorized({n: p.detach() for n, p in leaves.items()}, batch)[1]

    judged = column.judged_on(family)
    start = values(judged)
    for step in range(steps):
        found, loss = vectorized({n: p.detach() for n, p in leaves.items()}, column.batch(step, family))
        norm = torch.stack([g.flatten(1).square().sum(1) for g in found.values()]).sum(0).sqrt()
        losses.append(loss)
        norms.append(norm)
        running = torch.where(running.isnan(), loss, running)
        spiked = (kind == 3) & ~(loss <= SPIKE * running)
        rates = torch.where(spiked, rates / 2, rates)
        running = torch.where(spiked, running, 0.9 * running + 0.1 * loss)
        factor = (clip / norm.clamp(min=1e-30)).clamp(max=1.0)
        before = {n: p.detach().clone() for n, p in leaves.items()}
        for name, leaf in leaves.items():
            leaf.grad = found[name] * _spread(factor, leaf)
        optimizer.step()
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(before[name] + _spread(rates, leaf) * (leaf - before[name]))
    final = values(judged)
    table = torch.stack(losses), torch.stack(norms)
    traces = [
        Trace(tuple(table[0][:, run].tolist()), tuple(table[1][:, run].tolist()), float(start[run]), float(final[run]))
        for run in range(runs)
    ]
    size = len(column.betas)
    return {remedy: traces[at * size : (at + 1) * size] for at, remedy in enumerate(REMEDIES)}


def _spread(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))
