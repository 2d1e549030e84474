"""One run through Lightning's Trainer: without a guard, under it, or as the learning-rate finder takes it."""

from __future__ import annotations

import io
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner import Tuner
from torch.utils.data import DataLoader, Sampler

from benchmarks.advice.families import (
    FAMILIES,
    JUDGED_TASKS,
    TASKS,
    as_given,
    dead_share,
    evaluate,
    make_module,
)
from benchmarks.common.data import Batch, draw
from benchmarks.common.lightning import TRAINER
from benchmarks.common.modules import meta_problem
from benchmarks.common.schedules import EPOCHS
from lightning_maml_guard import ConvergenceGuard

OUTLIER_SCALE = 30.0
NEVER_RETURNS = 10  # steps that an unguarded run goes on after a loss that is not finite
JUDGED_BEFORE_END = (0, 10, 20)  # steps before the end at which a run is evaluated; the median counts
AFTERWORD = 1  # steps that a broken run under the guard goes on after its first advice
# Lightning's own range begins at 1e-8, where losses of resampled tasks are noise and the steepest place is anywhere.
FINDER: dict[str, Any] = {"min_lr": 1e-4, "max_lr": 10.0, "num_training": 100}


@dataclass(frozen=True)
class Setting:
    """What a run is configured with: what advice may change, and what stays.

    Attributes:
        family: One of FAMILIES.
        optimizer: ``"sgd"``, ``"momentum"``, ``"adam"`` or ``"adamw"``.
        alpha: Inner learning rate.
        beta: The optimizer's ``lr``; under a schedule its peak.
        inner_steps: ``K``.
        order: ``"exact"`` or ``"first"``.
        schedule: One of SCHEDULES.
        resample: Draw new tasks at every step.
        outlier: Step whose batch has targets 30 times too large in half of its tasks.
        clip: The Trainer's ``gradient_clip_val``.
    """

    family: str
    optimizer: str
    alpha: float
    beta: float
    inner_steps: int = 1
    order: str = "exact"
    schedule: str = ""
    resample: bool = True
    outlier: int | None = None
    clip: float | None = None

    @property
    def steps(self) -> int:
        """Steps of the run; fewer where each takes five inner steps."""
        return FAMILIES[self.family].steps if self.inner_steps == 1 else 150


class _Onward(Sampler[int]):
    """Goes on where the last epoch ended."""

    def __init__(self, per_epoch: int) -> None:
        self.at, self.per_epoch = 0, per_epoch

    def __iter__(self) -> Iterator[int]:
        start, self.at = self.at, self.at + self.per_epoch
        return iter(range(start, self.at))

    def __len__(self) -> int:
        return self.per_epoch


@lru_cache(4)
def _batches(data: str, steps: int, seed: int, resample: bool) -> list[Batch]:
    drawn = [draw(data, TASKS, seed, "train", index) for index in range(steps if resample else 1)]
    return drawn if resample else drawn * steps


@lru_cache(16)
def _judged(data: str, seed: int, resample: bool) -> Batch:
    return draw(data, JUDGED_TASKS, seed, "val", 0) if resample else draw(data, TASKS, seed, "train", 0)


