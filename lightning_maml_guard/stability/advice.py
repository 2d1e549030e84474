"""Advice from critical rates alone: what to set where no steps can be tried."""

from __future__ import annotations

import math

from lightning_maml_guard.messages.advice import Advice, Cause, settable
from lightning_maml_guard.stability.reasons import Verdict
from lightning_maml_guard.theory.limits import UNSAFE, Limit

# A rate at its limit neither converges nor leaves room for curvature that grows: half of it is what to set.
SHARE = 0.5


def from_limits(
    verdict: Verdict, *, alpha: Limit, beta: float, safe_beta_c: float, margin: float, step: int | None
) -> Advice | None:
    """Advise on rates beyond their limits; None where none is.

    ``safe_beta_c`` is the meta rate's limit at an inner rate brought below its own: a meta rate that is fine there is
    left alone.
    """
    high_alpha = verdict.alpha_status == UNSAFE
    high_beta = verdict.beta_status == UNSAFE and not (high_alpha and beta < margin * safe_beta_c)
    if not (high_alpha or high_beta):
        return None
    return Advice(
        cause=Cause.BOTH if high_alpha and high_beta else Cause.ALPHA if high_alpha else Cause.BETA,
        alpha=settable(SHARE * margin * alpha.critical) if high_alpha else None,
        beta=settable(SHARE * margin * safe_beta_c) if high_beta and 0 < safe_beta_c < math.inf else None,
        step=step,
        evidence=verdict.findings,
        configured_alpha=alpha.value,
        configured_beta=beta,
    )
