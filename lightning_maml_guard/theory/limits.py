"""From critical and configured rates to a verdict, in words that say what happened, why and what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_maml_guard.theory.multiplier import Interval
from lightning_maml_guard.utils.checks import check_number

SAFE, EDGE, UNSAFE, UNRESOLVED = "safe", "edge", "unsafe", "unresolved"

POSTER_EFFECT = (
    "simplified MAML's objective, lambda - alpha*lambda^2, curves downwards along the sharpest direction, so "
    "no meta rate brings it to a minimum."
)
INNER_LOOP_EFFECT = (
    "the inner loop itself diverges: along the sharpest direction each inner step multiplies the error by "
    "|1 - alpha*lambda_max| > 1."
)
FIRST_ORDER_EFFECT = (
    "first-order MAML's update, lambda*(1 - alpha*lambda)^K, turns against the sharpest direction, so no meta rate "
    "brings it to a minimum."
)


@dataclass(frozen=True)
class Limit:
    """One configured rate beside its critical value.

    Attributes:
        value: The rate as configured; ``nan`` when it is not known.
        critical: Its critical value; ``nan`` when it could not be determined.
        interval: Where the critical value lies.
    """

    value: float
    critical: float
    interval: Interval

    @property
    def ratio(self) -> float:
        """``value / critical``: above 1 is unsafe; ``inf`` when no positive rate is stable."""
        if self.critical == 0:
            return math.inf if self.value > 0 else 0.0
        return self.value / self.critical

    def status(self, margin: float, *, strict: bool) -> str:
        """Compare with ``margin`` times the critical value; only a cleared interval resolves it.

        Args:
            margin: Fraction of the critical value that counts as the threshold.
            strict: Whether the threshold itself is unsafe (``beta < beta_c``) or safe (``alpha <= alpha_c``).

        Returns:
            ``"safe"``, ``"unsafe"`` or ``"unresolved"``.
        """
        if math.isnan(self.value) or math.isnan(self.critical):
            return UNRESOLVED
        low, high = (margin * end for end in self.interval)
        if self.value > high or (strict and self.value == high):
            return UNSAFE
        if self.value < low or (not strict and self.value == low) or low == math.inf:
            return SAFE
        return UNRESOLVED


@dataclass(frozen=True)
class Verdict:
    """Whether the configured rates lie in the safe region.

    Attributes:
        status: ``"safe"``, ``"unsafe"`` or ``"unresolved"`` (the measurement does not clear the threshold).
        alpha_status: The same for the inner rate alone.
        beta_status: The same for the meta rate alone.
        reasons: What is unsafe or unresolved, why, and what to do; empty when safe.
    """

    status: str
    alpha_status: str
    beta_status: str
    reasons: tuple[str, ...]


def judge(
    alpha: Limit | None,
    beta: Limit | None,
    *,
    margin: float = 1.0,
    growth: float | None = None,
    cost: str = "",
    beta_note: str = "",
    alpha_note: str = "",
    alpha_effect: str = POSTER_EFFECT,
) -> Verdict:
    """Judge the configured rates.

    Args:
        alpha: The inner rate and its limit; None where there is no inner loop.
        beta: The meta rate and its limit; None where no meta rate was given.
        margin: Fraction of the critical values that counts as the threshold, above 0.
        growth: Factor a step by which the error along the sharpest direction grows, where it is known.
        cost: Where the numbers come from, for the message ("8 Hessian-vector products, step 400").
        beta_note: Why the meta rate's limit is not known, if it is not.
        alpha_note: What else the reader of an alarm about the inner rate should know.
        alpha_effect: What an inner rate beyond its limit does.

    Returns:
        The verdict: unsafe if either rate is, else unresolved if either is, else safe.

    Raises:
        ValueError: If the margin is not a positive finite number.
    """
    check_margin(margin)
    reasons: list[str] = []
    statuses = {"alpha": SAFE, "beta": SAFE}
    for name, limit in (("alpha", alpha), ("beta", beta)):
        if limit is None:
            continue
        status = limit.status(margin, strict=name == "beta")
        statuses[name] = status
        if status == UNSAFE:
            head = f"{name} = {limit.value:.3g} exceeds {_threshold(name, limit, margin)} {_source(limit, cost)}: "
            if name == "alpha":
                reasons.append(head + _alpha_unsafe(limit, margin, alpha_effect, alpha_note))
            else:
                reasons.append(head + _beta_unsafe(limit, margin, growth, statuses["alpha"]))
        elif status == UNRESOLVED:
            reasons.append(_unresolved(name, limit, margin, cost, beta_note if name == "beta" else alpha_note))
    worst = UNSAFE if UNSAFE in statuses.values() else UNRESOLVED if UNRESOLVED in statuses.values() else SAFE
    return Verdict(worst, statuses["alpha"], statuses["beta"], tuple(reasons))


def check_margin(margin: float) -> None:
    """Refuse a margin that is not a positive finite number.

    Args:
        margin: The margin.

    Raises:
        ValueError: If it is not allowed.
    """
    check_number("margin", margin, above=0)


def _source(limit: Limit, cost: str) -> str:
    interval = f"interval {limit.interval[0]:.3g} to {limit.interval[1]:.3g}"
    return f"({interval}{', ' + cost if cost else ''})"


def _threshold(name: str, limit: Limit, margin: float) -> str:
    scaled = f"{margin:g} * " if margin != 1 else ""
    return f"{scaled}{name}_c = {margin * limit.critical:.3g}"


def _alpha_unsafe(limit: Limit, margin: float, effect: str, note: str) -> str:
    said = f"{effect} {note}" if note else effect
    return f"{said} Lower the inner rate (inner_lr) {_below(limit, margin)}."


def _beta_unsafe(limit: Limit, margin: float, growth: float | None, alpha_status: str) -> str:
    if limit.critical == 0:
        return "no positive meta rate is stable while alpha exceeds alpha_c. Lower the inner rate first."
    if limit.value <= limit.critical:
        grown = "the meta update is nearer to its limit than the margin allows"
    elif growth is not None and growth > 1:
        grown = f"the meta update grows along the sharpest direction by {growth:.2g} a step"
    else:
        grown = "the meta update grows along the sharpest direction"
    if alpha_status == UNSAFE:
        return (
            f"{grown}. Lower the optimizer's lr only if it exceeds beta_c at the lowered inner rate too: beta_c moves "
            "with alpha."
        )
    return f"{grown}. Lower the optimizer's lr {_below(limit, margin)}."


def _below(limit: Limit, margin: float) -> str:
    return f"below {margin * limit.critical:.3g}"


def _unresolved(name: str, limit: Limit, margin: float, cost: str, note: str) -> str:
    if math.isnan(limit.critical):
        return f"{name} is not judged: {note or 'its critical value could not be measured.'}"
    return (
        f"{name} = {limit.value:.3g} is too close to {_threshold(name, limit, margin)} {_source(limit, cost)} to be "
        "called safe or unsafe. Raise max_iter or lower tol for a sharper answer."
    )


@dataclass(frozen=True)
class Watch:
    """What a sequence of checks has come to.

    Attributes:
        state: ``"safe"``, ``"edge"``, ``"unsafe"`` or ``"unresolved"``.
        failed: Consecutive checks that failed.
    """

    state: str = SAFE
    failed: int = 0


def severity(end: float, reference: float) -> float:
    """Measure how far the coming steps take the loss: ``log(end / reference)``.

    Args:
        end: Loss the steps end at.
        reference: Loss that training started from; losses at or below 0 cannot be compared.

    Returns:
        The severity, ``inf`` where the loss is not finite, ``nan`` where there is nothing to compare with.
    """
    if math.isnan(reference) or reference <= 0:
        return math.nan if math.isfinite(end) else math.inf
    if not math.isfinite(end):
        return math.inf
    return math.log(end / reference) if end > 0 else -math.inf


def fails(severe: float, alarm: float) -> bool:
    """Say whether a trial fails.

    Args:
        severe: Its severity; ``nan`` without one.
        alarm: Factor on the reference loss that counts as failure.

    Returns:
        Whether the severity is ``log(alarm)`` or more.
    """
    return severe >= math.log(alarm)


def passes(severe: float, alarm: float) -> bool:
    """Say whether a trial passes; between failing and passing nothing is decided.

    Args:
        severe: Its severity; ``nan`` without one.
        alarm: Factor on the reference loss that counts as failure.

    Returns:
        Whether the severity is half of ``log(alarm)`` or less.
    """
    return severe <= 0.5 * math.log(alarm)


def advance(watch: Watch, status: str, severe: float = math.nan, *, patience: int = 1, alarm: float = 3.0) -> Watch:
    """Take one more check into account.

    Where the coming steps were tried, their severity decides: ``log(alarm)`` and above fails, half of it and below
    passes, and between the two nothing changes (hysteresis). Rates beyond their critical values whose trial passes are
    at the edge of stability, where healthy runs live. Without a trial the rates' status alone decides.

    Args:
        watch: What the checks before it came to.
        status: The rates' own status at this check.
        severe: Severity of the trial; ``nan`` without one.
        patience: Consecutive failures before the state is unsafe.
        alarm: Factor on the reference loss that counts as failure, above 1.

    Returns:
        What it comes to now.
    """
    tried = not math.isnan(severe)
    bad = fails(severe, alarm) if tried else status == UNSAFE
    good = passes(severe, alarm) if tried else status == SAFE
    # Between the two levels a run of failures goes on neither counting nor ending.
    failed = watch.failed + 1 if bad else watch.failed if tried and not good else 0
    if (bad and failed >= patience) or (watch.state == UNSAFE and not good):
        return Watch(UNSAFE, failed)
    if status == UNSAFE:
        return Watch(EDGE if tried else watch.state, failed)
    return Watch(status, failed)
