"""The learning rates that a run's schedule will apply from the coming step to the planned end."""

from __future__ import annotations

import math
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.scheduler_copy import SchedulerCopies
from lightning_maml_guard.optim.stability_limits import Optimizers, listed
from lightning_maml_guard.utils.random_state import preserved_randomness

if TYPE_CHECKING:
    from lightning_maml_guard.utils.lightning_compat import Plan

# Steps that are walked in runs without a planned end.
WITHOUT_END = 10_000
# Others are walked for 100,000 steps at most, less with more parameter groups: all take under a second.
MOST, LEAST = 100_000, 5_000
# Steps over which a rate has to rise, twice in a row, before it is expected to go on.
_HALF = 5
# Rates of one precision walked in another agree to about 1e-7 per step.
_RELATIVE = 1e-4


@dataclass(frozen=True)
class RatesAhead:
    """The scheduled rates per optimizer step; the largest over the parameter groups.

    Attributes:
        step: The step that was to come when the schedule was walked, on the caller's count.
        rates: ``rates[i]`` is the rate of step ``step + i``.
        configured: The number that users write: the optimizer's ``lr``, or a cyclic schedule's ``max_lr``.
        setting: Its name, ``"lr"`` or ``"max_lr"``.
        failure: Why the rates are not those of the schedule: from where it could not be walked on they are constant.
        at_peak: Momentum and betas where the rate is largest, by parameter group: a cyclic schedule moves them, too.
    """

    step: int
    rates: list[float]
    configured: float
    setting: str = "lr"
    failure: Exception | None = None
    at_peak: tuple[dict[str, Any], ...] = ()

    @property
    def rises(self) -> bool:
        """Whether the rate goes up from where it is first."""
        return self.peak()[0] > 1.01 * self.rates[0]

    def peak(self, step: int | None = None) -> tuple[float, int]:
        """Return the largest rate from a step on (None: the first) and the step at which it is first applied."""
        start = self._index(step)
        ahead = self.rates[start:]
        rate = max(ahead, key=_or_less)
        return rate, self.step + start + next((i for i, each in enumerate(ahead) if each == rate), 0)

    def highest(self, step: int, steps: int) -> float:
        """The largest rate of so many steps from a step on."""
        start = self._index(step)
        return max(self.rates[start : start + steps], key=_or_less)

    @property
    def mean_to_peak(self) -> float:
        """The mean of the coming rates over the largest of them; 1 where that is not a number above 0."""
        peak, known = self.peak()[0], [rate for rate in self.rates if math.isfinite(rate)]
        return sum(known) / len(known) / peak if math.isfinite(peak) and peak > 0 else 1.0

    def first_above(self, limit: float, step: int | None = None) -> int | None:
        """Return the first step, from a step on, whose rate is above the limit."""
        start = self._index(step)
        return next((self.step + i for i in range(start, len(self.rates)) if self.rates[i] > limit), None)

    def exceeding(self, limit: float, step: int) -> tuple[Reason, ...]:
        """State where, from a step on, rising rates exceed a limit, if they do."""
        peak, at = self.peak()
        if not (self.rises and limit < peak):
            return ()
        return (Reason(Kind.SCHEDULE_AHEAD, beta=peak, steps=at, limit=limit, step=self.first_above(limit, step)),)

    def matches(self, step: int, rate: float) -> bool:
        """Return True if this rate was forecast for this step; else the schedule is to be walked again."""
        index = step - self.step
        if not 0 <= index < len(self.rates):
            return False
        expected = self.rates[index]
        if math.isclose(expected, rate, rel_tol=_RELATIVE) or (math.isnan(expected) and math.isnan(rate)):
            return True
        return abs(expected - rate) <= 1e-6 * abs(self.peak()[0])  # near 0, at a cosine's end

    def lr_for_peak(self, peak: float) -> float:
        """Return the number to configure so that the coming rates peak here; rates scale with that number."""
        present = self.peak()[0]
        if not (math.isfinite(present) and present > 0) or math.isclose(present, self.configured, rel_tol=1e-6):
            return peak
        return peak * self.configured / present

    def _index(self, step: int | None) -> int:
        return 0 if step is None else min(max(step - self.step, 0), len(self.rates) - 1)


def to_configure(ahead: RatesAhead | None, peak: float) -> float:
    """The number to configure so that rates peak here, under a schedule or none."""
    return peak if ahead is None else ahead.lr_for_peak(peak)


def crossing(ahead: RatesAhead | None, limit: float, step: int) -> tuple[Reason, ...]:
    """State where a schedule exceeds a limit, if there is one and it does."""
    return () if ahead is None else ahead.exceeding(limit, step)


