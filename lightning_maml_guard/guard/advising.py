"""What to advise: rates tried from the last undamaged state of a run say which one is to blame, and what to set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lightning_maml_guard.guard.look import Look, problem_of, with_resampled
from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.guard.schedule import LOOKAHEAD_GRADIENT, STALLED
from lightning_maml_guard.guard.state_machine import Transition
from lightning_maml_guard.lookahead.learning import Learning, highest_kept_losses
from lightning_maml_guard.lookahead.lookahead import Lookahead, lookahead_of
from lightning_maml_guard.lookahead.new_tasks import NewTasks
from lightning_maml_guard.lookahead.odd_batches import clip_advice, without_odd
from lightning_maml_guard.lookahead.rate_search import CLEAR_SHARE, LASTING_STEPS, RateSearch
from lightning_maml_guard.lookahead.rates_to_set import (
    Rates,
    RatesToSet,
    clear_share,
    is_not_to_blame,
    is_still_above,
    recovers,
    share_of_start,
    suspicion,
    tried_reason,
    try_half_limits,
)
from lightning_maml_guard.lookahead.results import TRIAL_STEPS, SearchResult
from lightning_maml_guard.lookahead.searches import Searches
from lightning_maml_guard.messages.advice import Advice, Cause, cause_of, settable
from lightning_maml_guard.messages.reasons import INCONCLUSIVE, Kind, Reason, Reasons
from lightning_maml_guard.optim.lr_cap import rates_differ
from lightning_maml_guard.optim.rates_ahead import RatesAhead, crossing, to_configure
from lightning_maml_guard.optim.rollback_state import rollback_state
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.stability.problems import PlainProblem, Problem, alpha_of, with_set_rates
from lightning_maml_guard.stability.report import StabilityReport

_MOST_SEARCHES = 4  # in one run: each may cost some hundred steps


class Adviser:
    """Advises a run at one check."""

    def __init__(self, run: GuardedRun, trainer: Any, module: Any, look: Look, step: int) -> None:
        self._run, self._trainer, self._module, self._look, self._step = run, trainer, module, look, step
        self._lookaheads: list[Lookahead] = []  # whose cost is counted
        self._held, self._measurement_cost = rollback_state(trainer, module, run.settings.rollback), 0.0
        place = *self._held, run.settings.snapshot_device
        self._searches = Searches(self._new_search, lambda: run.state.rollbacks, *place)
        self._at_peak: SearchResult | None = None  # if the rate that the schedule goes to is too high
        self.stalled: SearchResult | None = None  # if the run does not learn
        self.tried_from: Snapshot | None = None  # where rates are tried from, if not where the run is

    @property
    def cost(self) -> float:
        """What advising cost, in training steps."""
        return self._measurement_cost + LOOKAHEAD_GRADIENT * sum(each.gradients for each in self._lookaheads)

    @property
    def new_finding(self) -> Kind | None:
        """A finding that calls for advice, once, although the run survives the next steps."""
        look, told = self._look, self._run.state.advised
        if not self._look.is_intact:
            return None
        if self._at_peak is not None or self.stalled is not None:
            return Kind.NOT_LEARNING if self._at_peak is None else Kind.SCHEDULE_AHEAD
        return Kind.ADAPTATION_HARMFUL if look.stays_harmful and Kind.ADAPTATION_HARMFUL.value not in told else None

    def look_at_peak(self) -> None:
        """Try the schedule's peak, until it was found too high."""
        look, untold = self._look, Kind.SCHEDULE_AHEAD.value not in self._run.state.advised
        if look.schedule_rises and look.is_intact and untold and (not self._run.state.history or self._affords_trial):
            self._at_peak = self._lower(look.harmful)

    def look_at_progress(self) -> None:
        """If the loss does not fall, see whether it would at lower rates, from here or from the start."""
        state, sane = self._run.state, self._look.is_intact and self._look.lookahead is not None
        judged = state.statistics.stalled and sane and state.advice is None
        if judged and (self._step == STALLED or self._affords_trial):
            self.stalled = self._lower(self._look.harmful) or self._lower_from_start()
            state.statistics.stalled = False

    def recovers(self, learning: Learning) -> bool:
        """Whether a run that has lost what it learned soon has it again; False if a trial costs too much."""
        run, search = self._run, self._search(alpha_suspect=True)
        run.state.searches += 1
        if run.state.searches > _MOST_SEARCHES and not self._affords_trial:
            return False
        kept = highest_kept_losses(learning, search.lookahead, *self._held, run.ring.kept)
        return recovers(search, kept, share_of_start(self._look.scale, CLEAR_SHARE))

    def look_further(self, report: StabilityReport) -> SearchResult | None:
        """Try more steps than a lookahead does, unless the rates are far below their limits; see `_lower`."""
        suspect, beta_handicap = self._suspicion(report)
        share = clear_share(report, suspect=suspect)
        return None if self._look.lookahead is None or share is None else self._lower(suspect, share, beta_handicap)

    @property
    def _affords_trial(self) -> bool:  # of one lower rate
        return self._run.schedule.affords(LOOKAHEAD_GRADIENT * 2 * TRIAL_STEPS, self._step)

    def _lower(self, alpha_suspect: bool, share: float = CLEAR_SHARE, handicap: float = 1.0) -> SearchResult | None:
        """Search for lower rates; None unless they do better by a share of the loss."""
        search = self._search(alpha_suspect)
        margin = max(share_of_start(self._look.scale, share), search.clear_margin(share))
        present, best = search.probe()
        if present.trains and best.learned <= present.learned + margin:
            return None
        found = search.find(handicap)
        return found if found.best.trains and found.best.learned > found.present.learned + margin else None

    def _lower_from_start(self) -> SearchResult | None:
        """Search from the oldest copy: a network whose units have died learns at no rate from where it is."""
        if not (self._run.state.statistics.stuck and self._run.ring.kept):
            return None
        here, self.tried_from = self._search(self._look.harmful), self._run.ring.kept[0]
        with self._at_last_intact_state():
            search = self._search(alpha_suspect=True, steps=LASTING_STEPS)
            if search.is_soon_below(here.trial().end):
                lowest = search.lowest_far_below()
                present = min(here.trial(steps=LASTING_STEPS).end, search.trial().end)
                if self._look.scale.times(1 + CLEAR_SHARE, lowest.end) < present:
                    return search.find_alpha() if lowest.factors.alpha < 1 else search.find_beta(1.0)
        self.tried_from = None
        return None

    def advise(
        self, report: StabilityReport, findings: Reasons, transition: Transition, further: SearchResult | None
    ) -> Advice | None:
        """Advise a run that has just become unsafe, or of which something new was found; else None."""
        state, news = self._run.state, self.new_finding
        if not transition.entered and news is None:
            return None
        if self._look.lookahead is None or self._look.present is None:
            found = replace(report.advice or Advice(cause=Cause.UNKNOWN), step=self._step, evidence=findings)
        elif self._still_holds(report, news):
            assert state.advice is not None
            found = replace(state.advice, step=self._step, evidence=findings if self._look.is_intact else findings[-1:])
        else:
            found = self.search_advice(report, findings, further, None if transition.entered else news)
        if news is Kind.NOT_LEARNING:
            losses = (state.statistics.before, math.nan, state.statistics.start)
            found = replace(found, evidence=(Reason(news, losses=losses, steps=self._step), *found.evidence))
        own = Reason(Kind.OWN_GRADIENTS, effect="evidence")
        if found.beta is not None and own.key in state.announced and own not in found.evidence:
            found = replace(found, evidence=(*found.evidence, own))
        state.advised += [] if news is None else [news.value]
        state.advice = found
        return found

    def _still_holds(self, report: StabilityReport, news: Kind | None) -> bool:
        """Whether earlier advice still holds: it was about the same rates, and nothing new was found."""
        earlier = self._run.state.advice
        if earlier is None or self._run.state.searches >= _MOST_SEARCHES:
            return earlier is not None
        return news is None and earlier.cause is not Cause.UNKNOWN and earlier.is_about(report.alpha, self._peak)

    def search_advice(
        self, report: StabilityReport, findings: Reasons, known: SearchResult | None, news: Kind | None
    ) -> Advice:
        died, self._run.state.searches = self._look.died, self._run.state.searches + 1
        with self._at_last_intact_state() as at:
            if at != self._step:  # limits measured after a divergence blame the wrong rate
                last = findings[len(report.findings) :][-1:]
                earlier = (each for each in reversed(self._run.state.history) if (each.step or 0) <= at)
                alpha = alpha_of(with_set_rates(self._look.problem, report.alpha))
                report = next((replace(each, alpha=alpha, beta=report.beta) for each in earlier), report)
                findings = (*(each for each in report.findings if is_still_above(each, report)), *last)
            if known is None and news is not None:
                known = {Kind.SCHEDULE_AHEAD: self._at_peak, Kind.NOT_LEARNING: self.stalled}.get(news)
            if known is not None:
                return self._rate_advice(known, report, findings, died)
            # An inner rate beyond its limit makes the losses of good batches differ, too.
            problems, odd = self._without_odd(0.5 / report.alpha_ratio if report.alpha_ratio > 1 else 1.0, at)
            suspect, beta_handicap = self._suspicion(report)
            search = self._searches.on(problems, alpha_suspect=suspect)
            if odd is not None and math.isfinite(search.trial().end):
                given = self._step, self._look.scale, report.alpha, to_configure(self._run.ahead, self._peak)
                return clip_advice(self._lookahead([odd[0], *problems], resample=False), odd[1], *given)
            before = None if odd is None or odd[1] >= at else self._run.ring.latest_before(odd[1])
            if before is not None:  # the odd batch is still in the optimizer's momentum
                self.tried_from = before
                return self.search_advice(report, findings, known, news)
            found = search.find_alpha() if news is Kind.ADAPTATION_HARMFUL else search.find(beta_handicap)
            if not found.best.trains:
                found = try_half_limits(search, found, report, self._peak)
            return self._rate_advice(found, report, findings, died)

    def _suspicion(self, report: StabilityReport) -> tuple[bool, float]:
        look = self._look
        return suspicion(report, look.problem, look.adaptation_gain, harmful=look.harmful, stays=look.stays_harmful)

    def _measured_at(self, factor: float) -> StabilityReport:
        run, optimizers = self._run, self._look.optimizers
        one = with_set_rates(self._look.problem, run.alpha)
        assert not isinstance(one, PlainProblem)
        report = measure(one.at_factor(factor), optimizer=optimizers, curvature=run.settings.curvature, cache=run.cache)
        self._measurement_cost += report.cost
        return report

    def _search(self, alpha_suspect: bool, steps: int = TRIAL_STEPS) -> RateSearch:
        return self._searches.on(self._look.problems, alpha_suspect=alpha_suspect, steps=steps)

    def _new_search(self, problems: Sequence[Problem]) -> RateSearch:
        run, lookahead = self._run, self._lookahead(problems)
        peak = self._peak / lookahead.beta if lookahead.beta > 0 else 1.0
        new_tasks = None if run.repeats else NewTasks(problems, self._lookahead, run.cache.ranks, peak)
        given = self._look.scale, run.settings.lookahead.divergence_ratio
        return RateSearch(lookahead, *given, alpha_suspect=False, peak=peak, new_tasks=new_tasks)

    def _lookahead(self, problems: Sequence[Problem], *, resample: bool = True) -> Lookahead:
        run, optimizers = self._run, self._look.optimizers
        problems = [with_set_rates(each, run.alpha) for each in problems]  # a copy of the run may hold others
        problems = with_resampled(run, problems) if resample else problems
        self._lookaheads.append(lookahead_of(problems, optimizers, 1, self._trainer, run.cache, run.state.clipped_to))
        self._lookaheads[-1].before_run = run.clock.tell_if_long
        self._lookaheads[-1].groups = () if self._rising is None else self._rising.at_peak
        return self._lookaheads[-1]

    @property
    def _rising(self) -> RatesAhead | None:
        """The schedule, if it takes the outer rate higher than it was."""
        ahead = self._run.ahead
        return ahead if ahead is not None and ahead.rises else None

    @property
    def _peak(self) -> float:
        """The outer rate to judge: the schedule's peak if it is higher, else the one at hand."""
        rising, beta = self._rising, self._look.beta
        return beta if rising is None else max(rising.peak()[0], beta)

    @contextmanager
    def _at_last_intact_state(self) -> Iterator[int]:
        """Go to the last state from which the loss survives, yield its step, and come back."""
        snapshot = self.tried_from
        if snapshot is None and not (self._look.is_intact and self._survives()):
            snapshot = self._run.ring.latest_that(self._survives, self._searches.visited)
        earlier = None if snapshot is None or snapshot.step >= self._step else snapshot
        with self._searches.visited(earlier):
            yield self._step if earlier is None else earlier.step

    def _survives(self) -> bool:
        """Whether a far lower outer rate trains, no worse than from the oldest copy if it trains there."""
        low = self._searches.on(problems := self._without_odd(1.0)[0], alpha_suspect=True).far_below
        with self._searches.visited(self._run.ring.oldest):
            first = low if self._step == 0 else self._searches.on(problems, alpha_suspect=True).far_below
        compared = first.trains and not self._look.harmful and self._look.scale.unit is None
        return low.trains and low.end <= first.end if compared else math.isfinite(low.end)

    def _lasts_from_start(self, alpha: float, beta: float) -> bool:
        with self._searches.visited(self._run.ring.oldest):
            return self._step > 0 and self._search(alpha_suspect=True).trial(alpha, beta, LASTING_STEPS).trains

    def _without_odd(self, alpha: float, since: float = math.inf) -> tuple[list[Problem], tuple[Problem, int] | None]:
        """Leave out batches unlike the others, also the highest spike after a step; return the worst and its step."""
        run, problems = self._run, self._look.problems
        if run.repeats:
            return problems, None
        steps, spike = [self._step - index for index in range(len(problems))], run.replay.spike
        if spike is not None and since <= spike.step < steps[-1]:
            problems, steps = [*problems, problem_of(run, self._module, spike.batches)], [*steps, spike.step]
        kept, odd = without_odd(problems, self._lookahead(problems, resample=False), self._look.scale, alpha)
        return kept, None if odd is None else (problems[odd], steps[odd])

    def _rate_advice(self, found: SearchResult, report: StabilityReport, findings: Reasons, died: Reasons) -> Advice:
        proven = self._look.stays_harmful and report.alpha_ratio > 1
        to_blame = proven or (found.best.trains and not is_not_to_blame(found, report, self._look.scale))
        alpha, beta, rising = report.alpha, self._peak, self._rising
        rates, look, step = Rates(), self._look, report.step or 0
        if to_blame:
            mean = 1.0 if rising is None else rising.mean_to_peak
            given = look.optimizers, look.problem, beta, mean, self._run.repeats, self._measured_at, look.harmful
            to_set = RatesToSet(self._search(alpha_suspect=True), *given, self._lasts_from_start)
            rates = to_set.of(found, report, [each for each in self._run.state.history if (each.step or 0) <= step])
        lower_alpha, lower_beta = (rate is not None for rate in rates)
        died = () if lower_alpha or not lower_beta else died
        supports = found.best.end < found.present.end or not (lower_alpha or lower_beta)
        tried = [tried_reason(found, alpha, beta, look.scale.start, self.tried_from)] if supports else []
        # Findings about the other rate, or about neither, are no reason to lower a rate.
        told = {"alpha": lower_alpha or not lower_beta, "beta": lower_beta or not lower_alpha}
        shown = [e for e in findings if told.get(e.rate, True) and not (supports and e.kind in INCONCLUSIVE)]
        return Advice(
            cause=cause_of(alpha=lower_alpha, beta=lower_beta, rising=rising is not None, died=bool(died)),
            alpha=None if rates.alpha is None else settable(rates.alpha),
            beta=None if rates.beta is None else settable(to_configure(self._run.ahead, rates.beta)),
            step=self._step,
            evidence=(*shown, *crossing(self._run.ahead, report.beta_c, self._step), *died, *tried),
            configured_alpha=alpha,
            configured_beta=beta,
            setting="lr" if self._run.ahead is None else self._run.ahead.setting,
            peak_step=None if rising is None else rising.peak()[1],
            several=rates_differ(look.optimizers),
        )
