"""What is measured where a run would start, and which rates that suggests."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.guard.state_machine import Watch, advance
from lightning_maml_guard.lookahead.divergence import Scale, fails
from lightning_maml_guard.lookahead.learning import lookahead_reason
from lightning_maml_guard.lookahead.lookahead import Caps, LookaheadOptions, lookahead_of
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.optim.clipping import run_clipping
from lightning_maml_guard.optim.rates_ahead import read_ahead
from lightning_maml_guard.optim.shadow import BY_ENTRY, ClosureError
from lightning_maml_guard.optim.stability_limits import climbs, listed
from lightning_maml_guard.phase.ladder import RateLadder
from lightning_maml_guard.stability.hvp import MeasurementCache
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.stability.options import CurvatureOptions
from lightning_maml_guard.stability.problems import (
    Problem,
    ProblemSource,
    accumulated,
    at_alpha,
    first_batch,
    owners,
    state_problem,
)
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.tuner.ladder import LadderOptions
from lightning_maml_guard.tuner.rungs import RunGradients
from lightning_maml_guard.tuner.search import UNITS, LadderSearch
from lightning_maml_guard.tuner.suggestion import RateSuggestion
from lightning_maml_guard.utils.isolation import isolated
from lightning_maml_guard.utils.lightning_compat import plan_of

# Batches that are set aside to judge on where a loader has too few for every rung's steps, and those it needs for that.
_HELD, _ENOUGH_TO_HOLD = 4, 8
# Batches of such a loader that are kept, and gone through again and again.
_KEPT = 64
# Share of the loss before training by which it falls where training has begun; below it rates are hard to tell apart.
_LITTLE = 0.1
# Factor within which an inner rate of the ladder gives way to the configured one.
_NEAR = 1.3


@dataclass(frozen=True)
class Finder:
    """Finds rates where a training would start.

    Args:
        draw: From a Trainer to its training batches, without end, on its device.
        problem: States a batch's problem; None for the module's own way.
        curvature: How to measure.
        lookahead: How the configured rates are judged.
        ladder: How rates are tried.
        margin: Share of the largest outer rate that trains above which none is suggested.
        batches: Optimizer steps to measure.
    """

    draw: Callable[[Any], Iterator[Any]]
    problem: ProblemSource | None
    curvature: CurvatureOptions
    lookahead: LookaheadOptions
    ladder: LadderOptions
    margin: float
    batches: int

    def find(self, trainer: Any, pl_module: Any) -> RateSuggestion | None:
        """Measure and try; None if there is no batch. Raises a ValueError if there is no optimizer."""
        began = time.perf_counter()
        optimizers = [each for each in trainer.optimizers if any(group["params"] for group in each.param_groups)]
        if not optimizers:
            raise ValueError(
                f"Expected configure_optimizers of {type(pl_module).__name__} to return an optimizer but got none: "
                "there is no rate to judge. Return one, such as torch.optim.SGD(self.parameters(), lr=0.1)."
            )
        ahead = read_ahead(plan_of(trainer), optimizers, 0)
        with isolated(pl_module), _at_the_peak(optimizers, ahead.setting):
            torch.manual_seed(0)
            drawn = self._problems(trainer, pl_module)
            steps = trainer.num_training_batches / trainer.accumulate_grad_batches
            problems = list(itertools.islice(drawn, math.ceil(min(self.batches, steps))))
            if not problems:
                return None
            owned = [optimizers[index] for index in owners(problems[0], optimizers)]
            found = _Suggesting(self, problems, drawn, owned, trainer).suggest()
        return replace(found, setting=ahead.setting, seconds=time.perf_counter() - began)

    def _problems(self, trainer: Any, pl_module: Any) -> Iterator[Problem]:
        """State the problem of every optimizer step: one batch, or those that the run accumulates."""
        stated = (state_problem(self.problem, pl_module, batch, i) for i, batch in enumerate(self.draw(trainer)))
        while parts := list(itertools.islice(stated, trainer.accumulate_grad_batches)):
            yield accumulated(parts)


@contextmanager
def _at_the_peak(optimizers: Sequence[Optimizer], setting: str) -> Iterator[None]:
    """Set the rates to which a schedule goes: one that warms up has put its first, low rate there already."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    kept = [group["lr"] for group in groups]
    try:
        for group in groups:
            group["lr"] = group.get("max_lr" if setting == "max_lr" else "initial_lr", group["lr"])
        yield
    finally:
        for group, rate in zip(groups, kept, strict=True):
            group["lr"] = rate


