"""Runs without a guard, and with common remedies: one vmapped program per column."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.common.detectors import LEFT
from benchmarks.guard_bench.columns import AFTERMATH, STEPS, Column
from lightning_maml_guard.phase.divergence import NEVER, divergence_steps
from lightning_maml_guard.phase.gradients import copies, grid_gradient, grid_loss
from lightning_maml_guard.phase.optimizers import SGD, Adam, MetaOptimizer, broadcast_runs

UNGUARDED, CLIP_1, CLIP_10, HALVE = "unguarded", "clip 1", "clip 10", "halve on a spike"
REMEDIES = (UNGUARDED, CLIP_1, CLIP_10, HALVE)
META_OPTIMIZERS: dict[str, MetaOptimizer] = {"sgd": SGD(), "momentum": SGD(momentum=0.9), "adam": Adam()}
SPIKE = 2.0


@dataclass(frozen=True)
class Trace:
    """One run.

    Attributes:
        losses: Training loss of each step's batch, before the step.
        norms: Norm of the meta-gradient at each step.
        start: Loss on the evaluation tasks before training.
        final: The same after training; ``nan`` or ``inf`` if it diverged.
    """

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    start: float
    final: float

    @property
    def departure(self) -> int | None:
        """First step at which the loss exceeds 5 times its start in most of five steps, not in one bad batch."""
        if not self.losses:
            return None
        step = int(divergence_steps(np.array(self.losses), self.start, LEFT))
        return None if step == NEVER else step

    @property
    def outcome(self) -> str:
        """``"diverged"``: exceeded 5 times its start and did not return; ``"healthy"``: ended no worse than it started.

        Otherwise ``"neither"``. A network whose units have died stays near the loss of its start, so to return means to
        fall below it.
        """
        if self.departure is not None:
            return "healthy" if self.final <= 0.9 * self.start else "diverged"
        return "healthy" if self.final <= 1.2 * self.start else "neither"


def train_column(column: Column, steps: int = STEPS + AFTERMATH) -> dict[str, list[Trace]]:
    """Train a column's runs without a guard and with every remedy, all at once.

    Args:
        column: The column.
        steps: Training steps.

    Returns:
        Traces by remedy, one per outer learning rate.
    """
    family = column.tasks()
    module = column.module(1.0)
    betas = torch.tensor(column.betas).repeat(len(REMEDIES))
    runs = len(betas)
    kind = torch.arange(len(REMEDIES)).repeat_interleave(len(column.betas))
    clip = torch.full((runs,), torch.inf)
    clip[kind == 1], clip[kind == 2] = 1.0, 10.0
    alphas = torch.full((runs,), column.alpha)
    optimizer = META_OPTIMIZERS[column.optimizer]
    params = copies(module.theta(), runs)
    state = optimizer.init(params)
    rates, running = betas.clone(), torch.full((runs,), torch.nan)
    losses, norms = [], []
    judged = module.meta_problem(column.judged_on(family))
    start = grid_loss(judged, params, alphas)
    for step in range(steps):
        found, loss = grid_gradient(module.meta_problem(column.batch(step, family)), params, alphas)
        norm = torch.stack([g.flatten(1).square().sum(1) for g in found.values()]).sum(0).sqrt()
        losses.append(loss)
        norms.append(norm)
        running = torch.where(running.isnan(), loss, running)
        spiked = (kind == 3) & ~(loss <= SPIKE * running)
        rates = torch.where(spiked, rates / 2, rates)
        running = torch.where(spiked, running, 0.9 * running + 0.1 * loss)
        factor = (clip / norm.clamp(min=1e-30)).clamp(max=1.0)
        clipped = {n: g * broadcast_runs(factor, g) for n, g in found.items()}
        params, state = optimizer.step(params, clipped, state, rates, step)
    final = grid_loss(judged, params, alphas)
    table = torch.stack(losses), torch.stack(norms)
    traces = [
        Trace(tuple(table[0][:, run].tolist()), tuple(table[1][:, run].tolist()), float(start[run]), float(final[run]))
        for run in range(runs)
    ]
    size = len(column.betas)
    return {remedy: traces[at * size : (at + 1) * size] for at, remedy in enumerate(REMEDIES)}
