"""How far to lower the rates of a run that is dying, and when to let them rise again. Pure: a trial is a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lightning_maml_guard.guard.lookahead import Trial
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import UNSAFE

# A trial at lowered rates is calm if it does not raise the loss by more than the scatter of a batch.
CALM = 1.2
# Beyond the first calm one, lower rates are taken while they bring the loss further down by this much; tried so often.
BETTER = 0.9
PATIENCE = 2
# Shares of the lowered rates to try one after another; None leaves the inner rate alone.
LADDER: tuple[tuple[float | None, float], ...] = (
    (1.0, 1.0),
    (None, 1.0),
    (1.0, 0.5),
    (None, 0.5),
    (1.0, 0.25),
    (None, 0.25),
    (0.5, 0.25),
    (None, 1 / 16),
    (0.25, 1 / 16),
    (None, 1 / 256),
)
# Factor by which capped rates rise a check.
RELEASE = 1.5


@dataclass(frozen=True)
class Caps:
    """Largest rates to apply; None applies the configured ones.

    Attributes:
        alpha: Of the inner rate.
        beta: Of the meta rate.
    """

    alpha: float | None = None
    beta: float | None = None

    def applied(self, alpha: float, beta: float) -> tuple[float, float]:
        """Apply the caps.

        Args:
            alpha: The inner rate as configured; ``nan`` without an inner loop.
            beta: The meta rate as scheduled.

        Returns:
            The rates as applied.
        """
        return capped(alpha, self.alpha), capped(beta, self.beta)


Try = Callable[[Caps], Trial]


def capped(rate: float, cap: float | None) -> float:
    """Apply one cap.

    Args:
        rate: The rate.
        cap: The cap, or None.

    Returns:
        The smaller.
    """
    return rate if cap is None or not rate > cap else cap


def lowered(
    report: StabilityReport,
    caps: Caps,
    margin: float,
    trial: Try,
    *,
    loss: float = math.inf,
    reach_alpha: bool,
    at_least_halve: bool = False,
) -> Caps:
    """Bring the rates of a dying run down: to ``margin`` times their critical values, and on until a trial is calm.

    A lower inner rate changes the loss itself, for the worse where the parameters have come to rely on it, so each
    step down is tried with the inner rate lowered and with it left alone.

    Args:
        report: The curvature where the run is.
        caps: The caps so far.
        margin: Fraction of the critical values.
        trial: Tries the coming steps under caps.
        loss: Loss where the run is; ``inf`` if it is not known.
        reach_alpha: Whether the inner rate can be capped.
        at_least_halve: Whether the meta rate must fall to half whatever the trial says.

    Returns:
        The caps to apply: the first whose trial is calm, or lower ones that bring the loss further down; if none is
        calm, those whose trial ended lowest.
    """
    alpha, beta = caps.applied(report.alpha, report.beta)
    lower_alpha, lower_beta = alpha, beta
    if reach_alpha and report.alpha_status == UNSAFE:
        lower_alpha = min(alpha, margin * report.alpha_c)
    critical = margin * report.safe_beta_c
    if math.isfinite(critical) and critical > 0:
        lower_beta = min(beta, critical)
    if at_least_halve or (lower_beta == beta and not lower_alpha < alpha):
        lower_beta = min(lower_beta, beta / 2)
    tried: dict[Caps, Trial] = {}
    best, worse = None, 0
    for share_alpha, share_beta in LADDER:
        at = alpha if share_alpha is None else share_alpha * lower_alpha
        if at < alpha and not reach_alpha:
            continue
        candidate = Caps(at if at < report.alpha else None, share_beta * lower_beta)
        if candidate in tried:
            continue
        found = tried[candidate] = trial(candidate)
        if best is not None:
            best, worse = (candidate, 0) if found.end < BETTER * tried[best].end else (best, worse + 1)
            if worse == PATIENCE:
                return best
        elif found.end <= CALM * min(found.begin, loss):
            best = candidate
    return best or min(tried, key=lambda each: tried[each].end)


def raised(report: StabilityReport, caps: Caps, margin: float, present: Trial, trial: Try) -> Caps:
    """Let capped rates rise again, by RELEASE at most and to ``margin`` times the critical values at most.

    Args:
        report: The curvature where the run is.
        caps: The caps so far.
        margin: Fraction of the critical values.
        present: The trial under them.
        trial: Tries the coming steps under caps.

    Returns:
        The caps to apply: raised ones whose trial ends no worse than the present, else those so far.
    """
    alpha, beta = caps.applied(report.alpha, report.beta)
    higher_alpha = _towards(alpha, margin * report.alpha_c)
    higher_beta = _towards(beta, margin * report.safe_beta_c)
    both = Caps(
        None if caps.alpha is None or higher_alpha >= report.alpha else higher_alpha,
        None if caps.beta is None or higher_beta >= report.beta else higher_beta,
    )
    for candidate in dict.fromkeys((both, Caps(caps.alpha, both.beta), Caps(both.alpha, caps.beta))):
        if candidate == caps:
            continue
        found = trial(candidate)
        if found.end <= CALM * found.begin and found.end <= CALM * present.end:
            return candidate
    return caps


def _towards(rate: float, limit: float) -> float:
    return rate if math.isnan(limit) else max(rate, min(RELEASE * rate, limit))
