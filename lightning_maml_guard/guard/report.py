"""CheckReport, what a guard keeps of one check; checks as a table; how long a run and its checks took."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lightning_maml_guard.messages.advice_sentences import waiting
from lightning_maml_guard.messages.reasons import Reason
from lightning_maml_guard.pages.record import RunRecord
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import Limit

if TYPE_CHECKING:
    import pandas as pd

_NO_NUMBERS = {"spectrum", "step", "findings", "notes", "advice"}
_DERIVED = ("alpha_ratio", "beta_ratio", "simplified_alpha_c")


@dataclass(frozen=True, kw_only=True)
class CheckReport(StabilityReport):
    """What a guard keeps of one check: the measurement, what the lookahead saw, and the rates applied after it.

    ``status`` is that of the run: beside ``"safe"``, ``"unsafe"`` and ``"unresolved"`` it may be ``"edge"``, where a
    rate exceeds its critical value but the lookahead does not diverge (the edge of stability). ``findings`` also say
    what the lookahead found.

    Attributes:
        alpha_applied: Inner rate applied after this check; ``alpha`` unless the guard capped it.
        beta_applied: Outer rate applied after this check.
        severity: ``log(loss after the lookahead / loss that training started from)``; ``nan`` without a lookahead.
        growth: Factor per step by which the loss grew in the lookahead.
        adaptation_gain: ``log(query loss before adaptation / after it)``: below 0, adaptation makes the tasks worse. If
            losses may be negative: their difference, divided by its spread over the tasks; ``nan`` in plain training.
    """

    alpha_applied: float
    beta_applied: float
    severity: float = math.nan
    growth: float = math.nan
    adaptation_gain: float = math.nan

    @classmethod
    def of(cls, measured: StabilityReport, *, findings: Sequence[Reason], **found: Any) -> CheckReport:
        """Make the report of a check from its measurement and from what the guard found and did."""
        values = {each.name: getattr(measured, each.name) for each in fields(StabilityReport)}
        return cls(**(values | {"findings": tuple(findings)} | found))

    def ratios(self, alpha: float, beta: float) -> dict[str, float]:
        """Compare rates, as they are applied, with the limits measured here, under the names they are logged by."""
        found = {
            "guard/alpha_ratio": Limit(alpha, self.alpha_c, self.alpha_c_interval).ratio,
            "guard/beta_ratio": Limit(beta, self.beta_c, self.beta_c_interval).ratio,
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def applied_instead(self, name: str) -> str:
        """Say which rate is applied in place of the configured one; empty where it is applied as configured."""
        applied = getattr(self, f"{name}_applied")
        return f"applied {applied:.3g}" if applied < getattr(self, name) else ""

    def _rate_line(self, name: str) -> str:
        line, applied = super()._rate_line(name), self.applied_instead(name)
        return f"{line}; {applied}" if applied else line


def latest_limit(history: Sequence[CheckReport], name: str) -> float:
    """Read the limit of the latest check that found it; ``nan`` where none did."""
    for each in reversed(history):
        limit: float = getattr(each, name)
        if limit > 0:
            return limit
    return math.nan


class LatestLimits:
    """The latest known limits of both rates, looked for only where there was a check: they are asked for every step."""

    def __init__(self) -> None:
        self._history: Sequence[CheckReport] | None = None
        self._found: dict[str, float] = {}

    def of(self, history: Sequence[CheckReport]) -> dict[str, float]:
        """See :func:`latest_limit`; a history is another object after each check."""
        if history is not self._history:
            self._history = history
            self._found = {name: latest_limit(history, name) for name in ("beta_c", "alpha_c")}
        return self._found


def frame(history: Sequence[CheckReport]) -> pd.DataFrame:
    """Put reports into a table; see :meth:`ConvergenceGuard.frame`."""
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "guard.frame() needs pandas: pip install pandas. guard.history holds the same reports."
        ) from error
    numbers = [each.name for each in fields(CheckReport) if each.name not in _NO_NUMBERS]
    columns = [
        column
        for name in numbers
        for column in ((f"{name}_low", f"{name}_high") if name.endswith("_interval") else (name,))
    ]
    columns = [*(column.replace("_interval", "") for column in columns), "reasons", "notices", *_DERIVED]
    steps = pd.Index([report.step for report in history], name="step", dtype="Int64")
    return pd.DataFrame([_row(report, numbers) for report in history], index=steps, columns=columns)


def _row(report: CheckReport, numbers: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in numbers:
        if name.endswith("_interval"):
            short = name.removesuffix("_interval")
            row[f"{short}_low"], row[f"{short}_high"] = getattr(report, name)
        else:
            row[name] = getattr(report, name)
    row |= {"reasons": " ".join(report.reasons), "notices": " ".join(report.notices)}
    return row | {name: getattr(report, name) for name in _DERIVED}


# Seconds of a check after which the guard says what training waits for.
LONG = 10.0


class Stopwatch:
    """Times a run and its checks, since it began or was resumed."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._ended: float | None = None
        self._untold: tuple[int, float] | None = None  # step and beginning of a check, until its length is told
        self.checks = 0.0

    def begin(self) -> None:
        """Begin to time the run."""
        self._began, self._ended = time.perf_counter(), None

    def end(self) -> None:
        """End it."""
        self._ended = time.perf_counter()

    @contextmanager
    def checking(self, step: int, *, speaks: bool) -> Iterator[None]:
        """Time what is done inside as part of the checks; ``speaks``: the user is told once if that takes long."""
        began = time.perf_counter()
        self._untold = (step, began) if speaks else None
        try:
            yield
        finally:
            self._untold = None
            self.checks += time.perf_counter() - began

    def tell_if_long(self) -> None:
        """Say what training waits for, once in a check that has taken long."""
        from lightning_maml_guard.messages.terminal import inform  # of Lightning; a report is read without it

        if self._untold is not None and time.perf_counter() - self._untold[1] > LONG:
            inform(waiting(self._untold[0]))
            self._untold = None

    @property
    def seconds(self) -> float:
        """Time of the run; 0 before it has begun."""
        if self._began is None:
            return 0.0
        return (time.perf_counter() if self._ended is None else self._ended) - self._began


def record_of(guard: Any, state: Any, clock: Stopwatch) -> RunRecord:
    """Collect what a guard and its state know of a run."""
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
