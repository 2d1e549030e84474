"""From what a search found and the limits at hand to the rates to set for a whole run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.optim import Optimizer

from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.rate_search import ALPHA_LADDER, CLEARLY, LASTING_STEPS, Found, RateSearch
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.optim.stability_limits import is_preconditioned
from lightning_maml_guard.stability.problems import Problem, inner_steps_of
from lightning_maml_guard.stability.report import StabilityReport

# The numbers here were chosen on AdviceBench's tuning seeds.
# Of a limit, the share to set: s for one inner step, s / K**s for K.
_OF_LIMIT = 0.6
# An outer rate so many times its limit is lowered too where an inner rate is.
_BEYOND = 2.0
# Trials that learn at rates so much higher than a share of the limit contradict it: the truth lies between.
_FAR_BELOW = 0.15
# An inner rate so many times what its limit would have it set to is a suspect.
_SUSPECT = 2.0
# So many times as much a lower outer rate has to learn where several inner steps diverge.
_FAR_MORE = 2.0
# So often an outer rate is halved until it lasts, and once more then.
_HALVED = 7
# A rate has moved since a check if it differs by more than this share.
_MOVED = 0.1
# Rates below this share of their limits are not suspected.
CLEAR = 0.5


class Rates(NamedTuple):
    """The rates to set; None where one is to be left as it is."""

    alpha: float | None = None
    beta: float | None = None


@dataclass(frozen=True)
class RatesToSet:
    """Goes from what a search found to the rates to set.

    Args:
        search: Tries rates.
        optimizers: They move the problem's parameters.
        problem: The problem of the coming step.
        beta: The outer rate to replace.
        mean: Mean of the outer rates to come, as a share of the one to replace, their peak.
        repeats: Whether every step uses the same batch, so that its noise sets no limit.
        measured: Measures the limits at a factor on the inner rates.
        harmful: Whether adaptation makes tasks worse at the inner rate to replace.
    """

    search: RateSearch
    optimizers: Sequence[Optimizer]
    problem: Problem
    beta: float
    mean: float
    repeats: bool
    measured: Callable[[float], StabilityReport]
    harmful: bool = False

    def of(self, found: Found, report: StabilityReport, earlier: Sequence[StabilityReport]) -> Rates:
        """The rates to set, by the smallest limits of a report and of earlier ones.

        The outer rate's limit is another one where the inner rate is lowered: it is measured there.
        """
        seen = [*earlier, report]
        factor, lower_beta = 1.0, found.best.at.beta < 1
        lower_alpha, alpha = found.best.at.alpha < 1, report.alpha
        if lower_alpha:
            alpha_c = min((each.alpha_c for each in seen if each.alpha_c > 0), default=math.nan)
            factor = self._inner_factor(found, report, alpha_c)
            report = self.measured(factor)
            seen = [report]
            if lower_beta or self.beta > _BEYOND * self._limit(report):
                found = self.search.find_beta(factor)
                lower_beta = lower_beta or found.best.learned >= self.search.at(factor).learned
            else:
                factor = self._lasting_inner(factor, found.best.at.alpha)
        beta = self._meta_factor(found, report, seen) if lower_beta else 1.0
        if lower_alpha or lower_beta:
            lasting = self._lasting(factor, beta)
            if lasting is None and not lower_alpha:
                return Rates()
            beta = lasting or beta
        return Rates(factor * alpha if lower_alpha else None, beta * self.beta if beta < 1 else None)

    def _inner_factor(self, found: Found, report: StabilityReport, alpha_c: float) -> float:
        """From the limit or, where that is not known, from the highest rate that learned nearly as much as the best.

        What adaptation does within a few steps says little about a whole run.
        """
        share = share_to_set(self.problem)
        if math.isnan(alpha_c):
            return share * found.near
        factor = share * alpha_c / report.alpha
        if factor >= 0.5 and self.harmful:
            factor = share  # it is beyond the limit that counts: the curvature grows along the inner steps
        if not factor < 0.5:
            return found.best.at.alpha
        while factor > ALPHA_LADDER[-1] and self.search.harms(factor):
            factor *= share
        return factor

    def _lasting_inner(self, factor: float, learned: float) -> float:
        """The factor that goes by the limit or, if that does not last, a share of the lower one that learned most.

        Where curvature grows within the first steps, as of low-rank adapters that start at zero, a limit says little,
        and it goes on growing. But a lower outer rate may make it last, and learn more.
        """
        if learned >= factor or self.search.at(factor, steps=LASTING_STEPS).trains:
            return factor
        lower, beta = self.search.at(learned, steps=LASTING_STEPS), self._lasting(factor, 1.0)
        both = -math.inf if beta is None else self.search.at(factor, beta, LASTING_STEPS).learned
        return share_to_set(self.problem) * learned if lower.trains and lower.learned > both else factor

    def _meta_factor(self, found: Found, report: StabilityReport, seen: Sequence[StabilityReport]) -> float:
        """Midway between what trials say, and no more than the smallest limit allows, or midway to one far below."""
        limit = self._limit(report)
        limit = min((each for each in map(self._limit, seen) if each > 0), default=limit)
        # Limits at an inner rate beyond its own say nothing.
        factor = math.nan if report.alpha_ratio > 1 else share_to_set(self.problem) * limit / self.beta
        # How much a run learns depends on its mean rate; whether it survives, on the peak.
        middle = math.sqrt(min(found.flat / self.mean, found.most) * found.most)
        if math.isnan(factor):
            return middle
        return min(factor if factor > _FAR_BELOW * found.flat else math.sqrt(factor * middle), middle)

    def _lasting(self, alpha: float, beta: float) -> float | None:
        """The factor on the outer rate, lowered until the loss survives many more steps than a search's trials.

        None where it rises at any: then what the steps descend is not this loss, and no rate is to blame.
        """
        for halved in range(_HALVED):
            if self.search.at(alpha, beta * 0.5**halved, LASTING_STEPS).trains:
                return beta * 0.5**halved * (self.search.share if halved else 1.0)
        return None

    def _limit(self, report: StabilityReport) -> float:
        """The outer rate's limit, with the noise of the tasks where they are drawn anew; ``nan`` if it says nothing."""
        if not math.isfinite(report.beta_c) or any(map(is_preconditioned, self.optimizers)):
            return math.nan
        return report.beta_c if self.repeats or math.isnan(report.beta_c_noise) else report.beta_c_noise


