"""What a run's reports and summaries are made from, and how long a run and its checks took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_maml_guard.guard.state import GuardState
from lightning_maml_guard.pages.record import RunRecord


class Stopwatch:
    """Times a run and its checks, since it began or was resumed."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._ended: float | None = None
        self.checks = 0.0

    def begin(self) -> None:
        """Begin to time the run."""
        self._began, self._ended = time.perf_counter(), None

    def end(self) -> None:
        """End it."""
        self._ended = time.perf_counter()

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Time what is done inside as part of the checks."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.checks += time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """Time of the run; 0 before it has begun."""
        if self._began is None:
            return 0.0
        return (time.perf_counter() if self._ended is None else self._ended) - self._began


def record_of(guard: Any, state: GuardState, clock: Stopwatch) -> RunRecord:
    """Collect what a guard knows of a run."""
    return RunRecord(
        settings=guard.settings(),
        spelling=guard.spelling,
        history=state.history,
        severities=state.severities,
        events=state.events,
        losses=state.losses,
        start=state.statistics.first[0] if state.statistics.first else state.statistics.looked,
        stopped_step=state.stopped_step,
        stopping_reason=guard.stopping_reason,
        advice=state.advice,
        check_seconds=clock.checks,
        seconds=clock.seconds,
    )