class _Suggesting:
    """One search for rates."""

    def __init__(
        self,
        finder: Finder,
        problems: list[Problem],
        drawn: Iterator[Problem],
        optimizers: list[Optimizer],
        trainer: Any,
    ) -> None:
        self._finder, self._problems, self._drawn = finder, problems, drawn
        self._optimizers, self._trainer = optimizers, trainer
        self._cache = MeasurementCache()
        self._resampled = len(problems) < 2 or not _same(problems[0], problems[1])
        self._notes: list[Reason] = []

    def suggest(self) -> RateSuggestion:
        reports = self._measured(self._problems)
        judged = max(reports, key=_ratio)
        status, findings = self._judged(judged)
        ladder = self._climbed(judged, reports)
        alpha, beta, losses = judged.alpha, math.nan, (math.nan, math.nan)
        if ladder is not None:
            best = ladder.best
            if best is None:
                self._notes.append(Reason(Kind.NO_RATE_TRAINS, steps=ladder.race_steps or ladder.steps))
            else:
                alpha, beta = float(ladder.alphas[best]), float(ladder.suggested[best])
                losses = (float(ladder.start[best]), float(ladder.raced[best]))
                if losses[0] - losses[1] < _LITTLE * abs(losses[0]):
                    said = (*losses, math.nan)
                    self._notes.append(Reason(Kind.LITTLE_LEARNED, steps=ladder.race_steps, losses=said))
        at = reports
        if alpha != judged.alpha and not math.isnan(alpha):
            at = self._measured([at_alpha(problem, alpha) for problem in self._problems])
        noise = _smallest(report.beta_c_noise for report in at) if self._resampled else math.nan
        return RateSuggestion(
            alpha=alpha,
            beta=beta,
            alpha_c=_smallest(report.alpha_c for report in reports),
            beta_c=_smallest(report.beta_c for report in at),
            beta_c_noise=noise,
            configured_alpha=judged.alpha,
            configured_beta=judged.beta,
            status=status,
            findings=findings,
            margin=self._finder.margin,
            notes=tuple(self._notes),
            reports=tuple(reports),
            suggested_reports=tuple(at),
            ladder=ladder,
            losses=losses,
        )

    def _measured(self, problems: Sequence[Problem]) -> list[StabilityReport]:
        curvature, cache = self._finder.curvature, self._cache
        found = [measure(each, optimizer=self._optimizers, curvature=curvature, cache=cache) for each in problems]
        return [replace(report, step=index) for index, report in enumerate(found)]

    def _judged(self, judged: StabilityReport) -> tuple[str, tuple[Reason, ...]]:
        """The status of the configured rates, with a lookahead as a guard makes it, and why."""
        options = self._finder.lookahead
        if not options.steps:
            return judged.status, judged.findings
        try:
            lookahead = lookahead_of(self._problems, self._optimizers, options.steps, self._trainer, self._cache)
            present, scale, severe = lookahead.judged(Caps(), Scale(), options.divergence_ratio)
        except ClosureError as error:
            self._notes.append(Reason(Kind.NO_LOOKAHEAD, effect="before training", detail=str(error)))
            return judged.status, judged.findings
        ratio = options.divergence_ratio
        status = advance(Watch(), judged.status, severe, ratio=ratio).state
        if not fails(severe, ratio):
            return status, judged.findings
        return status, (*judged.findings, lookahead_reason(present, scale.start, judged.alpha, judged.beta))

    def _climbed(self, judged: StabilityReport, reports: Sequence[StabilityReport]) -> RateLadder | None:
        """Try rates; None, with a note, where that cannot be done."""
        options = self._finder.ladder
        unknown = next((each for each in listed(self._optimizers) if type(each) not in BY_ENTRY), None)
        if not options.steps:
            detail = "LadderOptions has steps=0"
        elif any(map(climbs, self._optimizers)):
            detail = "the optimizer climbs the loss (maximize=True); return the negated loss, and leave maximize out"
        elif unknown is not None:
            detail = f"{type(unknown).__name__} cannot step several runs together, each at its own rate"
        elif not 0 < judged.beta < math.inf:
            detail = f"the configured outer rate is {judged.beta:g}, so the groups' proportions are not known"
        else:
            clip, hook, seen = run_clipping(self._trainer)
            if not seen:
                self._notes.append(Reason(Kind.CLIPPING_NOT_SEEN))
            alphas = options.alphas or _alphas(judged.alpha, reports, first_batch(self._problems[0]))
            run_gradients = RunGradients(self._cache.map_of(self._problems[0]))
            return LadderSearch(
                *self._stream(), self._optimizers, alphas, options, self._finder.margin, run_gradients, clip, hook
            ).find()
        self._notes.append(Reason(Kind.NO_BETA_SUGGESTED, effect="not tried", detail=detail))
        return None

    def _stream(self) -> tuple[Iterator[Problem], list[Problem], bool]:
        """The problems to train on, those set aside to judge on, and whether every one is new."""
        count = self._trainer.num_training_batches / self._trainer.accumulate_grad_batches
        ladder = self._finder.ladder
        if not self._resampled:
            return itertools.cycle(self._problems[:1]), [], False
        if count >= self._finder.batches + ladder.steps + ladder.longest + 1:
            return self._drawn, [], True
        kept = [*self._problems, *itertools.islice(self._drawn, max(min(int(count), _KEPT) - len(self._problems), 0))]
        if len(kept) < _ENOUGH_TO_HOLD:
            return itertools.cycle(kept), [], False
        return itertools.cycle(kept[_HELD:]), kept[:_HELD], False


