"""What is measured where a run would start, and which rates that suggests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.guard.state_machine import Watch, advance
from lightning_maml_guard.lookahead.divergence import Scale, fails
from lightning_maml_guard.lookahead.lookahead import Caps, Lookahead, LookaheadOptions, lookahead_of, lookahead_reason
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.optim.shadow import ClosureError
from lightning_maml_guard.stability.hvp import MeasurementCache
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.stability.options import CurvatureOptions
from lightning_maml_guard.stability.problems import Problem, ProblemSource, owners, state_problem
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.tuner.suggestion import RateSuggestion
from lightning_maml_guard.utils.isolation import isolated
from lightning_maml_guard.utils.lightning_compat import Callback

_HALVINGS = 10


class MeasureAtStart(Callback):
    """Measures where training would start, and lets it end there.

    Attributes:
        found: The suggestion; None as long as there was no batch.
    """

    def __init__(
        self,
        draw: Callable[[Any], Iterator[Any]],
        problem: ProblemSource | None,
        curvature: CurvatureOptions,
        lookahead: LookaheadOptions,
        margin: float,
    ) -> None:
        super().__init__()
        self.draw, self.problem, self.margin = draw, problem, margin
        self.curvature, self.lookahead = curvature, lookahead
        self.found: RateSuggestion | None = None
        self._cache = MeasurementCache()
        self._resampled = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure. Raises a ValueError if there is no optimizer."""
        trainer.should_stop = True
        optimizers = [each for each in trainer.optimizers if any(group["params"] for group in each.param_groups)]
        kind = type(pl_module).__name__
        if not optimizers:
            raise ValueError(
                f"Expected configure_optimizers of {kind} to return an optimizer but got none: there is no rate to "
                "judge. Return one, such as torch.optim.SGD(self.parameters(), lr=0.1)."
            )
        for group in itertools.chain.from_iterable(each.param_groups for each in optimizers):
            # A scheduler that warms up has put its first, low rate there already.
            group["lr"] = group.get("initial_lr", group["lr"])
        with isolated(pl_module):
            problems = [state_problem(self.problem, pl_module, b, i) for i, b in enumerate(self.draw(trainer))]
            if not problems:
                return
            self._resampled = len(problems) < 2 or not _same(problems[0], problems[1])
            owned = owners(problems[0], optimizers)
            self.found = self._suggest(problems, [optimizers[index] for index in owned], trainer)

    def _suggest(self, problems: Sequence[Problem], optimizers: Sequence[Optimizer], trainer: Any) -> RateSuggestion:
        reports = self._measured(problems, optimizers)
        judged = max(reports, key=_ratio)
        lookahead, notes = self._lookahead(problems, optimizers, trainer)
        status, findings = judged.status, judged.findings
        ratio = self.lookahead.divergence_ratio
        if lookahead is not None:
            present, scale, severe = lookahead.judged(Caps(), Scale(), ratio)
            status = advance(Watch(), judged.status, severe, ratio=ratio).state
            if fails(severe, ratio):
                seen = lookahead_reason(present, scale.start, judged.alpha, judged.beta)
                findings = (*findings, seen)
        alpha_c = _smallest(report.alpha_c for report in reports)
        alpha = self._alpha(judged.alpha, alpha_c, notes)
        at = reports
        if alpha != judged.alpha and not math.isnan(alpha):
            at = self._measured([_at(problem, alpha) for problem in problems], optimizers)
        beta_c = _smallest(report.beta_c for report in at)
        noise = _smallest(report.beta_c_noise for report in at) if self._resampled else math.nan
        limit = _smallest((beta_c, noise)) if not math.isnan(beta_c) else math.nan
        beta = self.margin * limit if 0 < limit < math.inf else math.nan
        if math.isnan(beta):
            notes += list({reason.key: reason for reason in map(_no_beta, at)}.values())
        losses = (math.nan, math.nan)
        if lookahead is not None:
            beta, losses = self._tried(lookahead, alpha, beta, notes)
        return RateSuggestion(
            alpha=alpha,
            beta=beta,
            alpha_c=alpha_c,
            beta_c=beta_c,
            beta_c_noise=noise,
            configured_alpha=judged.alpha,
            configured_beta=judged.beta,
            status=status,
            findings=findings,
            margin=self.margin,
            notes=tuple(notes),
            reports=tuple(reports),
            suggested_reports=tuple(at),
            lookahead=losses,
            lookahead_steps=self.lookahead.steps,
        )

    def _measured(self, problems: Sequence[Problem], optimizers: Sequence[Optimizer]) -> list[StabilityReport]:
        found = [measure(each, optimizer=optimizers, curvature=self.curvature, cache=self._cache) for each in problems]
        return [replace(report, step=index) for index, report in enumerate(found)]

    def _lookahead(
        self, problems: Sequence[Problem], optimizers: Sequence[Optimizer], trainer: Any
    ) -> tuple[Lookahead | None, list[Reason]]:
        steps = self.lookahead.steps
        if not steps:
            return None, []
        try:
            return lookahead_of(problems, optimizers, steps, trainer, self._cache), []
        except ClosureError as error:
            return None, [Reason(Kind.NO_LOOKAHEAD, effect="before training", detail=str(error))]

    def _alpha(self, configured: float, alpha_c: float, notes: list[Reason]) -> float:
        if math.isnan(configured) or 0 < alpha_c < math.inf:
            return self.margin * alpha_c
        notes.append(Reason(Kind.NO_ALPHA_LIMIT))
        return configured

    def _tried(
        self, lookahead: Lookahead, alpha: float, beta: float, notes: list[Reason]
    ) -> tuple[float, tuple[float, float]]:
        """Halve ``beta`` until the loss survives the lookahead; returns it with the losses before and after."""
        inner = alpha / lookahead.alpha if lookahead.alpha > 0 else 1.0
        given = lookahead.beta if math.isnan(beta) else beta
        tries = 1 if math.isnan(beta) else _HALVINGS
        for halved in range(tries):
            factor = given * 0.5**halved / lookahead.beta if lookahead.beta > 0 else 1.0
            result = lookahead.run(inner, factor)
            severe = Scale().over(result.losses).severity(result.end)
            if not fails(severe, self.lookahead.divergence_ratio):
                break
        else:
            if not math.isnan(beta):
                notes.append(Reason(Kind.NO_BETA_SURVIVES, value=beta, beta=beta * 0.5**halved))
            return math.nan, (result.begin, result.end)
        if halved:
            notes.append(Reason(Kind.BETA_HALVED, beta=beta, margin=self.margin, steps=halved))
        return beta * 0.5**halved, (result.begin, result.end)


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


def _at(problem: Problem, alpha: float) -> Problem:
    if not isinstance(problem, MetaProblem):
        return problem
    if problem.uniform:
        return replace(problem, inner_lr=alpha)
    return problem.at_factor(alpha / problem.alpha if problem.alpha > 0 else 1.0)


def _no_beta(report: StabilityReport) -> Reason:
    """Why a report gives no meta rate."""
    if report.beta_c == 0:
        return Reason(Kind.NO_BETA_SUGGESTED, effect="none is stable", detail="none is stable")
    if report.beta_c == math.inf:
        return Reason(Kind.NO_BETA_SUGGESTED, effect="nothing limits it", detail="nothing limits it")
    because = next((each for each in report.findings if each.rate == "beta"), next(iter(report.findings), None))
    key = "" if because is None else because.key
    return Reason(Kind.NO_BETA_SUGGESTED, because=because, detail=key)
