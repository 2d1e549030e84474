"""RunRecord: what a guard knows of a run, as pages and summaries read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_maml_guard.lookahead.loss_curve import LossCurve
from lightning_maml_guard.messages.advice import Advice
from lightning_maml_guard.messages.spelling import Spelling


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a guard knows of a run.

    Attributes:
        settings: The guard's arguments by name.
        spelling: How messages write them.
        history: The reports of the latest checks.
        severities: Steps and severities of the lookaheads.
        events: Rollbacks, stops and notices: ``step``, ``kind`` and ``reasons`` of each.
        losses: The losses of the steps.
        start: The loss that training started from; ``nan`` where it is not known.
        stopped_step: Step at which the guard stopped the run; None if it did not.
        stopping_reason: Why.
        advice: What to set; None while there is nothing to say.
        check_seconds: Time that checks took since the run began or was resumed.
        seconds: Time of the whole run since then; 0 before it has begun.
    """

    settings: dict[str, Any]
    spelling: Spelling
    history: Sequence[Any]
    severities: Sequence[tuple[int, float]]
    events: Sequence[Any]
    losses: LossCurve
    start: float = math.nan
    stopped_step: int | None = None
    stopping_reason: str | None = None
    advice: Advice | None = None
    check_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def margin(self) -> float:
        """Fraction of the critical values that counts as the threshold."""
        return float(self.settings["margin"])

    @property
    def divergence_ratio(self) -> float:
        """Factor on the loss at the start from which a loss has diverged."""
        return float(self.settings["lookahead"].divergence_ratio)

    @property
    def steps(self) -> int:
        """Steps that are known to have been taken."""
        last = self.history[-1].step if self.history else None
        return max(self.losses.end, last or 0)
