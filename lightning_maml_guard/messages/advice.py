"""Advice: which rate is to blame and what to set it to, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from lightning_maml_guard.messages.reasons import Reason


class Cause(str, Enum):
    """What is to blame. The values stand in checkpoints."""

    ALPHA = "alpha"
    BETA = "beta"
    BOTH = "both"
    SCHEDULE = "schedule"
    BATCH = "batch"
    DEAD_UNITS = "dead units"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to change so that the run trains: numbers to set, not limits.

    Attributes:
        cause: What is to blame: ``"alpha"``, ``"beta"``, ``"both"``, ``"schedule"`` (it takes the outer rate too high),
            ``"batch"`` (one is an outlier), ``"dead units"`` (an outer rate that is too large has killed them) or
            ``"unknown"``.
        alpha: The inner rate to configure; of several, the largest: lower the others in proportion. None: leave it.
        beta: The outer rate to configure, the ``lr`` of the optimizer; under a schedule the number that its peak comes
            from. If parameter groups differ, the largest: lower the others in proportion. None: leave it as it is.
        setting: Name of the argument that ``beta`` is for: ``"lr"``, or a cyclic schedule's ``"max_lr"``.
        gradient_clip_val: Norm to clip gradients to, ``Trainer(gradient_clip_val=...)``, where a batch is to blame
            whose gradient is finite.
        step: Training step at which the advice was given; None outside a training.
        evidence: Why: what was measured and tried.
        configured_alpha: The inner rate that the advice is about.
        configured_beta: The outer rate that it is about; under a schedule its peak.
        peak_step: Step at which the schedule reaches that peak.
        several: Whether the optimizer's parameter groups have different rates.
    """

    cause: Cause
    alpha: float | None = None
    beta: float | None = None
    setting: str = "lr"
    gradient_clip_val: float | None = None
    step: int | None = None
    evidence: tuple[Reason, ...] = ()
    configured_alpha: float = math.nan
    configured_beta: float = math.nan
    peak_step: int | None = None
    several: bool = False

    def is_about(self, alpha: float, beta: float) -> bool:
        """Return True if these are the configured rates that it is about."""
        pairs = ((self.configured_alpha, alpha), (self.configured_beta, beta))
        return all(math.isclose(one, other) or (math.isnan(one) and math.isnan(other)) for one, other in pairs)

    def __str__(self) -> str:
        """Say it in one line."""
        from lightning_maml_guard.messages.advice_sentences import advised

        return advised(self)


def cause_of(*, alpha: bool, beta: bool, rising: bool, died: bool) -> Cause:
    """What is to blame where these rates are to be lowered: ``rising`` by a schedule, or units have ``died``."""
    if alpha:
        return Cause.BOTH if beta else Cause.ALPHA
    if not beta:
        return Cause.UNKNOWN
    return Cause.DEAD_UNITS if died else Cause.SCHEDULE if rising else Cause.BETA


def settable(rate: float) -> float:
    """Round a rate to the two digits that somebody would configure."""
    return float(f"{rate:.1e}") if math.isfinite(rate) else rate
