"""One run through Lightning's Trainer: without a guard, with a common remedy, or under a guard."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.common.lightning import TRAINER
from benchmarks.common.modules import meta_problem
from benchmarks.guard_bench_2.families import (
    BY_HAND,
    FAMILIES,
    OURS,
    Family,
    State,
    alpha_of,
    as_given,
    batch,
    constant_loss,
    evaluate,
    make_module,
    scaled,
    set_alpha,
    spoiled,
)
from benchmarks.guard_bench_2.fates import stride
from benchmarks.guard_bench_2.scenarios import ALPHA, FACTORS, GAIN, SCENARIOS, Scenario
from lightning_maml_guard import ConvergenceGuard

UNGUARDED, CLIP, SKIP = "unguarded", "clip 1", "stabilityguard skip"
NEVER_RETURNS = 10  # steps that an unguarded run goes on after a loss that is not finite


@dataclass(frozen=True)
class Setting:
    """What a run is made of.

    Attributes:
        family: One of FAMILIES.
        scenario: One of SCENARIOS, or of FACTORS: the base at a multiple of its outer rate.
        seed: Seed of the weights and the data.
        steps: Steps of the run.
        drifts: For a reference of a column that drifts: the inputs drift, too.
    """

    family: str
    scenario: str
    seed: int
    steps: int = 300
    drifts: bool = False

    @property
    def name(self) -> str:
        """A name to find the run by."""
        return f"{self.family}: {self.scenario} ({self.steps} steps, seed {self.seed})"

    @property
    def key(self) -> str:
        """What the run depends on."""
        return f"{self!r} {FAMILIES[self.family]!r} {torch.__version__}"

    @property
    def what(self) -> Scenario:
        """Its scenario."""
        return SCENARIOS.get(self.scenario, SCENARIOS["steady"])

    def factor(self, step: int) -> float:
        """Factor of the outer rate."""
        course, family = self.what.course, FAMILIES[self.family]
        if self.scenario in FACTORS:
            return FACTORS[self.scenario]
        if course is None or self.what.cause == ALPHA or self.what.strength == GAIN:
            return 1.0
        return course(step / self.steps, family.rate)

    def alpha(self, step: int) -> float:
        """The inner rate."""
        family, course = FAMILIES[self.family], self.what.course
        high = self.what.cause == ALPHA and course is not None
        return family.alpha * (course(step / self.steps, family.inner) if high and course is not None else 1.0)

    def gain(self, step: int) -> float:
        """Factor of the inputs."""
        if not (self.drifts or self.what.strength == GAIN):
            return 1.0
        course = SCENARIOS["drift"].course
        assert course is not None
        return course(step / self.steps, FAMILIES[self.family].gain)

    def batch(self, step: int) -> Any:
        """The batch of a step."""
        family = FAMILIES[self.family]
        given = scaled(batch(family, self.seed, "train", step), self.gain(step))
        return spoiled(family, given) if step in {int(share * self.steps) for share in self.what.outliers} else given


@lru_cache(8)
def _judged(family: str, seed: int) -> Any:
    return batch(FAMILIES[family], seed, "val", 0)


class _Recorder(pl.Callback):
    """Sets what the scenario sets by hand and keeps what a run did; its own CPU time is not the run's."""

    def __init__(self, setting: Setting, module: Any, every: int, *, whole: bool) -> None:
        self.setting, self.module, self.every, self.whole = setting, module, every, whole
        self.family: Family = FAMILIES[setting.family]
        self.losses: list[float] = []
        self.states: list[State] = []
        self.norms: list[list[float]] = []
        self.sizes: list[list[float]] = []
        self.rates: list[float] = []
        self.seconds, self.bad = 0.0, 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds += time.process_time() - began

    def keep(self, step: int) -> None:
        """Keep the state of the run, to be evaluated after it."""
        net = self.module.network if self.family.module == OURS else self.module.net
        params = {name: p.detach().clone() for name, p in net.named_parameters()}
        self.states.append(State(params, alpha_of(self.module), self.setting.gain(step)))

    def evaluations(self) -> list[tuple[float, float]]:
        """The losses before and after adaptation at the states that were kept."""
        net = self.module.network if self.family.module == OURS else self.module.net
        return evaluate(net, self.family, self.states, _judged(self.setting.family, self.setting.seed))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with self.timed():
            set_alpha(self.module, self.setting.alpha(batch_idx))
            if self.setting.what.by_hand:
                for group in trainer.optimizers[0].param_groups:
                    group["lr"] = FAMILIES[self.setting.family].beta * self.setting.factor(batch_idx)
            if batch_idx % self.every == 0:
                self.keep(batch_idx)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.whole:
            with self.timed():
                params = [p for p in pl_module.parameters() if p.grad is not None]
                self.norms.append(torch.stack([p.grad.norm() for p in params]).tolist())
                self.sizes.append(torch.stack([p.detach().norm() for p in params]).tolist())
                self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self.timed():
            self.losses.append(float(outputs["loss"]))
            self.bad += not math.isfinite(self.losses[-1])
            if self.whole and self.bad > NEVER_RETURNS:
                trainer.should_stop = True


