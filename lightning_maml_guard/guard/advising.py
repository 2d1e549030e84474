"""What to advise: the last sane state of a run says which rate is to blame, rates tried from there what to set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

from lightning_maml_guard.guard.look import Look, fresh, problem_of
from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.guard.schedule import LOOKAHEAD_GRADIENT
from lightning_maml_guard.guard.state_machine import Transition
from lightning_maml_guard.lookahead.lookahead import Lookahead, lookahead_of
from lightning_maml_guard.lookahead.odd_batches import without_odd
from lightning_maml_guard.lookahead.rate_search import PROBE_GRADIENTS, TRIAL_STEPS, Found, RateSearch
from lightning_maml_guard.lookahead.rates_to_set import (
    CLEAR,
    CLEARLY,
    Rates,
    RatesToSet,
    is_innocent,
    ratios,
    share_of_start,
    suspicion,
)
from lightning_maml_guard.messages.advice import Advice, Cause, settable
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.optim.rates_ahead import RatesAhead
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.stability.problems import PlainProblem, Problem
from lightning_maml_guard.stability.report import StabilityReport

# Lower rates must end lower by this share of the loss where a rate is so many times its limit.
_CLEARLY_BEYOND, _BEYOND = 0.05, 2.0
# A search may cost as much as some hundred steps, so that one run makes no more than so many.
_MOST_SEARCHES = 4


class Adviser:
    """Advises a run at one check."""

    def __init__(self, run: GuardedRun, trainer: Any, module: Any, look: Look, step: int) -> None:
        self._run, self._trainer, self._module, self._look, self._step = run, trainer, module, look, step
        self._ratio = run.settings.lookahead.divergence_ratio
        self._counted: list[Lookahead] = []  # whose cost is the check's
        self._measured = 0.0  # cost of measurements
        self._further: dict[bool, RateSearch] = {}  # from where the run is, by whether alpha is a suspect
        self._at_peak: Found | None = None  # what was found at the rate that the schedule goes to, if it is too high
        self._stalled: Found | None = None  # and where a run does not learn

    @property
    def cost(self) -> float:
        """What advising cost, in training steps."""
        return self._measured + LOOKAHEAD_GRADIENT * sum(each.gradients for each in self._counted)

    @property
    def news(self) -> Kind | None:
        """What a look found that calls for advice although the run survives the next steps; once each."""
        look, told = self._look, self._run.state.advised
        if not self._look.is_sane:
            return None
        if self._at_peak is not None:
            return Kind.SCHEDULE_AHEAD
        if self._stalled is not None:
            return Kind.NOT_LEARNING
        return Kind.ADAPTATION_HARMFUL if look.harmful and Kind.ADAPTATION_HARMFUL.value not in told else None

    def look_at_peak(self) -> None:
        """Try the rate that the schedule goes to, until it was found too high."""
        untold = self._look.rises and self._look.is_sane and Kind.SCHEDULE_AHEAD.value not in self._run.state.advised
        if untold and (not self._run.state.history or self._is_paid):
            self._at_peak = self._better(self._look.harmful)

    def look_at_progress(self) -> None:
        """Where the loss does not fall, see whether it would at lower rates."""
        state, sane = self._run.state, self._look.is_sane and self._look.lookahead is not None
        if state.statistics.stalled and sane and state.advice is None and self._is_paid:
            self._stalled = self._better(self._look.harmful)
            state.statistics.stalled = False

    def comes_back(self, to: float) -> bool:
        """Whether a run that has lost what it had learned is soon at a loss again; tried a few times in a run."""
        state, clearly = self._run.state, share_of_start(self._look.scale, CLEARLY)
        state.searches += 1
        return state.searches <= _MOST_SEARCHES and self._from_here(alpha_suspect=True).comes_back(to, clearly)

    def look_further(self, report: StabilityReport) -> Found | None:
        """Try more steps than a lookahead does; what was found, if lower rates do clearly better.

        Left out where the critical values are far above the rates.
        """
        known = ratios(report)
        if self._look.lookahead is None or all(ratio < CLEAR for ratio in known):
            return None
        suspect, weight = self._suspicion(report)
        beyond = suspect or any(ratio > _BEYOND for ratio in known)
        return self._better(suspect, _CLEARLY_BEYOND if beyond else CLEARLY, weight)

    @property
    def _is_paid(self) -> bool:
        return self._run.schedule.affords(LOOKAHEAD_GRADIENT * PROBE_GRADIENTS, self._step)

    def _better(self, alpha_suspect: bool, share: float = CLEARLY, weight: float = 1.0) -> Found | None:
        """Try the rates for more steps than a lookahead; what was found, if lower ones do clearly better."""
        search, clearly = self._from_here(alpha_suspect), share_of_start(self._look.scale, share)
        present, best = search.probe()
        if present.trains and best.learned <= present.learned + clearly:
            return None
        found = search.find(weight)
        return found if found.best.trains and found.best.learned > found.present.learned + clearly else None

    def advise(
        self, report: StabilityReport, findings: tuple[Reason, ...], transition: Transition, further: Found | None
    ) -> Advice | None:
        """Advise a run that has just become unsafe, or of which a look found something new; else None."""
        state, news = self._run.state, self.news
        if not transition.entered and news is None:
            return None
        if self._look.lookahead is None or self._look.present is None:
            found = replace(report.advice or Advice(cause=Cause.UNKNOWN), step=self._step, evidence=findings)
        elif self._stands(report, news):
            assert state.advice is not None
            found = replace(state.advice, step=self._step, evidence=findings if self._look.is_sane else findings[-1:])
        else:
            state.searches += 1
            found = self._found(report, findings, further, None if transition.entered else news)
        if news is Kind.NOT_LEARNING:
            losses = (state.statistics.loss, math.nan, state.statistics.start)
            found = replace(found, evidence=(Reason(news, losses=losses, steps=self._step), *found.evidence))
        own = Reason(Kind.OWN_GRADIENTS, effect="evidence")
        if found.beta is not None and own.key in state.announced and own not in found.evidence:
            found = replace(found, evidence=(*found.evidence, own))
        if news is not None:
            state.advised.append(news.value)
        state.advice = found
        return found

    def _stands(self, report: StabilityReport, news: Kind | None) -> bool:
        """Whether earlier advice still stands: it was about the same rates, and nothing new was found."""
        state, configured = self._run.state, (report.alpha, self._peak)
        if state.advice is None:
            return False
        earlier = state.advice.configured_alpha, state.advice.configured_beta
        same = all(
            math.isclose(one, other) or (math.isnan(one) and math.isnan(other))
            for one, other in zip(earlier, configured, strict=True)
        )
        return state.searches >= _MOST_SEARCHES or (same and news is None and state.advice.cause is not Cause.UNKNOWN)

    def _found(
        self, report: StabilityReport, findings: tuple[Reason, ...], further: Found | None, news: Kind | None
    ) -> Advice:
        with self._sane() as at:
            if at != self._step:  # limits where the run has been thrown to blame the wrong rate
                earlier = (each for each in reversed(self._run.state.history) if (each.step or 0) <= at)
                report = next((replace(each, alpha=report.alpha, beta=report.beta) for each in earlier), report)
                findings = (*(each for each in report.findings if each.kind is Kind.ABOVE_LIMIT), *findings[-1:])
            seen = {Kind.SCHEDULE_AHEAD: self._at_peak, Kind.NOT_LEARNING: self._stalled}
            known = further or (seen.get(news) if news else None)
            if known is not None:
                return self._of_rates(known, report, findings)
            # Beyond its limit an inner rate alone makes batches unlike one another.
            problems, odd = self._without_odd(0.5 / report.alpha_ratio if report.alpha_ratio > 1 else 1.0, at)
            suspect, weight = self._suspicion(report)
            search = self._search(problems, suspect)
            if odd is not None and math.isfinite(search.at().end):
                return self._of_batch(problems, *odd, report)
            found = search.find_alpha() if news is Kind.ADAPTATION_HARMFUL else search.find(weight)
            if not found.best.trains:  # the limits may lie below all rates that a search tries
                alpha, limit = (0.5 / report.alpha_ratio if report.alpha_ratio > 1 else 1.0), report.safe_beta_c
                tried = search.at(alpha, 0.5 * limit / self._peak if 0 < limit < self._peak else 1.0)
                found = Found(found.present, tried, tried.at.beta, tried.at.beta)
            return self._of_rates(found, report, findings)

    def _suspicion(self, report: StabilityReport) -> tuple[bool, float]:
        look = self._look
        return suspicion(report, look.problem, look.adaptation_gain, harmful=look.harmful)

    def _measured_at(self, factor: float) -> StabilityReport:
        problem, run = self._look.problem, self._run
        assert not isinstance(problem, PlainProblem)
        given: dict[str, Any] = {"optimizer": self._look.optimizers, "curvature": run.settings.curvature}
        report = measure(problem.at_factor(factor), **given, cache=run.cache)
        self._measured += report.cost
        return report

    def _from_here(self, alpha_suspect: bool) -> RateSearch:
        if alpha_suspect not in self._further:
            self._further[alpha_suspect] = self._search(self._look.problems, alpha_suspect)
        return self._further[alpha_suspect]

    def _search(self, problems: Sequence[Problem], alpha_suspect: bool) -> RateSearch:
        lookahead = self._lookahead(fresh(self._run, problems))
        lookahead.groups = () if self._rising is None else self._rising.at_peak
        peak = self._peak / lookahead.beta if lookahead.beta > 0 else 1.0
        return RateSearch(lookahead, self._look.scale, self._ratio, alpha_suspect=alpha_suspect, peak=peak)

    def _lookahead(self, problems: Sequence[Problem]) -> Lookahead:
        run, optimizers = self._run, self._look.optimizers
        self._counted.append(lookahead_of(problems, optimizers, 1, self._trainer, run.cache, run.state.clipped_to))
        return self._counted[-1]

    @property
    def _rising(self) -> RatesAhead | None:
        """The schedule, if it takes the meta rate higher than it was."""
        ahead = self._run.ahead
        return ahead if ahead is not None and ahead.rises else None

    @property
    def _peak(self) -> float:
        """The meta rate to judge: where the schedule takes it, else the one at hand."""
        rising, lookahead = self._rising, self._look.lookahead
        assert lookahead is not None
        return lookahead.beta if rising is None else max(rising.peak()[0], lookahead.beta)

    def _configured(self, rate: float) -> float:
        return rate if self._run.ahead is None else self._run.ahead.lr_for_peak(rate)

    @contextmanager
    def _sane(self) -> Iterator[int]:
        """Go to the last sane state of the run, whose step is given, and come back."""
        run, step, snapshot = self._run, self._step, self._run.snapshot
        if self._look.is_sane or snapshot is None or snapshot.step >= step:
            yield step
            return
        with snapshot.visited(self._module, self._trainer.optimizers, run.settings.snapshot_device):
            yield snapshot.step

    def _without_odd(self, alpha: float, since: int) -> tuple[list[Problem], tuple[Problem, int] | None]:
        """Leave out batches unlike the others at a factor on the inner rates; the worst of them, and its step.

        The one whose step had the highest loss since a step is looked at, too, although it may be long gone.
        """
        run, problems = self._run, self._look.problems
        if run.repeats:
            return problems, None
        steps, spike = [self._step - index for index in range(len(problems))], run.replay.spike
        if spike is not None and since <= spike.step < steps[-1]:
            problems, steps = [*problems, problem_of(run, self._module, spike.batches)], [*steps, spike.step]
        kept, odd = without_odd(problems, self._lookahead(problems), self._look.scale, alpha)
        return kept, None if odd is None else (problems[odd], steps[odd])

    def _of_batch(self, problems: Sequence[Problem], odd: Problem, step: int, report: StabilityReport) -> Advice:
        """Advise to clip what an odd batch does, where that helps: at twice the gradients of the others."""
        lookahead = self._lookahead([odd, *problems])
        (odd_loss, *usual), (norm, *others) = lookahead.untrained(), lookahead.gradient_norms()
        losses = odd_loss, median(usual), self._look.scale.start
        return Advice(
            cause=Cause.BATCH,
            gradient_clip_val=settable(2 * median(others)) if math.isfinite(norm) else None,
            step=self._step,
            evidence=(Reason(Kind.ODD_BATCH, losses=losses, step=step),),
            configured_alpha=report.alpha,
            configured_beta=self._configured(self._peak),
        )

    def _of_rates(self, found: Found, report: StabilityReport, findings: tuple[Reason, ...]) -> Advice:
        proved = self._look.harmful and report.alpha_ratio > 1
        to_blame = proved or (found.best.trains and not is_innocent(found, report, self._look.scale))
        alpha, beta, rising = report.alpha, self._peak, self._rising
        rates, best, look, step = Rates(), found.best.at, self._look, report.step or 0
        if to_blame:
            mean = 1.0 if rising is None else rising.mean_to_peak
            given = look.optimizers, look.problem, beta, mean, self._run.repeats, self._measured_at, look.harmful
            to_set = RatesToSet(self._search(look.problems, alpha_suspect=True), *given)
            rates = to_set.of(found, report, [each for each in self._run.state.history if (each.step or 0) <= step])
        lower_alpha, lower_beta = (rate is not None for rate in rates)
        died = self._look.died if lower_beta and not lower_alpha else ()
        causes = {
            (True, True): Cause.BOTH,
            (True, False): Cause.ALPHA,
            (False, True): Cause.DEAD_UNITS if died else Cause.SCHEDULE if rising else Cause.BETA,
            (False, False): Cause.UNKNOWN,
        }
        ends = found.present.end, found.best.end, look.scale.start
        inner, outer = best.alpha * alpha, best.beta * beta
        tried = Reason(Kind.RATES_TRIED, losses=ends, steps=TRIAL_STEPS, alpha=inner, beta=outer)
        proves = ends[1] < ends[0] or not (lower_alpha or lower_beta)
        # That nothing limits a rate is no reason to lower it; limits at an inner rate beyond its own say nothing.
        idle = Kind.NOT_JUDGED if proves else None
        shown = [e for e in findings if e.kind is not idle and (e.rate != "beta" or lower_beta or not lower_alpha)]
        return Advice(
            cause=causes[lower_alpha, lower_beta],
            alpha=None if rates.alpha is None else settable(rates.alpha),
            beta=None if rates.beta is None else settable(self._configured(rates.beta)),
            step=self._step,
            evidence=(*shown, *self.crossing(report), *died, *([tried] if proves else [])),
            configured_alpha=alpha,
            configured_beta=beta,
            setting="lr" if self._run.ahead is None else self._run.ahead.setting,
            peak_step=None if rising is None else rising.peak()[1],
        )

    def crossing(self, report: StabilityReport) -> tuple[Reason, ...]:
        """State where the schedule exceeds the limit at hand, if it does."""
        ahead = self._run.ahead
        return () if ahead is None else ahead.exceeding(report.beta_c, self._step)
