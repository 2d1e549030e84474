"""How far the rates of a diverging run are lowered, and when they are raised again, by what lookaheads show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.lookahead.results import LookaheadResult
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.optim.lr_cap import LRCap
from lightning_maml_guard.stability.problems import Problem
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import UNSAFE
from lightning_maml_guard.utils.lightning_compat import least_run

# A lookahead is calm if it ends at no more than this many times the loss it starts from: the scatter of a batch.
CALM = 1.2
# Still lower rates are tried while they take the loss below this share, and given up after so many that do not.
BETTER, PATIENCE = 0.9, 2
# Shares of the lowered inner and outer rate to try one after another; None leaves the inner rate alone.
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
# Capped rates are raised by this factor, at most so many times in one check, if the loss ends at no more than this many
# times its end under the caps so far.
RELEASE, MOST_RAISES, SAME = 2.0, 3, 1.05
# An outer rate is raised only if one that is raised so many times more survives, too: 10 steps favour the lower of two
# rates that survive, which learns less in a whole run (short-horizon bias, Wu et al., ICLR 2018).
HEADROOM = 2
# Factor by which the rates of a run that loses ground are lowered.
EASE = 4.0
# If the loss stands still, lower rates have to take it below this share only: a run that memorises its batches favours
# the higher rate.
STAGNATES = 0.97
LookUnder = Callable[[Caps], LookaheadResult]
BY_RATIO, NO_CAPS = Scale(), Caps()


def lowered(
    report: StabilityReport,
    caps: Caps,
    margin: float,
    look: LookUnder,
    *,
    loss: float = math.inf,
    present: LookaheadResult | None = None,
    reach_alpha: bool,
    at_least_halve: bool = False,
    scale: Scale = BY_RATIO,
) -> Caps:
    """Lower the rates of a diverging run: to ``margin`` times their limits, and further until a lookahead is calm.

    A lower inner rate changes the loss itself, for the worse where the parameters have come to rely on it, so each
    step down is tried with the inner rate lowered and with it left alone.

    Args:
        report: The curvature where the run is.
        caps: The caps so far.
        margin: Fraction of the critical values.
        look: Looks ahead under caps.
        loss: Loss where the run is; ``inf`` if it is not known.
        present: The lookahead under the caps so far, if they may stay: the loss may be high for another reason, and
            lower rates would only keep it from falling again. None: rates must be lowered.
        reach_alpha: Whether the inner rate can be capped.
        at_least_halve: Whether the outer rate must fall to half whatever the lookahead says.
        scale: How losses are compared.

    Returns:
        The caps to apply: the first whose lookahead is calm, or lower ones that bring the loss further down; if none
        is calm, those whose lookahead ended lowest. Where the caps may stay, others must bring the loss further down.
    """
    alpha, beta = caps.applied(report.alpha, report.beta)
    lower_alpha, lower_beta = _at_most_limits(report, alpha, beta, margin, reach_alpha=reach_alpha)
    if at_least_halve or (lower_beta == beta and not lower_alpha < alpha):
        lower_beta = min(lower_beta, beta / 2)
    tried: dict[Caps, LookaheadResult] = {}
    best, worse = None, 0
    if present is not None:
        tried[caps] = present
        best = caps if is_calm(present, scale, loss) else None
    for share_alpha, share_beta in LADDER:
        at = alpha if share_alpha is None else share_alpha * lower_alpha
        if at < alpha and not reach_alpha:
            continue
        candidate = Caps(at if at < report.alpha else None, share_beta * lower_beta)
        if candidate in tried:
            continue
        found = tried[candidate] = look(candidate)
        if best is not None:
            best, worse = (candidate, 0) if found.end < scale.times(BETTER, tried[best].end) else (best, worse + 1)
            if worse == PATIENCE:
                return best
        elif is_calm(found, scale, loss):
            best = candidate
    return best or min(tried, key=lambda each: tried[each].end)


def _at_most_limits(
    report: StabilityReport, alpha: float, beta: float, margin: float, *, reach_alpha: bool
) -> tuple[float, float]:
    """Lower applied rates to ``margin`` times their limits, if they are above."""
    lower_alpha = alpha
    if reach_alpha and report.alpha_status == UNSAFE:
        lower_alpha = min(alpha, margin * report.alpha_c)
    critical = margin * report.safe_beta_c
    return lower_alpha, min(beta, critical) if math.isfinite(critical) and critical > 0 else beta


def released(
    alpha: float,
    beta: float,
    caps: Caps,
    present: LookaheadResult,
    look: LookUnder,
    *,
    scale: Scale = BY_RATIO,
    allows: Callable[[Caps], bool] = lambda caps: True,
    advised: Caps = NO_CAPS,
) -> Caps:
    """Raise capped rates by ``RELEASE`` again and again, as long as higher ones survive and end no higher.

    They are compared on the same batches, by the mean loss of the later steps. Above the advised rates, an inner rate
    has to end clearly lower, and an outer rate lower: a network whose units have died survives any rate, and learns at
    none.

    Args:
        alpha: The inner rate as configured.
        beta: The outer rate as scheduled.
        caps: The caps so far.
        present: The lookahead under them.
        look: Looks ahead under caps.
        scale: How losses are compared.
        allows: Whether caps may be tried.
        advised: The rates that are advised; None where there is no advice on one.

    Returns:
        The caps to apply.
    """
    late = present.late
    for _ in range(MOST_RAISES):
        both = Caps(_raised(caps.alpha, alpha), _raised(caps.beta, beta))
        for candidate in dict.fromkeys((both, Caps(caps.alpha, both.beta), Caps(both.alpha, caps.beta))):
            if candidate == caps or not allows(candidate):
                continue
            found = look(candidate)
            above = _exceeds(candidate.alpha, caps.alpha, alpha, advised.alpha)
            if found.late > scale.times(BETTER if above else SAME, late) or not is_calm(found, scale):
                continue
            if _exceeds(candidate.beta, caps.beta, beta, advised.beta) and not found.late < late:
                continue
            beyond = candidate
            for _ in range(HEADROOM if candidate.beta != caps.beta else 0):
                beyond = Caps(candidate.alpha, _raised(beyond.beta, beta))
            if beyond == candidate or is_calm(look(beyond), scale):
                caps, late = candidate, min(late, found.late)
                break
        else:
            break
    return caps


def lowered_further(
    alpha: float,
    beta: float,
    caps: Caps,
    present: LookaheadResult,
    look: LookUnder,
    *,
    reach_alpha: bool,
    scale: Scale = BY_RATIO,
    stagnates: bool = False,
) -> Caps:
    """Lower the rates of a run that loses ground, or ``stagnates``, as long as the loss then ends lower."""
    late = present.late
    by = RELEASE if stagnates else EASE
    for clearly in (STAGNATES, BETTER) if stagnates else (BETTER,) * MOST_RAISES:
        inner, outer = caps.applied(alpha, beta)
        lower = [Caps(caps.alpha, outer / by)]
        if reach_alpha:
            lower.append(Caps(inner / by, caps.beta))
        for candidate in lower:
            found = look(candidate)
            if found.late < scale.times(clearly, late):
                caps, late = candidate, found.late
                break
        else:
            break
    return caps


def is_calm(found: LookaheadResult, scale: Scale, loss: float = math.inf) -> bool:
    """Whether a lookahead raises its first loss, or a lower one given, by no more than the scatter of a batch."""
    return found.end <= scale.times(CALM, min(found.begin, loss))


def _exceeds(raised: float | None, cap: float | None, rate: float, advised: float | None) -> bool:
    """Whether a cap on a rate was raised beyond what is advised."""
    return raised != cap and advised is not None and min(rate if raised is None else raised, rate) > advised


def _raised(cap: float | None, rate: float) -> float | None:
    return None if cap is None or RELEASE * cap >= rate else RELEASE * cap


def at_limits(report: StabilityReport, caps: Caps, margin: float, reach_alpha: bool) -> Caps:
    """Cap at ``margin`` times the limits just measured, also where the schedule is below them and may rise.

    For a guard without lookaheads. A limit that could not be measured leaves its cap as it was.
    """
    return Caps(
        margin * report.alpha_c if reach_alpha and not math.isnan(report.alpha_c) else caps.alpha,
        caps.beta if math.isnan(report.safe_beta_c) else margin * report.safe_beta_c,
    )


class AppliedCaps:
    """The caps of a run, applied to the module's inner rate and in its optimizers' steps."""

    def __init__(self, active: bool, caps: Caps) -> None:
        self.active, self.caps = active, caps
        self.ignored = False  # whether the module has ``inner_lr_cap`` and does not apply it
        self._lr_cap: LRCap | None = None

    def reaches_alpha(self, pl_module: Any) -> bool:
        """Whether a module lets its inner rate be capped, by an attribute ``inner_lr_cap``."""
        return hasattr(pl_module, "inner_lr_cap") and not self.ignored

    def try_on(self, pl_module: Any, alpha: float, stated: Callable[[], Problem]) -> Reason | None:
        """Cap the inner rate of a module of the user's own to see whether the rate that it states follows."""
        before, pl_module.inner_lr_cap = pl_module.inner_lr_cap, alpha / 2
        try:
            capped = getattr(stated(), "alpha", math.nan)
        finally:
            pl_module.inner_lr_cap = before
        self.ignored = capped > 0.51 * alpha
        return Reason(Kind.CAP_IGNORED, value=capped, limit=alpha / 2) if self.ignored else None

    @property
    def held(self) -> bool:
        """Whether optimizers' steps are capped."""
        return self._lr_cap is not None

    def lowers(self, beta: float) -> bool:
        """Whether a rate is held below what is configured; ``beta`` is the scheduled outer rate."""
        return self.active and (self.caps.alpha is not None or self.caps.applied(math.nan, beta)[1] < beta)

    def hold(self, optimizers: Sequence[Optimizer], holds: Callable[[], bool] | None = None) -> None:
        """Cap the steps of these optimizers and of no others, while ``holds`` (None: always)."""
        self.release()
        self._lr_cap = LRCap(optimizers, self.caps.beta, holds) if self.active else None

    def take_over(self, before: AppliedCaps) -> None:
        """Go on with the hooks of other caps, at these caps."""
        self._lr_cap, before._lr_cap, self.ignored = before._lr_cap, None, before.ignored
        if self._lr_cap is not None:
            self._lr_cap.cap = self.caps.beta

    def release(self) -> None:
        """Take the hooks out of the optimizers."""
        if self._lr_cap is not None:
            self._lr_cap.remove()
            self._lr_cap = None

    def stand_still(self, trainer: Any) -> None:
        """Have the last step of a run that is stopped move no parameters: a Trainer takes it all the same."""
        if not least_run(trainer):
            self.release()
            self._lr_cap = LRCap(trainer.optimizers, 0.0)

    def apply(self, pl_module: Any, caps: Caps) -> None:
        """Apply caps from the coming step on."""
        self.caps = caps
        if self.reaches_alpha(pl_module):
            pl_module.inner_lr_cap = caps.alpha
        if self._lr_cap is not None:
            self._lr_cap.cap = caps.beta
