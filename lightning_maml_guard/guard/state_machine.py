"""The state of a run from one check to the next: safe, edge, unsafe or unresolved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_maml_guard.lookahead.divergence import fails, passes
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import EDGE, SAFE, UNSAFE


@dataclass(frozen=True)
class Watch:
    """The state after a sequence of checks, and how many consecutive checks failed."""

    state: str = SAFE
    failed: int = 0


class Transition(NamedTuple):
    """What a check changed: the state after it, and whether the run just entered or left ``unsafe``."""

    state: str
    entered: bool
    returned: bool


def advance(watch: Watch, status: str, severe: float = math.nan, *, patience: int = 1, ratio: float = 3.0) -> Watch:
    """Take one more check into account.

    With a lookahead its severity decides: ``log(ratio)`` and above fails, half of it and below passes. Between the two,
    an unsafe run stays unsafe and another does not become so (hysteresis). A rate beyond its critical value whose
    lookahead does not fail is at the edge of stability, as in many healthy runs. Without a lookahead (``severe`` is
    ``nan``) the rates' own status decides.
    """
    tried = not math.isnan(severe)
    bad = fails(severe, ratio) if tried else status == UNSAFE
    good = passes(severe, ratio) if tried else status == SAFE
    # Between the two levels a series of failures goes on neither counting nor ending.
    failed = watch.failed + 1 if bad else watch.failed if tried and not good else 0
    if (bad and failed >= patience) or (watch.state == UNSAFE and not good):
        return Watch(UNSAFE, failed)
    if status == UNSAFE:
        return Watch(EDGE if tried else watch.state, failed)
    return Watch(status, failed)


@dataclass
class StateMachine:
    """The states of a run over its checks: one of the run with lookaheads, else one of each rate.

    Attributes:
        patience: Consecutive failures before a state is unsafe.
        ratio: Factor on the loss that training started from at which a lookahead fails.
        watches: What is watched, by name: ``"run"``, or ``"alpha"`` and ``"beta"``.
    """

    patience: int
    ratio: float
    watches: dict[str, Watch] = field(default_factory=dict)

    @property
    def unsafe(self) -> bool:
        """Whether the rates are outside the safe region."""
        return any(watch.state == UNSAFE for watch in self.watches.values())

    def take(self, report: StabilityReport, severe: float) -> Transition:
        """Take a check in: what was measured, and the severity of its lookahead (``nan`` without one)."""
        tried = not math.isnan(severe)
        statuses = {"run": report.status} if tried else {"alpha": report.alpha_status, "beta": report.beta_status}
        before, was_unsafe = {name: self.watches.get(name, Watch()) for name in statuses}, self.unsafe
        self.watches = {
            name: advance(before[name], status, severe, patience=self.patience, ratio=self.ratio)
            for name, status in statuses.items()
        }
        entered = any(self.watches[n].state == UNSAFE and before[n].state != UNSAFE for n in statuses)
        state = self.watches["run"].state if tried else UNSAFE if self.unsafe else report.status
        return Transition(state, entered, was_unsafe and not self.unsafe)
