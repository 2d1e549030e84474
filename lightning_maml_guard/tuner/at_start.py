"""What is measured where a run would begin, and which rates that suggests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.guard.isolation import isolated
from lightning_maml_guard.guard.messages import tried
from lightning_maml_guard.guard.probe import Attempts, Problem, attempts, owners, state_problem
from lightning_maml_guard.guard.rescale import Caps
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.shadow import ClosureError
from lightning_maml_guard.stability.hvp import Memory
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import UNSAFE, Watch, advance, fails, severity
from lightning_maml_guard.tuner.suggestion import RateSuggestion
from lightning_maml_guard.utils.lightning_compat import Callback

_HALVINGS = 10


class AtStart(Callback):
    """Measures where training would begin, and lets it end there.

    Args:
        draw: Draws the batches to measure, given the Trainer.
        problem: See :func:`~lightning_maml_guard.suggest_rates`.
        options: How to measure; see :func:`~lightning_maml_guard.measure`.
        margin: Fraction of the critical values to suggest.
        trial_steps: Steps a trial takes.
        alarm: Factor over the loss at the start that counts as dying.

    Attributes:
        found: The suggestion; None as long as there was no batch.
    """

    def __init__(
        self,
        draw: Callable[[Any], Iterator[Any]],
        problem: Callable[[Any, Any], MetaProblem] | None,
        options: dict[str, Any],
        *,
        margin: float,
        trial_steps: int,
        alarm: float,
    ) -> None:
        super().__init__()
        self.draw, self.problem, self.options, self.margin = draw, problem, options, margin
        self.trial_steps, self.alarm = trial_steps, alarm
        self.found: RateSuggestion | None = None
        self.memory = Memory()
        self.resampled = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure.

        Args:
            trainer: The Trainer.
            pl_module: The copy of the module.

        Raises:
            ValueError: If there is no optimizer.
        """
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
            self.resampled = len(problems) < 2 or not _same(problems[0], problems[1])
            owned = owners(problems[0], optimizers)
            optimizer = max((optimizers[index] for index in owned), key=scheduled_rate)
            self.found = self._suggest(problems, optimizer, trainer)

    def _suggest(self, problems: Sequence[Problem], optimizer: Optimizer, trainer: Any) -> RateSuggestion:
        reports = self._measured(problems, optimizer)
        judged = max(reports, key=_ratio)
        attempt, notes = self._attempts(problems, optimizer, trainer)
        status, reasons = judged.status, judged.reasons
        if attempt is not None:
            present, reference, severe = attempt.judged(Caps(), math.nan, self.alarm)
            status = advance(Watch(), judged.status, severe, alarm=self.alarm).state
            if fails(severe, self.alarm):
                reasons = (*reasons, tried(present, reference, judged.alpha, judged.beta, judged.status == UNSAFE))
        alpha_c = _smallest(report.alpha_c for report in reports)
        alpha = self._alpha(judged.alpha, alpha_c, notes)
        at = reports
        if alpha != judged.alpha and not math.isnan(alpha):
            at = self._measured([_at(problem, alpha) for problem in problems], optimizer)
        beta_c = _smallest(report.beta_c for report in at)
        noise = _smallest(report.beta_c_noise for report in at) if self.resampled else math.nan
        limit = _smallest((beta_c, noise)) if not math.isnan(beta_c) else math.nan
        beta = self.margin * limit if 0 < limit < math.inf else math.nan
        if math.isnan(beta):
            notes += list(dict.fromkeys(_why_no_beta(report) for report in at))
        trial = (math.nan, math.nan)
        if attempt is not None:
            beta, trial = self._tried(attempt, alpha, beta, notes)
        return RateSuggestion(
            alpha=alpha,
            beta=beta,
            alpha_c=alpha_c,
            beta_c=beta_c,
            beta_c_noise=noise,
            configured_alpha=judged.alpha,
            configured_beta=judged.beta,
            status=status,
            reasons=reasons,
            margin=self.margin,
            notes=tuple(notes),
            reports=tuple(reports),
            suggested_reports=tuple(at),
            trial=trial,
            trial_steps=self.trial_steps,
        )

    def _measured(self, problems: Sequence[Problem], optimizer: Optimizer) -> list[StabilityReport]:
        found = [measure(each, optimizer=optimizer, memory=self.memory, **self.options) for each in problems]
        return [replace(report, step=index) for index, report in enumerate(found)]

    def _attempts(
        self, problems: Sequence[Problem], optimizer: Optimizer, trainer: Any
    ) -> tuple[Attempts | None, list[str]]:
        if not self.trial_steps:
            return None, []
        try:
            return attempts(problems, optimizer, self.trial_steps, trainer, self.memory), []
        except ClosureError as error:
            return None, [f"The coming steps cannot be tried. {error}"]

    def _alpha(self, configured: float, alpha_c: float, notes: list[str]) -> float:
        if math.isnan(configured) or 0 < alpha_c < math.inf:
            return self.margin * alpha_c
        notes.append("No finite alpha_c was measured, so the configured inner rate stays.")
        return configured

    def _tried(
        self, attempt: Attempts, alpha: float, beta: float, notes: list[str]
    ) -> tuple[float, tuple[float, float]]:
        inner = alpha / attempt.alpha if attempt.alpha > 0 else 1.0
        given = attempt.beta if math.isnan(beta) else beta
        tries = 1 if math.isnan(beta) else _HALVINGS
        for halved in range(tries):
            trial = attempt.runner.run(inner, given * 0.5**halved / attempt.beta if attempt.beta > 0 else 1.0)
            if not fails(severity(trial.end, trial.begin), self.alarm):
                break
        else:
            if not math.isnan(beta):
                notes.append(f"No beta from {beta:.3g} down to {beta * 0.5**halved:.3g} survives the coming steps.")
            return math.nan, (trial.begin, trial.end)
        if halved:
            notes.append(
                f"beta = {beta:.3g}, {self.margin:g} of its critical value, does not survive the coming steps: it was "
                f"halved {halved} times."
            )
        return beta * 0.5**halved, (trial.begin, trial.end)


def _smallest(limits: Any) -> float:
    known = [limit for limit in limits if not math.isnan(limit)]
    return min(known) if known else math.nan


def _same(one: Problem, other: Problem) -> bool:
    """Whether two batches hold the same tasks, as they do where tasks are not resampled."""
    if not isinstance(one, MetaProblem) or not isinstance(other, MetaProblem):
        return False
    pairs = zip(tree_leaves((one.support, one.query)), tree_leaves((other.support, other.query)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _ratio(report: StabilityReport) -> float:
    return max(ratio if not math.isnan(ratio) else -1.0 for ratio in (report.alpha_ratio, report.beta_ratio))


def _at(problem: Problem, alpha: float) -> Problem:
    if not isinstance(problem, MetaProblem):
        return problem
    if not isinstance(problem.inner_lr, dict):
        return replace(problem, inner_lr=alpha)
    return problem.at_factor(alpha / problem.alpha if problem.alpha > 0 else 1.0)


def _why_no_beta(report: StabilityReport) -> str:
    if report.beta_c == 0:
        return "No meta rate is suggested: none is stable at this inner rate."
    if report.beta_c == math.inf:
        return "No meta rate is suggested: no curvature limits it."
    why = [reason for reason in report.reasons if reason.startswith("beta ")] or [*report.reasons, "it is not known."]
    return f"No meta rate is suggested: {why[0].removeprefix('beta is not judged: ')}"
