"""When to check: every N steps as far as the budget pays, and in between when a step's loss or gradient norm spikes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Cost of a gradient of a lookahead, in training steps (`python -m benchmarks.hvp_cost`).
LOOKAHEAD_GRADIENT = 1.2
# About the cost of a check that measures no curvature.
_LOOK_COST = 15.0
# Training steps' worth of checks that every run is given beside its share: the first check, a few looks, two searches.
_CREDIT = 300.0
# The last early check, and the one that a run whose loss does not fall is given in any case.
_LAST_EARLY, STALLED = 128, 64
# Early checks that a short run is given although it does not pay for them.
_ON_CREDIT = (2, 8)
# First step at which Adam's second moment tells anything. After one step it is a single gradient's: where an entry is
# near 0, the limit is (the sinusoid's beta_c at steps 1 and 2, three seeds: 1e-6, .09; .002, .15; .006, .18).
_FIRST_JUDGED = 2
# A rate that has grown by half is checked again, unless its limit is more than this many times higher.
_GROWN, _FAR_BELOW_LIMIT = 1.5, 4.0
# Capped rates are checked again after so many steps; if they stay, after so many times as many each time.
_CAPS_GAP, _CAPS_GAP_FACTOR = 8, 3
# The loss stagnates if its mean reached no new low for so many steps and for such a share of the steps so far.
_STAGNATES = (48, 0.2)
# Sooner after capped rates were raised ...
_STAGNATES_AFTER_RAISE = (32, 0.1)
# ... and a new low within so many steps of a change is not its doing.
_SETTLES = 16
# A check that finds no loss is postponed to the next step, at most so many times in a row.
_MOST_POSTPONED = 8
SCHEDULED, TRIGGERED = "scheduled", "triggered"


@dataclass
class Rise:
    """How a rate has risen.

    Attributes:
        looked: The rate at the last check, or the lowest one since.
        highest: The highest rate so far.
    """

    looked: float = math.inf
    highest: float = 0.0

    def grown(self, rate: float, critical: float, *, again: bool) -> bool:
        """Whether the rate has grown by half since the last check, or since its lowest value after that.

        Not if its limit is far above, nor, unless ``again``, if it was as high before, as in a cyclic schedule.
        """
        if not rate > 0:
            return False
        self.looked, highest = min(self.looked, rate), self.highest
        self.highest = max(highest, rate)
        return rate > _GROWN * self.looked and not _FAR_BELOW_LIMIT * rate < critical and (rate > highest or again)


@dataclass
class ScheduleState:
    """What a schedule remembers from step to step.

    Attributes:
        last: Step of the latest check.
        spiked: Whether a step called a check that has not come yet.
        diverged: Whether the loss of that step had diverged.
        gap: Steps that a triggered check has to wait after the last one.
        unjudged: Whether the first check could not judge the outer rate yet (Adam before its first step), so that the
            second one need not be paid for.
        spent: Cost of all checks so far, in training steps.
        paid: Cost of those checks that the steps taken had paid for.
        latest: Cost of the latest check.
        full: Cost of the latest scheduled one, which measures curvature.
        lost: Whether the loss of the step that called a check was not finite.
        alarms: False alarms in a row: checks called by a diverged loss that found the run well.
        outer: How the outer rate has risen.
        inner: How the inner rate has.
        slipped: Whether the loss had left its best at the last step.
        ease_at: Step from which capped rates are checked again.
        ease_gap: Steps from one such check to the next.
        lowest: The lowest mean loss since the caps were changed, or checked because it stagnated.
        lowest_at: Step of that loss.
        moved_at: Step at which the caps were changed.
        raised_from: The outer rate before the caps were raised, until the loss reaches a new low; else ``nan``.
        waits: How many times the check that comes with the next step was postponed.
    """

    last: int | None = None
    spiked: bool = False
    diverged: bool = False
    gap: int = 2
    unjudged: bool = False
    spent: float = 0.0
    paid: float = 0.0
    latest: float = 0.0
    full: float = 0.0
    lost: bool = False
    alarms: int = 0
    outer: Rise = field(default_factory=Rise)
    inner: Rise = field(default_factory=Rise)
    slipped: bool = False
    ease_at: int = 0
    ease_gap: int = _CAPS_GAP
    lowest: float = math.inf
    lowest_at: int = 0
    moved_at: int = 0
    raised_from: float = math.nan
    waits: int = 0


class Schedule:
    """Decides at which steps to check.

    Without a budget (``share`` of the training's work; None: none) a check comes at every N-th step, whatever was
    triggered in between. With one, these and triggered checks come as the steps taken pay for them, beside a fixed
    credit for what cannot wait: the first checks, early spikes, a rate that rises. What goes beyond the credit is paid
    for like the rest.

    A triggered check waits after each one before it twice as long as the last time, up to half of ``every_n_steps``;
    with a budget, those that would have to wait longer wait until they are paid for by what no measurement needs.
    A check of a diverged loss comes in the next step; where such checks find nothing, the loss is noisy, and each waits
    twice as long as the one before, up to that half. A loss that is not finite never waits.
    """

    def __init__(self, every_n_steps: int, share: float | None = None, state: ScheduleState | None = None) -> None:
        self.every_n_steps, self.share = every_n_steps, share
        self.planned: int | None = None  # steps of the whole run, where it has an end
        self.state = state or ScheduleState()
        self._kind, self._from_share = SCHEDULED, False  # of the check at hand

    def due(
        self,
        step: int,
        *,
        rate: float = math.nan,
        beta_c: float = math.nan,
        alpha: float = math.nan,
        alpha_c: float = math.nan,
        stalled: bool = False,
        capped: bool = False,
    ) -> str | None:
        """Return ``"scheduled"``, ``"triggered"`` or None; a check that is due is taken as made.

        ``rate`` is the outer rate of the coming step, ``beta_c`` its latest known limit, ``alpha`` and ``alpha_c`` are
        those of the inner rate; ``stalled``: the loss does not fall; ``capped``: lower rates than the configured ones
        are applied.
        """
        state = self.state
        if step == state.last:
            return None
        since = math.inf if state.last is None else step - state.last
        # With a budget a triggered check stands for the scheduled one that would follow it closely.
        close = since < self.every_n_steps / 2
        on_time = step % self.every_n_steps == 0 and not (close and self.share is not None)
        caps_due = capped and since >= 2 and (step >= state.ease_at or self.stagnates(step))
        early = self._early_look_due(step, stalled) or caps_due
        postponed = 0 < state.waits <= _MOST_POSTPONED
        regular = on_time and self._within_budget(state.full, step)
        first = state.last is None  # also of a run that is resumed, or fitted again
        scheduled = first or postponed or regular or (state.unjudged and (on_time or (early and step >= _FIRST_JUDGED)))
        again = since >= self._longest_wait
        # Both are asked, as both take the rates in.
        grown = any([state.outer.grown(rate, beta_c, again=again), state.inner.grown(alpha, alpha_c, again=again)])
        only_triggered = not (scheduled or early or grown)
        if only_triggered and not state.spiked:
            return None
        # Looks leave what a measurement costs, or they would take the share before it is enough for one.
        paid = self._within_budget(state.latest + state.full, step)
        if only_triggered and not self._trigger_due(step, since, paid):
            return None
        if self.share is None:
            if not (scheduled or early):
                state.gap = min(2 * state.gap, self._longest_wait)
            elif not close and not state.spiked:  # else the loss is as noisy as it was
                state.gap = 2
        elif only_triggered and not paid:
            state.gap *= 2
        if since > self.every_n_steps:
            state.alarms = 0
        if state.diverged and only_triggered:
            state.alarms += 1
        self._kind = SCHEDULED if scheduled else TRIGGERED
        waited = only_triggered and not state.diverged
        self._from_share = state.spent > 0 and (regular or (paid and waited))
        state.last, state.spiked, state.diverged, state.lost = step, False, False, False
        state.outer.looked = math.inf if math.isnan(rate) else rate
        state.inner.looked = math.inf if math.isnan(alpha) else alpha
        if scheduled:
            state.unjudged = False
        return self._kind

    def _early_look_due(self, step: int, stalled: bool) -> bool:
        """Whether an early check is due: at steps 1, 2, 4, ... if the whole run pays for it, and once if stalled."""
        if self.share is None or step <= 0 or step & (step - 1) or step > _LAST_EARLY:
            return False
        if stalled and step == STALLED:
            return True
        state = self.state
        if self.planned is not None and state.spent + _LOOK_COST <= self.share * self.planned:
            return True
        return step in _ON_CREDIT

    def spike(self, *, diverged: bool, lost: bool = False) -> None:
        """Call a check because of a spike: soon if the loss has diverged, at once if it is not finite."""
        state = self.state
        state.spiked, state.diverged, state.lost = True, state.diverged or diverged, state.lost or lost

    def note_left_best(self, left_best: bool) -> None:
        """Call a check, whatever it costs, when the loss leaves its best."""
        if left_best and not self.state.slipped:
            self.spike(diverged=True)
        self.state.slipped = left_best

    def note_mean_loss(self, mean: float, step: int) -> None:
        """Keep the lowest mean loss."""
        state = self.state
        if mean < state.lowest:
            state.lowest, state.lowest_at = mean, step
            if step > state.moved_at + _SETTLES:
                state.raised_from = math.nan

    def stagnates(self, step: int) -> bool:
        """Whether the mean loss has reached no new low for long."""
        least, share = _STAGNATES_AFTER_RAISE if self.raised else _STAGNATES
        return step - self.state.lowest_at >= max(least, share * step)

    @property
    def raised(self) -> bool:
        """Whether capped rates were raised that have not led further down yet."""
        return not math.isnan(self.state.raised_from)

    def ends_before(self, step: int) -> bool:
        """Whether the run ends before the loss could reach a new low at rates that are raised now."""
        least, share = _STAGNATES_AFTER_RAISE
        return self.planned is not None and self.planned - step < max(least, share * step)

    def note_caps_checked(self, step: int, *, changed: bool, until: int = 0, raised_from: float = math.nan) -> None:
        """Plan the next check of capped rates: soon if they were changed, later if not.

        ``until``: step before which no others may be tried; ``raised_from``: the outer rate applied so far if it was
        raised.
        """
        state = self.state
        if changed or self.stagnates(step):
            state.lowest, state.lowest_at = math.inf, step
        if changed:
            state.moved_at, state.raised_from = step, raised_from
        if not until:
            state.ease_gap = _CAPS_GAP if changed else _CAPS_GAP_FACTOR * state.ease_gap
        state.ease_at = max(step + state.ease_gap, until)

    def confirm_divergence(self) -> None:
        """Note that a check found the run diverging: it was no false alarm."""
        self.state.alarms = 0

    def postpone(self) -> bool:
        """Postpone the check to the next step, which may have a loss; False if that was done too often."""
        self.state.waits += 1
        return self.state.waits <= _MOST_POSTPONED

    def charge(self, *, lookahead_gradients: float, measured: float) -> None:
        """Count the cost of a check: gradients of its lookaheads, and its measurement in training steps."""
        state, cost = self.state, LOOKAHEAD_GRADIENT * lookahead_gradients + measured
        state.latest, state.spent, state.waits = cost, state.spent + cost, 0
        state.paid += cost if self._from_share else 0.0
        state.full = cost if self._kind == SCHEDULED else state.full

    def _within_budget(self, cost: float, step: int) -> bool:
        """Whether one more check of this cost stays within the budget; the first one always does."""
        state = self.state
        if self.share is None or state.spent == 0:
            return True
        return max(state.paid, state.spent - _CREDIT) + cost <= self.share * step

    def affords(self, cost: float, step: int) -> bool:
        """Return True if the whole run and its credit pay for a cost, in training steps."""
        if self.share is None:
            return True
        return self.state.spent + cost <= self.share * max(self.planned or 0, step) + _CREDIT

    @property
    def _longest_wait(self) -> int:
        return max(self.every_n_steps // 2, 2)

    def _trigger_due(self, step: int, since: float, paid: bool) -> bool:
        state = self.state
        if state.diverged:  # waits for no payment
            return state.lost or since >= min(2**state.alarms, self._longest_wait) or since > self.every_n_steps
        if self.share is None:
            return since >= state.gap
        # The first few are on credit: a run that diverges early has paid for nothing.
        credit = state.gap <= self._longest_wait and self.affords(_LOOK_COST, step)
        return (paid and since >= 2) or (credit and since >= state.gap)