class RateTrend:
    """The highest inner and outer rate of the next steps: as scheduled, or where they go if they rise on.

    A rate that no schedule moves rises on if it rose in both halves of the last ten steps; one that has jumped is
    expected to stay.
    """

    def __init__(self) -> None:
        self._rates: deque[tuple[float, float]] = deque(maxlen=2 * _HALF + 1)

    def take(
        self, rates: tuple[float, float], schedule: RatesAhead | None, step: int, steps: int
    ) -> tuple[float, float]:
        """Take in the rates before a step, and return the highest ones of so many steps."""
        self._rates.append(rates)
        alpha, beta = self._risen(0, steps), self._risen(1, steps)
        if schedule is not None and schedule.matches(step, rates[1]):
            beta = schedule.highest(step, steps)
        return alpha, beta

    def _risen(self, which: int, steps: int) -> float:
        now = self._rates[-1][which]
        if len(self._rates) <= 2 * _HALF:
            return now
        first, middle = self._rates[0][which], self._rates[_HALF][which]
        return now + steps * (min(now - middle, middle - first) / _HALF) if now > middle > first else now


def _or_less(rate: float) -> float:
    return -math.inf if math.isnan(rate) else rate


def read_ahead(plan: Plan, optimizers: Optimizers, step: int) -> RatesAhead:
    """Walk copies of the schedulers of a run to its planned end; ``step`` is the number of the coming step.

    Runs without a planned end are walked for 10,000 steps. ReduceLROnPlateau is taken as constant.
    """
    live = listed(optimizers)
    groups = sum(len(optimizer.param_groups) for optimizer in live)
    most = max(LEAST, 4 * MOST // (3 + groups))
    steps = max(1, min(most, WITHOUT_END if plan.steps is None else plan.steps))
    rates, failure, at_peak = [scheduled_rate(live)], plan.failure, _memories(live)
    configs = [config for config in plan.schedulers if not config.reduce_on_plateau]
    if configs and failure is None:
        with preserved_randomness(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler that steps before its optimizer did
            try:
                copies, highest = SchedulerCopies(live, plan.shared), rates[0]
                schedulers = copies.copies([config.scheduler for config in configs])
                for _ in _walk(plan, configs, schedulers, steps - 1):
                    rates.append(scheduled_rate(copies.optimizers))
                    if rates[-1] > highest:
                        highest, at_peak = rates[-1], _memories(copies.optimizers)
            except Exception as error:  # the user's code
                failure = error
    rates += [rates[-1]] * (steps - len(rates))
    configured = _configured(live, [config.scheduler for config in configs])
    return RatesAhead(step, rates, *configured, failure, at_peak)


def _walk(plan: Plan, configs: Sequence[Any], schedulers: Sequence[Any], steps: int) -> Iterator[None]:
    """Step schedulers as Lightning does after each optimizer step.

    ``frequency`` counts batches of the epoch, and is asked for only after a batch with an optimizer step.
    """
    both = list(zip(configs, schedulers, strict=True))
    by_step = [(config.frequency, scheduler) for config, scheduler in both if config.interval == "step"]
    by_epoch = [(config.frequency, scheduler) for config, scheduler in both if config.interval == "epoch"]
    last = sys.maxsize if plan.batches is None else plan.batches
    batch, epoch = plan.batch, plan.epoch
    for _ in range(steps):
        batch = min((batch // plan.accumulate + 1) * plan.accumulate, last)
        for frequency, scheduler in by_step:
            if batch % frequency == 0:
                scheduler.step()
        if batch == last:
            batch, epoch = 0, epoch + 1
            for frequency, scheduler in by_epoch:
                if epoch % frequency == 0:
                    scheduler.step()
        yield


def _memories(optimizers: Sequence[Optimizer]) -> tuple[dict[str, Any], ...]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return tuple({key: group[key] for key in ("momentum", "betas") if key in group} for group in groups)


def _configured(optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> tuple[float, str]:
    """The number that users write for the rate, and its name."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for scheduler in _single(schedulers):
        if isinstance(scheduler, OneCycleLR) and all("max_lr" in group for group in groups):
            return max(float(group["max_lr"]) for group in groups), "max_lr"
        if isinstance(scheduler, CyclicLR):
            return max(map(float, scheduler.max_lrs)), "max_lr"
    return max(float(group.get("initial_lr", group["lr"])) for group in groups), "lr"


def _single(schedulers: Sequence[Any]) -> Iterator[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _single(getattr(scheduler, "_schedulers", ()))
