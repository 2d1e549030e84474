"""From what a search found and the limits at hand to the rates to set for a whole run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer

from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.rate_search import Found
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.optim.stability_limits import is_preconditioned
from lightning_maml_guard.stability.problems import Problem, first_batch
from lightning_maml_guard.stability.report import StabilityReport

# The numbers here were chosen on AdviceBench's tuning seeds.
# Of a limit, the share to set: s for one inner step, s / K**s for K.
_OF_LIMIT = 0.6
# Trials that learn at rates so much higher than a share of the limit contradict it.
_FAR_BELOW = 0.15
# Lower rates must end lower by this share of the loss before they are advised to a run that does not diverge.
CLEARLY = 0.1
# Rates below this share of their limits are not suspected.
CLEAR = 0.5


def inner_rate(factor: float, report: StabilityReport, alpha_c: float, problem: Problem) -> float:
    """The inner rate to set: from its limit, where that is known; else the one that learned most, by its factor.

    What adaptation does within a few steps says little about a whole run.
    """
    rate = _share_of(alpha_c, problem)
    return rate if rate < report.alpha / 2 else factor * report.alpha


def meta_rate(
    found: Found,
    report: StabilityReport,
    beta: float,
    optimizers: Sequence[Optimizer],
    problem: Problem,
    *,
    repeats: bool,
) -> float:
    """The meta rate to set in place of ``beta``: from its limit, where the trials do not contradict it; else theirs.

    ``repeats``: every step uses the same batch, so that its noise sets no limit.
    """
    flat, most = found.flat * beta, found.most * beta
    if not math.isfinite(report.beta_c) or any(map(is_preconditioned, optimizers)):
        return min(flat, most)
    limit = report.beta_c if repeats or math.isnan(report.beta_c_noise) else report.beta_c_noise
    # Limits at an inner rate beyond its own say nothing.
    rate = _share_of(limit, problem) if found.best.at.alpha == 1 and not report.alpha_ratio > 1 else math.nan
    return min(rate, most) if rate > _FAR_BELOW * flat else math.sqrt(min(flat, most) * most)


def is_innocent(found: Found, report: StabilityReport, scale: Scale) -> bool:
    """Return True if rates far below their limits learn as well as any lower ones."""
    present = found.present
    low = all(ratio < CLEAR for ratio in ratios(report))
    return low and present.trains and found.best.learned <= present.learned + share_of_start(scale, CLEARLY)


def ratios(report: StabilityReport) -> list[float]:
    """The rates over their limits: the meta rate's, and the inner one's where there is an inner loop."""
    return [report.beta_ratio, *([] if math.isnan(report.alpha) else [report.alpha_ratio])]


def share_of_start(scale: Scale, share: float) -> float:
    """A share of the loss that training started from, in the units that losses are compared in."""
    return scale.times(1 + share, scale.start) - scale.start


def _share_of(limit: float, problem: Problem) -> float:
    first = first_batch(problem)
    steps = first.inner_steps if isinstance(first, MetaProblem) else 1
    return _OF_LIMIT * limit / steps**_OF_LIMIT