class _Skips(pl.Callback):
    """StabilityGuard's rule and its action ``"skip"``: its optimizer does not take part in Lightning's closures."""

    def __init__(self) -> None:
        from stabilityguard.core.spike_detector import SpikeDetector

        self.detector = SpikeDetector()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        bad = {name for name, grad in grads.items() if not torch.isfinite(grad).all()}
        if self.detector.check({name: float(grad.norm()) for name, grad in grads.items()}, bad)[0]:
            for p in pl_module.parameters():
                p.grad = None


class _Listener(pl.Callback):
    """Keeps the guard's messages with their steps, and its severity as it is logged; ``timed``: its time is no guard's."""

    def __init__(self, caught: list[Any], timed: Callable[[], AbstractContextManager[None]]) -> None:
        self.caught, self.read, self.timed = caught, 0, timed
        self.messages: list[tuple[int, str]] = []
        self.logged: list[tuple[int, float]] = []

    def _listen(self, step: int) -> None:
        new, self.read = self.caught[self.read :], len(self.caught)
        self.messages += [(step, str(w.message)) for w in new if "ConvergenceGuard" in str(w.message)]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._listen(batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self.timed():
            self._listen(batch_idx + 1)
            value = float(trainer.callback_metrics.get("guard/severity", math.nan))
            if math.isfinite(value) and (not self.logged or value != self.logged[-1][1]):
                self.logged.append((batch_idx, value))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._listen(trainer.global_step)


def train(
    setting: Setting, remedy: str = UNGUARDED, guard: dict[str, Any] | None = None, *, capped: bool = False
) -> dict[str, Any]:
    """Train a run.

    Args:
        setting: What it is made of.
        remedy: UNGUARDED, CLIP or SKIP.
        guard: Arguments of a guard; None: without one.
        capped: A module written by hand has the attribute ``inner_lr_cap``.

    Returns:
        Plain data. ``start``: loss that training starts from; ``after``: losses after adaptation on the validation
        tasks, at every step without a guard and a remedy, else at every ``stride``; ``before``: before adaptation;
        ``losses``, ``norms``, ``sizes`` and ``rates`` of the steps; ``seconds`` of CPU. Under a guard what it said.
    """
    family, steps = FAMILIES[setting.family], setting.steps
    factor = None if setting.what.by_hand else setting.factor
    constant = setting.scenario == "steady" or all(factor is None or factor(at) == 1 for at in (0, steps // 2))
    module = make_module(
        setting.family,
        setting.seed,
        alpha=setting.alpha(0),
        beta=family.beta * (1.0 if factor is None or not constant else factor(0)),
        schedule="" if factor is None or constant else _Factors([factor(at) for at in range(steps + 1)]),
        steps=steps,
        capped=capped,
    )
    whole = guard is None and remedy == UNGUARDED
    recorder = _Recorder(setting, module, 1 if whole else stride(steps), whole=whole)
    set_alpha(module, family.alpha)
    recorder.keep(0)  # with the base's inner rate: where the column starts from
    batches = [as_given(family, setting.batch(step)) for step in range(steps)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks: list[pl.Callback] = [recorder]
        watching = None
        if remedy == SKIP:
            callbacks.append(_Skips())
        if guard is not None:
            stated = {"problem": meta_problem} if family.module == BY_HAND else {}
            watching, listener = ConvergenceGuard(**stated, **guard), _Listener(caught, recorder.timed)
            callbacks += [watching, listener]
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=callbacks,
            gradient_clip_val=1.0 if remedy == CLIP else None,
            num_sanity_val_steps=0,
            **TRAINER,
        )
        loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        began = time.process_time()
        trainer.fit(module, loader)
        seconds = time.process_time() - began - recorder.seconds
    recorder.keep(steps)
    first, *found = recorder.evaluations()
    judged = _judged(setting.family, setting.seed)
    start = min(*(each for each in first if math.isfinite(each)), constant_loss(family, judged))
    found += [(math.inf, math.inf)] * (-(-steps // recorder.every) + 1 - len(found))  # it was ended early
    result: dict[str, Any] = {
        "start": start,
        "before": [each[0] for each in found],
        "after": [each[1] for each in found],
        "seconds": seconds,
    }
    if whole:
        result |= {"losses": recorder.losses, "norms": recorder.norms, "sizes": recorder.sizes, "rates": recorder.rates}
    if watching is not None:
        result |= _said(watching, listener)
    return result


class _Factors:
    """Factors by step, as a function that can be copied."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __call__(self, step: int) -> float:
        return self.values[min(step, len(self.values) - 1)]


def _said(guard: ConvergenceGuard, listener: _Listener) -> dict[str, Any]:
    checks = [
        {
            "step": report.step,
            "status": report.status,
            "severity": report.severity,
            "ratio": [report.alpha_ratio, report.beta_ratio],
            "cause": None if report.advice is None else str(report.advice.cause.value),
            "evidence": [] if report.advice is None else [each.kind.name for each in report.advice.evidence],
            "applied": [report.alpha_applied, report.beta_applied],
        }
        for report in guard.history
    ]
    events = [
        {"step": each.step, "kind": each.kind, "reasons": [(r.kind.name, r.steps) for r in each.reasons]}
        for each in guard.events
    ]
    return {
        "checks": checks,
        "events": events,
        "severities": [list(each) for each in guard.severities],
        "logged": listener.logged,
        "messages": listener.messages,
        "stopped": guard.stopped_step,
        "work": guard._run.schedule.state.spent,
    }
