"""What a guard has seen and said in the course of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_maml_guard.guard.loggers import warn
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import UNSAFE, Watch, advance
from lightning_maml_guard.utils.warnings import GuardWarning

_EVENTS = 1000  # kept at most
# Shares of the largest curvature so far and of the loss at the start: a dead network has hardly any of the first left,
# and is not below the second.
_COLLAPSED, _UNLEARNED = 0.15, 0.8


class Turn(NamedTuple):
    """What a check changed.

    Attributes:
        state: The state after it.
        entered: Whether the rates left the safe region just now.
        returned: Whether they came back just now.
    """

    state: str
    entered: bool
    returned: bool


@dataclass
class Course:
    """The states of a run's rates over its checks, and what the user was told.

    Where the coming steps were tried there is one state, of the run; without trials each rate has its own.

    Attributes:
        patience: Consecutive failures before a state is unsafe.
        alarm: See :func:`lightning_maml_guard.theory.limits.advance`.
        watches: The states by what they are about.
        said: The gist of what was said once.
        sharpest: The largest ``lambda_max`` so far.
        events: Step, kind and text of what befell the run besides its states, the latest ones; the step is -1 where it
            is not known.
    """

    patience: int
    alarm: float
    watches: dict[str, Watch] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    sharpest: float = 0.0
    events: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def unsafe(self) -> bool:
        """Whether the rates are outside the safe region."""
        return any(watch.state == UNSAFE for watch in self.watches.values())

    def take(self, report: StabilityReport) -> Turn:
        """Take a check in.

        Args:
            report: What it found.

        Returns:
            What it changed.
        """
        tried = not math.isnan(report.severity)
        statuses = {"run": report.status} if tried else {"alpha": report.alpha_status, "beta": report.beta_status}
        before, was_unsafe = {name: self.watches.get(name, Watch()) for name in statuses}, self.unsafe
        self.watches = {
            name: advance(before[name], status, report.severity, patience=self.patience, alarm=self.alarm)
            for name, status in statuses.items()
        }
        entered = any(self.watches[n].state == UNSAFE and before[n].state != UNSAFE for n in statuses)
        state = self.watches["run"].state if tried else UNSAFE if self.unsafe else report.status
        return Turn(state, entered, was_unsafe and not self.unsafe)

    def lost_curvature(self, report: StabilityReport, loss: float, start: float) -> bool:
        """Say whether nearly all curvature is gone, and not because the run has learned.

        Args:
            report: What a check found.
            loss: Running mean of the loss.
            start: Loss that training started from.

        Returns:
            Whether it is so.
        """
        self.sharpest = max(self.sharpest, report.lambda_max)
        return report.lambda_max < _COLLAPSED * self.sharpest and loss > _UNLEARNED * start

    def note(self, step: int, kind: str, text: str) -> None:
        """Keep what befell the run, for its report.

        Args:
            step: Training step; -1 where it is not known.
            kind: One or two words.
            text: What happened and why.
        """
        self.events = [*self.events, (step, kind, text)][-_EVENTS:]

    def say_once(self, message: str, *, just_said: bool = False, step: int = -1) -> None:
        """Warn, unless the same was said before with other numbers in it.

        Args:
            message: What happened.
            just_said: Whether another message has this one in it, so that it counts as said.
            step: Training step; -1 where it is not known.
        """
        gist = re.sub(r"0x[0-9a-f]+|[-+]?[0-9]+[0-9.e+-]*", "#", message)
        if gist not in self.said:
            self.said.add(gist)
            if not just_said:
                self.note(step, "notice", message)
                warn(message)

    @contextmanager
    def only_told(self, what: str) -> Iterator[None]:
        """Let a failure outside a check cost a warning and nothing else.

        Args:
            what: What could not be done.

        Yields:
            Nothing.

        Raises:
            GuardWarning: If the user made warnings errors.
        """
        try:
            yield
        except GuardWarning:
            raise
        except Exception as error:
            self.say_once(
                f"ConvergenceGuard could not {what}; training goes on.\nCause: {type(error).__name__}: {error}"
            )

    def state(self) -> dict[str, Any]:
        """Collect the state as primitives.

        Returns:
            What :meth:`load` takes.
        """
        watches = {name: [watch.state, watch.failed] for name, watch in self.watches.items()}
        return {
            "watches": watches,
            "said": sorted(self.said),
            "sharpest": self.sharpest,
            "events": [list(each) for each in self.events],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state.

        Args:
            state: What :meth:`state` collected.
        """
        self.watches = {name: Watch(*watch) for name, watch in state.get("watches", {}).items()}
        self.said = set(state.get("said", []))
        self.sharpest = state.get("sharpest", 0.0)
        self.events = [(step, kind, text) for step, kind, text in state.get("events", [])]