def _loader(setting: Setting, seed: int) -> DataLoader[Any]:
    batches = _batches(FAMILIES[setting.family].data, setting.steps, seed, setting.resample)
    if setting.outlier is not None:
        xs, ys, xq, yq = batches[setting.outlier]
        scale = torch.ones(TASKS, 1, 1)
        scale[: TASKS // 2] = OUTLIER_SCALE
        batches = list(batches)
        batches[setting.outlier] = (xs, ys * scale, xq, yq * scale)
    epochs = EPOCHS if "epochs" in setting.schedule else 1
    given: Any = [as_given(setting.family, batch) for batch in batches]
    return DataLoader(given, batch_size=None, sampler=_Onward(setting.steps // epochs))


class _Losses(pl.Callback):
    """Keeps the training losses and the last evaluations, and ends a run that cannot return."""

    def __init__(self, steps: int, evaluation: Callable[[], float], ends: bool) -> None:
        self.losses: list[float] = []
        self.finals: list[float] = []
        self.evaluation, self.bad, self.ends = evaluation, 0, ends
        self.judged_at = {steps - at for at in JUDGED_BEFORE_END}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.bad += not math.isfinite(self.losses[-1])
        if len(self.losses) in self.judged_at:
            self.finals.append(self.evaluation())
        if self.ends and self.bad > NEVER_RETURNS:
            trainer.should_stop = True


class _Listener(pl.Callback):
    """Keeps the guard's first advice and message, with the optimizer steps taken before."""

    def __init__(self, guard: ConvergenceGuard, caught: _Said, ends: bool) -> None:
        self.guard, self.caught, self.ends, self.after = guard, caught, ends, 0
        self.advice: dict[str, Any] | None = None
        self.messages: list[tuple[int, str]] = []

    def listen(self, trainer: Any) -> None:
        """Look whether there is an advice."""
        while len(self.messages) < len(self.caught):
            self.messages.append((trainer.global_step, str(self.caught[len(self.messages)].message)))
        given = getattr(self.guard, "advice", None)
        if self.advice is None and given is not None:
            cause = getattr(given.cause, "value", given.cause)
            rates = {name: _number(getattr(given, name, None)) for name in ("alpha", "beta", "gradient_clip_val")}
            evidence = str(getattr(given, "evidence", ""))
            self.advice = {"step": trainer.global_step, "cause": str(cause), **rates, "evidence": evidence}
        if self.advice is not None:
            self.after += 1
            if self.ends and self.after > 2 * AFTERWORD:
                trainer.should_stop = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.listen(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.listen(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.listen(trainer)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _own(setting: Setting, seed: int) -> int:
    """Give the MetaLearningModule other weights and tasks than the hand-written module of the same network."""
    return seed + 1000 * FAMILIES[setting.family].ours


def train(setting: Setting, seed: int, *, guarded: bool = False, ends: bool = True) -> dict[str, Any]:
    """Train a run.

    Args:
        setting: Its configuration.
        seed: Seed of the weights and the tasks.
        guarded: Under a guard at its defaults.
        ends: End the run early where nothing more is to be learned: a while after the first loss that is not finite,
            or under the guard after the first advice.

    Returns:
        ``losses`` of the training steps; ``start``, the smaller of the evaluation losses before and after adaptation
        at the initial parameters; ``final``, that after adaptation near the end (inf if not finite); ``dead``, the share
        of dead ReLUs; ``seconds``. Under the guard also ``advice``, ``messages`` and ``checks``.
    """
    began, seed = time.perf_counter(), _own(setting, seed)
    name, family = setting.family, FAMILIES[setting.family]
    module = make_module(name, setting, seed)
    judged = _judged(family.data, seed, setting.resample)

    def evaluation() -> tuple[float, float]:
        return evaluate(name, module, setting.alpha, setting.inner_steps, judged)

    losses = _Losses(setting.steps, lambda: evaluation()[1], ends and not guarded)
    callbacks: list[pl.Callback] = [losses]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said = _Said(caught)
        if guarded:
            guard = ConvergenceGuard() if family.ours else ConvergenceGuard(problem=meta_problem)
            listener = _Listener(guard, said, ends)
            callbacks += [guard, listener]
        start = min(loss for loss in evaluation() if math.isfinite(loss))
        trainer = pl.Trainer(
            max_steps=setting.steps,
            callbacks=callbacks,
            gradient_clip_val=setting.clip,
            num_sanity_val_steps=0,
            **TRAINER,
        )
        trainer.fit(module, _loader(setting, seed))
    finals = [loss if math.isfinite(loss) else math.inf for loss in losses.finals]
    result: dict[str, Any] = {
        "losses": losses.losses,
        "start": start,
        "dead": dead_share(name, module),
        "final": median(finals) if len(finals) == len(JUDGED_BEFORE_END) else math.inf,
        "seconds": time.perf_counter() - began,
    }
    if guarded:
        result |= {"advice": listener.advice, "messages": listener.messages[:5]}
        result["checks"] = [_check(report) for report in guard.history]
    return result


class _Said:
    """The guard's warnings among those caught so far."""

    def __init__(self, caught: list[Any]) -> None:
        self.caught = caught

    def _all(self) -> list[Any]:
        return [each for each in self.caught if "ConvergenceGuard" in str(each.message)]

    def __len__(self) -> int:
        return len(self._all())

    def __getitem__(self, index: int) -> Any:
        return self._all()[index]


def _check(report: Any) -> dict[str, Any]:
    names = ("step", "status", "alpha", "alpha_c", "beta", "beta_c", "exact_beta_c", "severity", "growth")
    kinds = [reason.kind.name for reason in report.findings]
    return {**{name: getattr(report, name) for name in names}, "findings": kinds}


def find_lr(setting: Setting, seed: int) -> float | None:
    """Ask Lightning's learning-rate finder for the optimizer's rate; None where it suggests none."""
    seed = _own(setting, seed)
    module = make_module(setting.family, setting, seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=setting.steps, default_root_dir=folder, **{**TRAINER, "enable_checkpointing": True}
        )
        found = Tuner(trainer).lr_find(
            module,
            train_dataloaders=_loader(setting, seed),
            update_attr=False,
            **FINDER,
        )
    suggested = found.suggestion() if found is not None else None
    return None if suggested is None else float(suggested)
