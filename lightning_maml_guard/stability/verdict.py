"""Are the configured rates inside the safe region? The verdict, and why, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_maml_guard.messages.advice import Advice, Cause, settable
from lightning_maml_guard.messages.reasons import Kind, Reason, Remedy
from lightning_maml_guard.theory.limits import SAFE, UNRESOLVED, UNSAFE, Limit, worst

# What an inner rate beyond its limit does, by the order of MAML whose own condition is judged.
_EFFECTS = {"exact": "inner loop", "first": "first order", "simplified": "simplified"}

# A rate at its limit neither converges nor leaves room for curvature that grows: half of it is what to set.
_SHARE = 0.5


@dataclass(frozen=True)
class Verdict:
    """Whether the configured rates lie in the safe region.

    Attributes:
        status: ``"safe"``, ``"unsafe"`` or ``"unresolved"`` (the measurement does not clear the threshold).
        alpha_status: The same for the inner rate alone.
        beta_status: The same for the outer rate alone.
        findings: What is unsafe or unresolved, why, and what to do; empty when safe.
    """

    status: str
    alpha_status: str
    beta_status: str
    findings: tuple[Reason, ...]


@dataclass(frozen=True)
class VerdictContext:
    """What a verdict needs to know beside the limits.

    Attributes:
        margin: Fraction of the critical values that counts as the threshold, above 0.
        step: Training step; None outside a training.
        order: How the meta-gradient is taken; empty in plain training.
        exact: Whether the limits are those of the update as configured, or else of the simplified criterion.
        plain_sgd: Whether the meta-optimizer is SGD without momentum, so that the growth per step is known.
        plain_steps: Whether the inner loop is gradient descent at one rate for all steps.
        alpha_note: Why the inner rate has no limit, if so.
        beta_note: Why the outer rate has no limit, if so.
    """

    margin: float = 1.0
    step: int | None = None
    order: str = "simplified"
    exact: bool = False
    plain_sgd: bool = False
    plain_steps: bool = True
    alpha_note: str = ""
    beta_note: str = ""


def judge(alpha: Limit | None, beta: Limit | None, context: VerdictContext) -> Verdict:
    """Judge the configured rates; ``alpha`` is None in plain training, ``beta`` where no outer rate was given."""
    alpha_status = SAFE if alpha is None else alpha.status(context.margin, strict=False)
    beta_status = SAFE if beta is None else beta.status(context.margin, strict=True)
    findings = []
    if alpha is not None and alpha_status != SAFE:
        findings.append(_alpha_reason(alpha, alpha_status, context))
    if beta is not None and beta_status != SAFE:
        findings.append(_beta_reason(beta, beta_status, alpha_status, context))
    return Verdict(worst(alpha_status, beta_status), alpha_status, beta_status, tuple(findings))


def no_curvature(context: VerdictContext) -> Verdict:
    """State that the loss has no curvature, so that nothing follows: that is not the same as safe."""
    reason = Reason(Kind.NO_CURVATURE, step=context.step)
    return Verdict(UNRESOLVED, UNRESOLVED, UNRESOLVED, (reason,))


def _alpha_reason(limit: Limit, status: str, context: VerdictContext) -> Reason:
    reason = _compared("alpha", limit, status, context, context.alpha_note)
    if reason.kind is not Kind.ABOVE_LIMIT:
        return reason
    # The theorem of Takagi et al. is about simplified MAML; users of the other orders must know what it means for them.
    order = context.order if not context.exact and context.order in {"exact", "first"} else ""
    effect = _EFFECTS.get(context.order, "simplified") if context.exact else "simplified"
    if effect != "simplified" and not context.plain_steps:
        effect = f"{effect}, other steps"
    return replace(reason, effect=effect, order=order, remedy=Remedy.LOWER_ALPHA)


def _beta_reason(limit: Limit, status: str, alpha_status: str, context: VerdictContext) -> Reason:
    reason = _compared("beta", limit, status, context, context.beta_note)
    if reason.kind is not Kind.ABOVE_LIMIT:
        return reason
    if limit.critical == 0:
        return replace(reason, effect="no stable rate", remedy=Remedy.LOWER_ALPHA_FIRST)
    # beta_c moves with alpha: where alpha has to be lowered, this limit is not the one that counts.
    remedy = Remedy.LOWER_BETA_IF_STILL_ABOVE if alpha_status == UNSAFE else Remedy.LOWER_BETA
    if limit.value <= limit.critical:
        return replace(reason, effect="within the margin", remedy=remedy)
    growth = abs(1 - 2 * limit.ratio) if context.plain_sgd else math.nan
    return replace(reason, effect="grows", growth=growth, remedy=remedy)


def _compared(rate: str, limit: Limit, status: str, context: VerdictContext, note: str) -> Reason:
    kind, remedy = Kind.ABOVE_LIMIT, Remedy.NONE
    if status == UNRESOLVED and math.isnan(limit.critical):
        kind = Kind.NOT_JUDGED
    elif status == UNRESOLVED:
        kind, remedy = Kind.TOO_CLOSE, Remedy.MEASURE_SHARPER
    return Reason(
        kind,
        rate=rate,
        value=limit.value,
        limit=limit.critical,
        interval=limit.interval,
        margin=context.margin,
        remedy=remedy,
        step=context.step,
        detail=note if kind is Kind.NOT_JUDGED else "",
    )


def from_limits(
    verdict: Verdict, *, alpha: Limit, beta: float, safe_beta_c: float, margin: float, step: int | None
) -> Advice | None:
    """Advise on rates beyond their limits; None where none is.

    ``safe_beta_c`` is the outer rate's limit at an inner rate brought below its own: an outer rate that is fine there,
    or of which that is not known, is left alone.
    """
    high_alpha = verdict.alpha_status == UNSAFE
    high_beta = verdict.beta_status == UNSAFE and not (high_alpha and not beta >= margin * safe_beta_c)
    if not (high_alpha or high_beta):
        return None
    return Advice(
        cause=Cause.BOTH if high_alpha and high_beta else Cause.ALPHA if high_alpha else Cause.BETA,
        alpha=settable(_SHARE * margin * alpha.critical) if high_alpha else None,
        beta=settable(_SHARE * margin * safe_beta_c) if high_beta and 0 < safe_beta_c < math.inf else None,
        step=step,
        evidence=verdict.findings,
        configured_alpha=alpha.value,
        configured_beta=beta,
    )
