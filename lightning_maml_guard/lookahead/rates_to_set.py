"""From what a search found and the limits at hand to the rates to set for a whole run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.optim import Optimizer

from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.rate_search import ALPHA_LADDER, CLEAR_SHARE, LASTING_STEPS, RateSearch
from lightning_maml_guard.lookahead.results import SearchResult, mean_at_end
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.optim.stability_limits import is_preconditioned
from lightning_maml_guard.stability.problems import Problem, inner_steps_of
from lightning_maml_guard.stability.report import StabilityReport

# The numbers here were chosen on AdviceBench's tuning seeds.
# The share of a limit to set: s for one inner step, s / K**s for K inner steps.
_SHARE_OF_LIMIT = 0.6
# If an inner rate is lowered, an outer rate above this many times its limit is lowered too.
_BEYOND = 2.0
# A limit below this share of a rate at which trials learn contradicts them: take the geometric mean of both.
_FAR_BELOW = 0.15
# An inner rate is a suspect above this many times the value that its limit would have it set to.
_SUSPECT_FROM = 2.0
# Times as much that a lower outer rate has to learn to be blamed if the inner loop diverges.
_BETA_HANDICAP = 2.0
# An outer rate that does not last is halved at most this often.
_MOST_HALVINGS = 7
# A rate has moved since a check if it differs by more than this share.
_MOVED = 0.1
# Rates below this share of their limits are not suspected.
_UNSUSPECTED = 0.5
# If a rate exceeds this many times its limit, lower ones need to end lower by this share of the loss only.
_FAR_BEYOND, _CLEAR_SHARE_BEYOND = 2.0, 0.05


class Rates(NamedTuple):
    """The rates to set; None where one is to be left as it is."""

    alpha: float | None = None
    beta: float | None = None


@dataclass(frozen=True)
class RatesToSet:
    """Turns what a search found into the rates to set for a whole run.

    Args:
        search: Tries rates.
        optimizers: They move the problem's parameters.
        problem: The problem of the coming step.
        beta: The outer rate to replace.
        mean: Mean of the outer rates to come, as a share of the one to replace, their peak.
        repeats: Whether every step uses the same batch, so that its noise sets no limit.
        measured: Measures the limits at a factor on the inner rates.
        harmful: Whether adaptation makes tasks worse at the inner rate to replace.
        lasts_from_start: Whether factors on the rates last from the parameters that the run began with, if ``search``
            tries them from later ones.
    """

    search: RateSearch
    optimizers: Sequence[Optimizer]
    problem: Problem
    beta: float
    mean: float
    repeats: bool
    measured: Callable[[float], StabilityReport]
    harmful: bool = False
    lasts_from_start: Callable[[float, float], bool] = lambda alpha, beta: False

    def of(self, found: SearchResult, report: StabilityReport, earlier: Sequence[StabilityReport]) -> Rates:
        """The rates to set, by the smallest limits of a report and of earlier ones.

        The outer rate's limit is another one where the inner rate is lowered: it is measured there.
        """
        seen = [*earlier, report]
        factor, lower_beta = 1.0, found.best.factors.beta < 1
        lower_alpha, alpha = found.best.factors.alpha < 1, report.alpha
        if lower_alpha:
            alpha_c = min((each.alpha_c for each in seen if each.alpha_c > 0), default=math.nan)
            factor = self._alpha_factor(found, report, alpha_c)
            report = self.measured(factor)
            seen = [report]
            if lower_beta or self.beta > _BEYOND * self._limit(report):
                found = self.search.find_beta(factor)
                lower_beta = lower_beta or found.best.learned >= self.search.trial(factor).learned
            else:
                factor = self._lasting_alpha(factor, found.best.factors.alpha)
        beta = self._beta_factor(found, report, seen) if lower_beta else 1.0
        if lower_alpha or lower_beta:
            lasting = self._lasting_beta(factor, beta)
            if lasting is None and not lower_alpha:
                return Rates()
            beta = lasting or beta
        return Rates(factor * alpha if lower_alpha else None, beta * self.beta if beta < 1 else None)

    def _alpha_factor(self, found: SearchResult, report: StabilityReport, alpha_c: float) -> float:
        """Factor on the inner rate: from its limit or, if unknown, from the highest one that learned nearly the most.

        Trials of a few steps alone say little about adaptation over a whole run.
        """
        share = share_to_set(self.problem)
        if math.isnan(alpha_c):
            return share * found.highest_alpha
        factor = share * alpha_c / report.alpha
        if factor >= 0.5 and self.harmful:
            factor = share  # adaptation harms below the measured limit: curvature grows along the inner steps
        if not factor < 0.5:
            return found.best.factors.alpha
        while factor > ALPHA_LADDER[-1] and self.search.harms(factor):
            factor *= share
        return factor

    def _lasting_alpha(self, factor: float, learned: float) -> float:
        """The factor from the limit or, if that does not last, a share of the lower one that learned most.

        If curvature grows within the first steps, as with low-rank adapters that start at zero, a limit says little.
        But a lower outer rate may make the higher inner rate last, and learn more.
        """
        if learned >= factor or self.search.trial(factor, steps=LASTING_STEPS).trains:
            return factor
        lower, beta = self.search.trial(learned, steps=LASTING_STEPS), self._lasting_beta(factor, 1.0)
        both = -math.inf if beta is None else self.search.trial(factor, beta, LASTING_STEPS).learned
        return share_to_set(self.problem) * learned if lower.trains and lower.learned > both else factor

    def _beta_factor(self, found: SearchResult, report: StabilityReport, seen: Sequence[StabilityReport]) -> float:
        """Factor on the outer rate: the geometric mean of its bounds by trials, and no more than the limit allows."""
        limit = self._limit(report)
        limit = min((each for each in map(self._limit, seen) if each > 0), default=limit)
        # A limit measured at an inner rate that is too high says nothing.
        factor = math.nan if report.alpha_ratio > 1 else share_to_set(self.problem) * limit / self.beta
        # How much a run learns depends on the schedule's mean rate; whether it survives, on the peak.
        middle = math.sqrt(min(found.lowest_beta / self.mean, found.highest_beta) * found.highest_beta)
        if math.isnan(factor):
            return middle
        return min(factor if factor > _FAR_BELOW * found.lowest_beta else math.sqrt(factor * middle), middle)

    def _lasting_beta(self, alpha: float, beta: float) -> float | None:
        """The factor on the outer rate, halved until the loss survives many more steps than a search's trials.

        None if the loss rises at every one: then no rate is to blame. Parameters that a rate has damaged ask for lower
        ones than a new run does: a higher factor that lasts where the run began is taken.
        """
        factors = [beta * 0.5**halvings for halvings in range(_MOST_HALVINGS)]
        lasting = next((each for each in factors if self.search.trial(alpha, each, LASTING_STEPS).trains), None)
        if lasting is None or lasting == beta:
            return lasting
        again = (each for each in factors if each > lasting and self.lasts_from_start(alpha, each))
        return next(again, lasting * self.search.share_of_largest)

    def _limit(self, report: StabilityReport) -> float:
        """The outer rate's limit, with the tasks' noise if they are drawn anew at every step; ``nan`` if not known."""
        if not math.isfinite(report.beta_c) or any(map(is_preconditioned, self.optimizers)):
            return math.nan
        return report.beta_c if self.repeats or math.isnan(report.beta_c_noise) else report.beta_c_noise


def share_to_set(problem: Problem) -> float:
    """The share of a limit to set."""
    return _SHARE_OF_LIMIT / inner_steps_of(problem) ** _SHARE_OF_LIMIT


def suspicion(
    report: StabilityReport, problem: Problem, adaptation_gain: float, *, harmful: bool, stays: bool
) -> tuple[bool, float]:
    """Whether the inner rate is a suspect, and how many times as much as a lower one a lower outer rate has to learn.

    A single inner step beyond its limit may help, as on Omniglot; several diverge. If they kill all units, the network
    is a constant, which any low outer rate soon fits to the mean of the targets: then the outer rate has to learn more
    to be blamed and, if adaptation is of no use either, is not blamed at all. ``stays``: adaptation is harmful,
    and the next steps do not mend that.
    """
    several = inner_steps_of(problem) > 1
    beyond = several and report.alpha_ratio > _SUSPECT_FROM * share_to_set(problem)
    weight = 1.0
    if (several or stays) and report.alpha_ratio > 1:
        weight = math.inf if adaptation_gain <= 0 else _BETA_HANDICAP
    return harmful or math.isnan(report.alpha_c) or beyond, weight


def try_half_limits(search: RateSearch, found: SearchResult, report: StabilityReport, beta: float) -> SearchResult:
    """Try half of each limit, which may lie below all rates that a search tries."""
    alpha, limit = (0.5 / report.alpha_ratio if report.alpha_ratio > 1 else 1.0), report.safe_beta_c
    tried = search.trial(alpha, 0.5 * limit / beta if 0 < limit < beta else 1.0)
    return SearchResult(found.present, tried, tried.factors.beta, tried.factors.beta)


def recovers(search: RateSearch, goal: Sequence[float], margin: float) -> bool:
    """Whether the rates as they are bring the batches down to losses, and lower rates are not clearly better."""
    present, best = search.probe()
    lost = present.end > mean_at_end(goal, search.steps)
    return present.trains and not lost and best.learned <= present.learned + margin


def tried_reason(found: SearchResult, alpha: float, beta: float, start: float, origin: Snapshot | None) -> Reason:
    """State what the rates that were tried led to; ``origin``: where they were tried from (None: where the run is)."""
    best, losses = found.best, (found.present.end, found.best.end, start)
    inner, outer, step = best.factors.alpha * alpha, best.factors.beta * beta, None if origin is None else origin.step
    return Reason(Kind.RATES_TRIED, losses=losses, steps=best.steps, alpha=inner, beta=outer, step=step)


def is_not_to_blame(found: SearchResult, report: StabilityReport, scale: Scale) -> bool:
    """Return True if rates far below their limits learn as well as any lower ones."""
    present = found.present
    low = all(ratio < _UNSUSPECTED for ratio in ratios(report))
    return low and present.trains and found.best.learned <= present.learned + share_of_start(scale, CLEAR_SHARE)


def is_still_above(reason: Reason, report: StabilityReport) -> bool:
    """Return True if a reason says that a rate is above its limit, and the rate has hardly moved since."""
    moved = not math.isclose(reason.value, {"alpha": report.alpha}.get(reason.rate, report.beta), rel_tol=_MOVED)
    return reason.kind is Kind.ABOVE_LIMIT and not moved


def ratios(report: StabilityReport) -> list[float]:
    """The rates over their limits: the outer rate's, and the inner one's where there is an inner loop."""
    return [report.beta_ratio, *([] if math.isnan(report.alpha) else [report.alpha_ratio])]


def clear_share(report: StabilityReport, *, suspect: bool) -> float | None:
    """Share of the loss by which lower rates have to end lower; None if all rates are far below their limits.

    ``suspect``: whether the inner rate is one.
    """
    known = ratios(report)
    if all(ratio < _UNSUSPECTED for ratio in known):
        return None
    return _CLEAR_SHARE_BEYOND if suspect or any(ratio > _FAR_BEYOND for ratio in known) else CLEAR_SHARE


def share_of_start(scale: Scale, share: float) -> float:
    """A share of the loss that training started from, in the units that losses are compared in."""
    return scale.times(1 + share, scale.start) - scale.start
