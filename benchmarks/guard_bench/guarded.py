"""Runs under a guard: the same runs through a real Trainer with a real ConvergenceGuard."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.common.lightning import TRAINER, quiet
from benchmarks.common.options import guard_arguments
from benchmarks.guard_bench.columns import AFTERMATH, STEPS, Column
from benchmarks.guard_bench.remedies import Trace
from lightning_maml_guard import ConvergenceGuard
from lightning_maml_guard.maml.meta_gradient import meta_gradient

# Runs of 120 steps stand for longer ones, so the guard that warns checks every 5 steps and those that act every 10. At
# its defaults the guard checks every 100 steps and when triggered.
WARN, RESCALE, ROLLBACK = "guard warn", "guard rescale", "guard rescale + rollback"
WARN_DEFAULT, ROLLBACK_DEFAULT = "guard warn, defaults", "guard rescale + rollback, defaults"
ARMS: dict[str, dict[str, Any]] = {
    WARN: {"action": "warn", "every_n_steps": 5},
    WARN_DEFAULT: {"action": "warn"},
    RESCALE: {"action": "rescale", "rollback": False, "every_n_steps": 10},
    ROLLBACK: {"action": "rescale", "rollback": True, "every_n_steps": 10},
    ROLLBACK_DEFAULT: {"action": "rescale", "rollback": True},
}


@dataclass(frozen=True)
class Guarded:
    """One run under a guard.

    Attributes:
        trace: Its losses.
        severities: ``(step, severity)`` of every check.
        ratios: ``(step, beta / beta_c, alpha / alpha_c)`` of every full check.
        alarms: Steps at which the guard gave advice.
        init_rate: ``2 / lambda_max`` at the start.
        rollbacks: How often the run was rolled back.
        stopped: Step at which the guard stopped the run.
        seconds: Wall time.
    """

    trace: Trace
    severities: list[tuple[int, float]]
    ratios: list[tuple[int, float, float]]
    alarms: list[int]
    init_rate: float
    rollbacks: int
    stopped: int | None
    seconds: float
    said: list[str] = field(default_factory=list)


class _Batches(Dataset):
    def __init__(self, column: Column, steps: int) -> None:
        family = column.tasks()
        # Every run of a column uses the same batches.
        self.batches = [column.batch(step, family) for step in range(steps if column.resample else 1)]
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int):
        return self.batches[index % len(self.batches)]


class _Recorder(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(norms).norm()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))


def run_column(column: Column, arms: tuple[str, ...], **options) -> dict[str, list[Guarded]]:
    """Run a column under the guard.

    Args:
        column: The column.
        arms: Names among ARMS.
        **options: Arguments of the guard.

    Returns:
        Runs by arm, one per outer learning rate.
    """
    quiet()
    batches = _Batches(column, STEPS + AFTERMATH)
    return {arm: [_run(column, beta, batches, {**ARMS[arm], **options}) for beta in column.betas] for arm in arms}


def _run(column: Column, beta: float, batches: _Batches, options: dict) -> Guarded:
    began = time.perf_counter()
    module = column.module(beta)
    judged = column.judged_on(column.tasks())
    start = _loss(module, judged)
    guard, recorder = ConvergenceGuard(**guard_arguments(options)), _Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            max_epochs=1,
            callbacks=[guard, recorder],
            **TRAINER,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))
    said = [str(each.message) for each in caught if "ConvergenceGuard" in str(each.message)]
    alarms = [report.step for report in guard.history if report.advice is not None]
    first = guard.history[0] if guard.history else None
    return Guarded(
        Trace(tuple(recorder.losses), tuple(recorder.norms), start, _loss(module, judged)),
        list(guard.severities),
        [(report.step, report.beta_ratio, report.alpha_ratio) for report in guard.history],
        alarms,
        2 / first.lambda_max if first is not None and first.lambda_max > 0 else math.inf,
        guard._run.state.rollbacks,
        guard.stopped_step,
        time.perf_counter() - began,
        said,
    )


def _loss(module, batch) -> float:
    return float(meta_gradient(module.meta_problem(batch)).losses.mean())
