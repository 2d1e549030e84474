"""When to look: every N steps, and in between when a step leaves the running range of those before."""

from __future__ import annotations

import math
from typing import Any

from lightning_maml_guard.guard.divergence import RunningRange
from lightning_maml_guard.stability.budget import Budget

SCHEDULED, TRIGGERED = "scheduled", "triggered"


class Lookout:
    """Decides at which steps to check.

    Attributes:
        unjudged: Whether the first check could not judge the meta rate yet (Adam before its first step): the second one
            then need not be paid for.

    Args:
        every_n_steps: Steps between two scheduled checks.
        budget: What they may cost. A triggered check waits after each one before it twice as long as the last time, up
            to half of ``every_n_steps``; with a share, those that would have to wait longer wait until they are paid
            for. A check of a lost loss waits no longer than that half, and for no payment.
    """

    def __init__(self, every_n_steps: int, budget: Budget | None = None) -> None:
        self.every_n_steps = every_n_steps
        self.budget = budget or Budget(None)
        self.range = RunningRange()
        self.last: int | None = None
        self.unjudged = False
        self._spiked = self._lost = False
        self._gap = 2

    def due(self, step: int, *, at_once_if_lost: bool = False) -> str | None:
        """Say whether to check now; a yes is taken as done.

        Args:
            step: The coming step.
            at_once_if_lost: Whether a lost loss waits for nothing.

        Returns:
            ``"scheduled"``, ``"triggered"`` or None.
        """
        if step == self.last:
            return None
        since = math.inf if self.last is None else step - self.last
        paid = self.budget.allows(step)
        # A triggered check stands for the scheduled one that would follow it closely.
        scheduled = step % self.every_n_steps == 0 and since >= self.every_n_steps / 2 and (paid or self.unjudged)
        if not scheduled and not self._called(since, paid, at_once_if_lost):
            return None
        if self.budget.share is None:
            self._gap = 2 if scheduled else min(2 * self._gap, self._longest)
        elif not paid:
            self._gap *= 2
        self.last, self._spiked, self._lost = step, False, False
        if scheduled:
            self.unjudged = False
        return SCHEDULED if scheduled else TRIGGERED

    @property
    def called(self) -> bool:
        """Whether a step called a check that has not come yet."""
        return self._spiked

    @property
    def _longest(self) -> int:
        return max(self.every_n_steps // 2, 2)

    def _called(self, since: float, paid: bool, at_once_if_lost: bool) -> bool:
        if not self._spiked:
            return False
        if self._lost:  # does not wait as long as a loss that is noisy, and not for money
            return at_once_if_lost or since >= min(self._gap, self._longest)
        if self.budget.share is None:
            return since >= self._gap
        # The first few are on credit: a run that dies young has paid for nothing.
        return (paid and since >= 2) or (self._gap <= self._longest and since >= self._gap)

    def saw(self, loss: float, norm: float, *, alarm: float, triggers: bool) -> None:
        """Take a step's loss and gradient norm in.

        Args:
            loss: The loss.
            norm: The gradient norm; ``nan`` if not known.
            alarm: Factor on the loss at the start from which on the loss is lost.
            triggers: Whether they may call a check.
        """
        if self.range.leaves(loss, norm) and triggers:
            self._spiked = True
            self._lost = self._lost or self.range.lost(loss, alarm)

    def state(self) -> dict[str, Any]:
        """Collect the state as primitives.

        Returns:
            What :meth:`load` takes.
        """
        return {
            "last_step": self.last,
            "range": self.range.state(),
            "triggered": [self._spiked, self._lost, self._gap],
            "unjudged": self.unjudged,
            **self.budget.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state.

        Args:
            state: What :meth:`state` collected.
        """
        self.last = state.get("last_step")
        self.range.load(state.get("range", {}))
        self.budget.load(state)
        self.unjudged = bool(state.get("unjudged"))
        self._spiked, self._lost, self._gap = state.get("triggered", (False, False, 2))