def _alphas(configured: float, reports: Sequence[StabilityReport], problem: Problem) -> list[float]:
    """The inner rates to try: some around what the curvature says, and the configured one."""
    if math.isnan(configured):
        return [math.nan]
    sharpest = [report.lambda_max for report in reports if 0 < report.lambda_max < math.inf]
    plain = isinstance(problem, MetaProblem) and problem.inner_update is None
    unit = 1 / median(sharpest) if sharpest and plain else (configured or 1.0) / UNITS[len(UNITS) // 2]
    others = [unit * factor for factor in UNITS]
    if not configured > 0:
        return others
    return [configured, *(each for each in others if not 1 / _NEAR < each / configured < _NEAR)]


def _smallest(limits: Any) -> float:
    known = [limit for limit in limits if not math.isnan(limit)]
    return min(known) if known else math.nan


def _same(one: Problem, other: Problem) -> bool:
    """Whether two batches hold the same tasks, as they do where tasks are not resampled."""
    if not isinstance(one, MetaProblem) or not isinstance(other, MetaProblem):
        return False
    own, others = (tree_leaves((each.support, each.query)) for each in (one, other))
    return len(own) == len(others) and all(
        torch.equal(_comparable(a), _comparable(b)) for a, b in zip(own, others, strict=True)
    )


def _comparable(values: Tensor) -> Tensor:
    """Return 8-bit floats, which torch does not compare, as the integers of the same bits."""
    return values.view(torch.uint8) if values.is_floating_point() and values.element_size() == 1 else values


def _ratio(report: StabilityReport) -> float:
    return max(ratio if not math.isnan(ratio) else -1.0 for ratio in (report.alpha_ratio, report.beta_ratio))
