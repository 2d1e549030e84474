"""What a check found: the next steps, the curvature, and what both say of the rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning_maml_guard.guard.actions import Situation
from lightning_maml_guard.guard.advising import Adviser
from lightning_maml_guard.guard.look import Look, advised_rates, allows
from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.guard.state_machine import Transition
from lightning_maml_guard.lookahead.divergence import fails, undecided_severity
from lightning_maml_guard.lookahead.learning import Learning, last_loss_reason, lookahead_reason
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.lookahead.rate_search import SearchResult
from lightning_maml_guard.messages.advice import Advice
from lightning_maml_guard.messages.reasons import Kind, Reason, of_check
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.rates_ahead import to_configure
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.stability.problems import PlainProblem, Problem
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import UNSAFE
from lightning_maml_guard.utils.warnings import GuardWarning


@dataclass(frozen=True)
class Seen:
    """What looking ahead told of a run, before any curvature is measured.

    Attributes:
        look: The next steps, adaptation and the schedule.
        adviser: Knows which other rates were tried.
        caps: The caps under which they were.
        learning: The run beside its snapshots; None where its loss has not left its best.
        collapsed: How the run lost what it had learned; None where it did not.
        failing: Whether the next steps diverge.
        gone: Whether the run has diverged or collapsed already.
        thrown: Whether it is gone, or no longer where it learned.
    """

    look: Look
    adviser: Adviser
    caps: Caps
    learning: Learning | None
    collapsed: Reason | None
    failing: bool
    gone: bool
    thrown: bool

    @property
    def away(self) -> bool:
        """Whether half of what was learned is gone, if only for some steps."""
        return self.learning is not None and self.learning.has_lost_half


@dataclass(frozen=True)
class Judgement:
    """What a check found.

    Attributes:
        report: The curvature, as measured.
        measured: Whether it could be measured.
        findings: What is wrong.
        failing: Whether the run diverges, or learns clearly less than at lower rates.
        severity: By which the state was judged.
        further: Whether only steps beyond those of a lookahead told.
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


def judge(run: GuardedRun, seen: Seen, step: int) -> Judgement:
    """Measure the curvature, find what is wrong, advance the state of the run, and advise."""
    look, ratio, failing = seen.look, run.settings.lookahead.divergence_ratio, seen.failing
    report, measured = _measured(run, look, step)
    findings = (*report.findings, *look.findings, *([] if seen.collapsed is None else [seen.collapsed]))
    further = None if failing or run.state.history else seen.adviser.look_further(report)
    judged = look.severity
    if further is not None:
        # What leaves only in a longer look is no more severe than what just fails in a lookahead.
        failing, longer = True, min(look.scale.severity(further.present.end), math.log(ratio))
        look.severity = max(look.severity, longer)
        run.note_severity(step, look.severity, look.beta)
        # Rates at which a run learns clearly less than at lower ones are judged as those at which it diverges.
        judged = max(look.severity, math.log(ratio))
    if failing and report.status != UNSAFE and look.may_miss_clipping(ratio):
        _tell_of_clipping(run, seen, report, findings, further, step)
        failing, judged = False, undecided_severity(ratio)
    gone = look.last is not None and look.scale.diverged(look.last, ratio)
    if gone:  # limits where a run has been thrown to blame the wrong rate
        known = next((each.advice for each in reversed(run.state.history) if each.advice is not None), None)
        report, findings = replace(report, advice=known), look.findings
    if look.last is not None and (gone or report.status != UNSAFE):  # else the curvature has its word
        judged = look.scale.severity(look.last)
        run.note_severity(step, judged, report.beta)
        failing = fails(judged, ratio)
        if failing:
            run.schedule.confirm()
            findings = (*findings, last_loss_reason(look.last, look.scale))
    if failing and look.present is not None and further is None and seen.collapsed is None:
        tried = seen.caps.applied(report.alpha, report.beta)
        findings = (*findings, lookahead_reason(look.present, look.scale.start, *tried))
    transition = run.machine.take(report, judged)
    advice = seen.adviser.advise(report, findings, transition, further)
    return Judgement(report, measured, findings, failing, judged, further is not None, transition, advice)


def _tell_of_clipping(
    run: GuardedRun,
    seen: Seen,
    report: StabilityReport,
    findings: tuple[Reason, ...],
    further: SearchResult | None,
    step: int,
) -> None:
    """Say once what to set if a training step clips nothing by itself, as steps tried on copies do not."""
    told = Reason(Kind.CLIPPING_NOT_SEEN, step=step)
    if told.key not in run.state.announced and run.settings.acting.speaks:
        found = seen.adviser.search_advice(report, findings, further, None)
        rates = {"alpha": found.alpha, "beta": found.beta}
        given: dict[str, Any] = {name: rate for name, rate in rates.items() if rate is not None}
        told = replace(told, effect=found.setting, **given)
    run.announce(told)


def situation_of(
    run: GuardedRun, seen: Seen, found: Judgement, step: int, *, reach_alpha: bool, rolled_back: bool
) -> Situation:
    """Put together what an action decides on."""
    look, report, advice = seen.look, found.report, found.advice
    # Trials from where a run has learned favour rates that are too low for the rest of it.
    follows_advice = advice is not None and math.isnan(look.scale.best)
    if advice is not None and follows_advice:
        _take_advised_beta(run, advice, look.problem)
    # Where the run survives the next steps, but not for long, a lower outer rate replaces no lower inner one.
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
        harmful=look.harmful,
        advised=advised_rates(run, look.problem),
        follows_advice=follows_advice,
        left=seen.gone,
        allows=partial(allows, run, alpha=report.alpha, beta=report.beta, step=step),
    )


def _take_advised_beta(run: GuardedRun, advice: Advice, problem: Problem) -> None:
    """Take in the outer rate that is advised: from now on, higher ones have to lead further down.

    What is advised lasts a run without a guard, which cannot lower it later. With one, and no rise to come, MAML may
    begin at the rate whose trial ended lowest. Plain training may not: its trials learn their few batches by heart.
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
    run.cache.checks = look.is_sane and not look.harmful
    try:
        with run.cache.ranks.together():
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
        alpha, beta = getattr(look.problem, "alpha", math.nan), scheduled_rate(look.optimizers)
        given: dict[str, Any] = {"alpha": alpha, "beta": beta, "criterion": curvature.criterion, "step": step}
        return StabilityReport.unmeasured(reason, **given), False
