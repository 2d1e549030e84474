"""What a check found: the next steps, the curvature, and what both say of the rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning_maml_guard.guard.actions import Situation
from lightning_maml_guard.guard.advising import Adviser
from lightning_maml_guard.guard.look import Look, advised_rates, may_try
from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.guard.state_machine import Transition
from lightning_maml_guard.lookahead.divergence import fails, undecided_severity
from lightning_maml_guard.lookahead.learning import Learning, last_loss_reason, lookahead_reason
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.lookahead.results import SearchResult
from lightning_maml_guard.messages.advice import Advice
from lightning_maml_guard.messages.reasons import Kind, Reason, of_check
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.rates_ahead import to_configure
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.stability.problems import PlainProblem, Problem, alpha_of, learns_rates
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import UNSAFE
from lightning_maml_guard.utils.warnings import GuardWarning

# Learned inner rates have moved far if the largest is this many times what it was, or has fallen as much.
_MOVED = 1.5


@dataclass(frozen=True)
class Outlook:
    """What looking ahead told of a run, before any curvature is measured.

    Attributes:
        look: The next steps, adaptation and the schedule.
        adviser: Tries other rates.
        caps: The caps under which the next steps were tried.
        learning: The run compared with its snapshots; None if its loss is near its best.
        collapse: How the run lost what it had learned; None if it did not.
        diverges_ahead: Whether the next steps diverge.
        has_diverged: Whether the run has diverged or collapsed already.
        has_left_learned: Whether it has, or its parameters are no longer intact (``Look.is_intact``).
    """

    look: Look
    adviser: Adviser
    caps: Caps
    learning: Learning | None
    collapse: Reason | None
    diverges_ahead: bool
    has_diverged: bool
    has_left_learned: bool

    @property
    def has_lost_half(self) -> bool:
        """Whether half of what was learned is lost, if only for some steps."""
        return self.learning is not None and self.learning.has_lost_half


@dataclass(frozen=True)
class Judgement:
    """What a check found.

    Attributes:
        report: The curvature, as measured.
        measured: Whether it could be measured.
        findings: What is wrong.
        failing: Whether the run diverges, or learns clearly less than at lower rates.
        severity: The severity that decided the state.
        further: Whether only more steps than those of a lookahead showed it.
        transition: What the check changed.
        advice: What to set; None where there is nothing new to say.
    """

    report: StabilityReport
    measured: bool
    findings: tuple[Reason, ...]
    failing: bool
    severity: float
    further: bool
    transition: Transition
    advice: Advice | None


def judge(run: GuardedRun, outlook: Outlook, step: int) -> Judgement:
    """Measure the curvature, find what is wrong, advance the state of the run, and advise."""
    look, ratio, failing = outlook.look, run.settings.lookahead.divergence_ratio, outlook.diverges_ahead
    report, measured = _measured(run, look, step)
    findings = (*report.findings, *look.findings, *([] if outlook.collapse is None else [outlook.collapse]))
    further = None if failing or run.state.history else outlook.adviser.look_further(report)
    judged = look.severity
    if further is not None:
        # A run that diverges only after more steps is no more severe than one that just fails the lookahead.
        failing, longer = True, min(look.scale.severity(further.present.end), math.log(ratio))
        look.severity = max(look.severity, longer)
        run.note_severity(step, look.severity, look.beta)
        # Rates at which a run learns clearly less than at lower ones are judged as those at which it diverges.
        judged = max(look.severity, math.log(ratio))
    if failing and report.status != UNSAFE and look.may_miss_clipping(ratio):
        _tell_of_clipping(run, outlook, report, findings, further, step)
        failing, judged = False, undecided_severity(ratio)
    last_diverged = look.last_loss is not None and look.scale.diverged(look.last_loss, ratio)
    if last_diverged:  # limits measured where a run has diverged blame the wrong rate
        known = next((each.advice for each in reversed(run.state.history) if each.advice is not None), None)
        report, findings = replace(report, advice=known), look.findings
    if look.last_loss is not None and (last_diverged or report.status != UNSAFE):  # else the curvature decides
        judged = look.scale.severity(look.last_loss)
        run.note_severity(step, judged, report.beta)
        failing = fails(judged, ratio)
        if failing:
            run.schedule.confirm_divergence()
            findings = (*findings, last_loss_reason(look.last_loss, look.scale))
    if failing and look.present is not None and further is None and outlook.collapse is None:
        tried = outlook.caps.applied(report.alpha, report.beta)
        findings = (*findings, lookahead_reason(look.present, look.scale.start, *tried))
    transition = run.machine.take(report, judged)
    advice = outlook.adviser.advise(report, findings, transition, further)
    if advice is not None:
        run.state.advice = advice = _with_mismatch(_with_moved_rates(advice, look, report, run.state.history), run)
    return Judgement(report, measured, findings, failing, judged, further is not None, transition, advice)


def _with_mismatch(advice: Advice, run: GuardedRun) -> Advice:
    """Add that the problem is not what training trains, where that was said."""
    reason = Reason(Kind.PROBLEM_DIFFERS, effect="evidence")
    told = any(each.startswith(f"{reason.kind.value}|") for each in run.state.announced)
    return replace(advice, evidence=(*advice.evidence, reason)) if told and reason not in advice.evidence else advice


def _with_moved_rates(
    advice: Advice, look: Look, report: StabilityReport, history: Sequence[StabilityReport]
) -> Advice:
    """Add that training has moved the inner rates that it learns, where no lower outer rate is advised anyway."""
    first = next((each for each in history if each.alpha > 0), report)
    moved = not first.alpha / _MOVED < report.alpha < _MOVED * first.alpha
    if advice.beta is not None or not (moved and learns_rates(look.problem)):
        return advice
    reason = Reason(Kind.RATES_MOVED, value=report.alpha, limit=first.alpha, steps=first.step or 0)
    return replace(advice, evidence=(*(each for each in advice.evidence if each.kind is not reason.kind), reason))


def _tell_of_clipping(
    run: GuardedRun,
    outlook: Outlook,
    report: StabilityReport,
    findings: tuple[Reason, ...],
    further: SearchResult | None,
    step: int,
) -> None:
    """Say once what to set if a training step clips nothing by itself, as steps tried on copies do not."""
    told = Reason(Kind.CLIPPING_NOT_SEEN, step=step)
    if told.key not in run.state.announced and run.settings.acting.speaks:
        found = outlook.adviser.search_advice(report, findings, further, None)
        rates = {"alpha": found.alpha, "beta": found.beta}
        given: dict[str, Any] = {name: rate for name, rate in rates.items() if rate is not None}
        told = replace(told, effect=found.setting, **given)
    run.announce(told)


def situation_of(
    run: GuardedRun, outlook: Outlook, found: Judgement, step: int, *, reach_alpha: bool, rolled_back: bool
) -> Situation:
    """Put together what an action decides on."""
    look, report, advice = outlook.look, found.report, found.advice
    # Once a run has learned, trials favour rates that are too low for the rest of it.
    follows_advice = advice is not None and math.isnan(look.scale.best)
    if advice is not None and follows_advice:
        _take_advised_beta(run, advice, look.problem)
    # If only more steps diverge and the inner rate is to blame, capping the outer rate does not help.
    out_of_reach = found.further and advice is not None and advice.alpha is not None and not reach_alpha
    return Situation(
        report=report,
        transition=found.transition,
        caps=run.caps.caps,
        margin=run.settings.margin,
        reach_alpha=reach_alpha,
        fails=found.failing and not out_of_reach,
        rolled_back=rolled_back,
        present=look.present,
        lookahead=look.lookahead,
        scale=look.scale,
        harmful=look.stays_harmful,
        advised=advised_rates(run, look.problem),
        follows_advice=follows_advice,
        has_diverged=outlook.has_diverged,
        allows=partial(may_try, run, alpha=report.alpha, beta=report.beta, step=step),
    )


def _take_advised_beta(run: GuardedRun, advice: Advice, problem: Problem) -> None:
    """Keep the outer rate that is advised: from now on, a higher one has to take the loss further down.

    Advice is for a whole run without a guard. A guard can lower the rate later, so MAML may begin at the rate whose
    trial ended lowest, unless the schedule rises. Plain training may not: its trials memorise their few batches.
    """
    if advice.beta is None:
        return
    peak, ahead = advice.configured_beta, run.ahead
    rate = advice.beta * peak / to_configure(ahead, peak)
    if (ahead is None or not ahead.rises) and not isinstance(problem, PlainProblem):
        rate = max([rate, *(each.beta for each in advice.evidence if each.kind is Kind.RATES_TRIED)])
    run.state.ceiling = run.state.ceiling.with_advised(rate, advice.step or 0)


def _measured(run: GuardedRun, look: Look, step: int) -> tuple[StabilityReport, bool]:
    """Measure the curvature; where that fails and the next steps were tried, they alone decide."""
    curvature, margin = run.settings.curvature, run.settings.margin
    run.cache.checks = look.is_intact and not look.harmful
    try:
        with run.cache.ranks.fail_together():
            report = measure(
                look.problem,
                optimizer=look.optimizers,
                curvature=curvature,
                margin=margin,
                step=step,
                cache=run.cache,
            )
        return report, True
    except GuardWarning:
        raise
    except Exception as error:
        if look.present is None:
            raise
        run.announce(replace(of_check(error, step), kind=Kind.NO_CURVATURE_MEASURED))
        reason = Reason(Kind.NOT_MEASURED, detail=f"{type(error).__name__}: {error}", step=step)
        alpha, beta = alpha_of(look.problem), scheduled_rate(look.optimizers)
        given: dict[str, Any] = {"alpha": alpha, "beta": beta, "criterion": curvature.criterion, "step": step}
        return StabilityReport.unmeasured(reason, **given), False