def share_to_set(problem: Problem) -> float:
    """The share of a limit to set."""
    return _OF_LIMIT / inner_steps_of(problem) ** _OF_LIMIT


def suspicion(
    report: StabilityReport, problem: Problem, adaptation_gain: float, *, harmful: bool
) -> tuple[bool, float]:
    """Whether the inner rate is a suspect, and how many times as much as a lower one a lower outer rate has to learn.

    A single inner step beyond its limit may help, as on Omniglot; several diverge. An inner loop that kills its units
    is left with a constant, which a low outer rate soon makes the mean of the targets: it has to learn far more to be
    blamed there and, where adaptation is of no use either, is not blamed at all.
    """
    several = inner_steps_of(problem) > 1
    beyond = several and report.alpha_ratio > _SUSPECT * share_to_set(problem)
    weight = 1.0
    if (several or harmful) and report.alpha_ratio > 1:
        weight = math.inf if adaptation_gain <= 0 else _FAR_MORE
    return harmful or math.isnan(report.alpha_c) or beyond, weight


def at_limits(search: RateSearch, found: Found, report: StabilityReport, beta: float) -> Found:
    """Try half of each limit: they may lie below all rates that a search tries."""
    alpha, limit = (0.5 / report.alpha_ratio if report.alpha_ratio > 1 else 1.0), report.safe_beta_c
    tried = search.at(alpha, 0.5 * limit / beta if 0 < limit < beta else 1.0)
    return Found(found.present, tried, tried.at.beta, tried.at.beta)


def tried_reason(found: Found, alpha: float, beta: float, start: float, origin: Snapshot | None) -> Reason:
    """State what rates that were tried came to, and from where; None: from where the run is."""
    best, losses = found.best, (found.present.end, found.best.end, start)
    inner, outer, step = best.at.alpha * alpha, best.at.beta * beta, None if origin is None else origin.step
    return Reason(Kind.RATES_TRIED, losses=losses, steps=best.steps, alpha=inner, beta=outer, step=step)


def is_innocent(found: Found, report: StabilityReport, scale: Scale) -> bool:
    """Return True if rates far below their limits learn as well as any lower ones."""
    present = found.present
    low = all(ratio < CLEAR for ratio in ratios(report))
    return low and present.trains and found.best.learned <= present.learned + share_of_start(scale, CLEARLY)


def is_still_above(reason: Reason, report: StabilityReport) -> bool:
    """Return True if a reason says that a rate is above its limit, and the rate has hardly moved since."""
    moved = not math.isclose(reason.value, {"alpha": report.alpha}.get(reason.rate, report.beta), rel_tol=_MOVED)
    return reason.kind is Kind.ABOVE_LIMIT and not moved


def ratios(report: StabilityReport) -> list[float]:
    """The rates over their limits: the outer rate's, and the inner one's where there is an inner loop."""
    return [report.beta_ratio, *([] if math.isnan(report.alpha) else [report.alpha_ratio])]


def share_of_start(scale: Scale, share: float) -> float:
    """A share of the loss that training started from, in the units that losses are compared in."""
    return scale.times(1 + share, scale.start) - scale.start
