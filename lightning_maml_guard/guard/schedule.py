"""When to check: every N steps as far as the budget pays, and in between when a step's loss or gradient norm spikes."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Cost of a gradient of a lookahead, in training steps (`python -m benchmarks.hvp_cost`).
LOOKAHEAD_GRADIENT = 1.2
SCHEDULED, TRIGGERED = "scheduled", "triggered"


@dataclass
class ScheduleState:
    """What a schedule remembers from step to step.

    Attributes:
        last: Step of the latest check.
        spiked: Whether a step called a check that has not come yet.
        diverged: Whether its loss had diverged.
        gap: Steps that a triggered check has to wait after the last one.
        unjudged: Whether the first check could not judge the meta rate yet (Adam before its first step): the second
            one need not be paid for then.
        spent: Cost of all checks so far, in training steps.
        latest: Cost of the latest one.
    """

    last: int | None = None
    spiked: bool = False
    diverged: bool = False
    gap: int = 2
    unjudged: bool = False
    spent: float = 0.0
    latest: float = 0.0


class Schedule:
    """Decides at which steps to check.

    Without a budget (``share`` of the training's work; None: none) a check comes at every N-th step, whatever was
    triggered in between. A triggered check waits after each one before it twice as long as the last time, up to half of
    ``every_n_steps``; with a budget, those that would have to wait longer wait until they are paid for. A check of a
    diverged loss waits no longer than that half, and for no payment.
    """

    def __init__(self, every_n_steps: int, share: float | None = None, state: ScheduleState | None = None) -> None:
        self.every_n_steps, self.share = every_n_steps, share
        self.state = state or ScheduleState()

    def due(self, step: int, *, at_once_if_diverged: bool = False) -> str | None:
        """Return ``"scheduled"``, ``"triggered"`` or None; a check that is due is taken as made."""
        state = self.state
        if step == state.last:
            return None
        since = math.inf if state.last is None else step - state.last
        paid = self._paid(step)
        # With a budget a triggered check stands for the scheduled one that would follow it closely.
        close = since < self.every_n_steps / 2
        on_time = step % self.every_n_steps == 0 and not (close and self.share is not None)
        scheduled = on_time and (paid or state.unjudged)
        if not scheduled and not self._called(since, paid, at_once_if_diverged):
            return None
        if self.share is None:
            if not scheduled:
                state.gap = min(2 * state.gap, self._longest)
            elif not close and not state.spiked:  # else the loss is as noisy as it was
                state.gap = 2
        elif not paid:
            state.gap *= 2
        state.last, state.spiked, state.diverged = step, False, False
        if scheduled:
            state.unjudged = False
        return SCHEDULED if scheduled else TRIGGERED

    def spike(self, *, diverged: bool) -> None:
        """Take a spike in: it calls a check, soon if the loss has diverged."""
        self.state.spiked = True
        self.state.diverged = self.state.diverged or diverged

    def charge(self, *, lookahead_gradients: int, measured: float) -> None:
        """Count the cost of a check: gradients of its lookaheads, and its measurement in training steps."""
        self.state.latest = LOOKAHEAD_GRADIENT * lookahead_gradients + measured
        self.state.spent += self.state.latest

    def _paid(self, step: int) -> bool:
        """Whether one more check like the latest stays within the budget; the first one always does."""
        state = self.state
        return self.share is None or state.spent == 0 or state.spent + state.latest <= self.share * step

    @property
    def _longest(self) -> int:
        return max(self.every_n_steps // 2, 2)

    def _called(self, since: float, paid: bool, at_once_if_diverged: bool) -> bool:
        state = self.state
        if not state.spiked:
            return False
        if state.diverged:  # does not wait as long as a loss that is noisy, and not for the budget
            return at_once_if_diverged or since >= min(state.gap, self._longest)
        if self.share is None:
            return since >= state.gap
        # The first few are on credit: a run that diverges early has paid for nothing.
        return (paid and since >= 2) or (state.gap <= self._longest and since >= state.gap)
