"""What happened in a run, step by step: changes of state, caps, rollbacks, stops."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from lightning_maml_guard.guard.messages import reasons
from lightning_maml_guard.stability.report import StabilityReport


class Event(NamedTuple):
    """One thing that happened.

    Attributes:
        step: Training step; -1 where it is not known.
        kind: A state, or ``"capped"``, ``"released"``, ``"rolled back"``, ``"stopped"``, ``"notice"``.
        what: What changed.
        why: Why.
    """

    step: int
    kind: str
    what: str
    why: str


def events(history: Sequence[StabilityReport], befell: Sequence[tuple[int, str, str]] = ()) -> list[Event]:
    """Read the events out of a history.

    Args:
        history: Reports of the checks, oldest first.
        befell: What no report holds: step, kind and text.

    Returns:
        The events in the order of their steps; those whose step is not known come last.
    """
    said = [
        Event(step, kind, "", re.sub(rf"^ConvergenceGuard(: | )(step {step}: )?", "", text))
        for step, kind, text in befell
    ]
    found: list[Event] = []
    before: StabilityReport | None = None
    for report in history:
        found += _changes(before, report)
        before = report
    return sorted([*found, *said], key=lambda event: event.step if event.step >= 0 else math.inf)


def _changes(before: StabilityReport | None, report: StabilityReport) -> list[Event]:
    step, why, found = report.step or 0, " ".join(reasons(report)), []
    if before is None or before.status != report.status:
        what = "first check" if before is None else f"was {before.status}"
        found.append(Event(step, report.status, what, why))
        why = ""
    for name in ("alpha", "beta"):
        scheduled, applied = getattr(report, name), getattr(report, f"{name}_applied")
        earlier = math.nan if before is None else getattr(before, f"{name}_applied")
        held = before is not None and earlier < getattr(before, name)
        capped = applied < scheduled
        if not (capped or held) or math.isclose(applied, earlier, rel_tol=1e-9):
            continue
        lowered = capped and not (held and applied > earlier)
        start = earlier if held else scheduled
        found.append(
            Event(
                step,
                "capped" if lowered else "released",
                f"{name} {start:.3g} → {applied:.3g}",
                why if lowered and why else f"scheduled {scheduled:.3g}, {name}_c = {getattr(report, f'{name}_c'):.3g}",
            )
        )
    return found
