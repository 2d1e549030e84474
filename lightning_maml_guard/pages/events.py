"""What happened in a run, row by row: changes of state, caps, rollbacks, stops, notices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_maml_guard.messages.advice_sentences import advised
from lightning_maml_guard.messages.reasons import Kind
from lightning_maml_guard.messages.sentences import sentences
from lightning_maml_guard.messages.spelling import Spelling, rates

ROLLED_BACK, STOPPED = "rolled back", "stopped"
CAPPED, RELEASED = "capped", "released"


class Row(NamedTuple):
    """One thing that happened: a state, a cap, a rollback, a stop or a notice; the step may be unknown."""

    step: int | None
    kind: str
    what: str
    why: str


def happened(history: Sequence[Any], events: Sequence[Any], spelling: Spelling) -> list[Row]:
    """List what happened in a run in the order of its steps; what has no known step comes last."""
    found: list[Row] = []
    for before, report in zip([None, *history], history, strict=False):
        found += _changes(before, report, spelling)
    # After the changes, so that of one step its state comes before what the guard did.
    for each in events:
        # What to do about a stop is said by the advice.
        texts = sentences(each.reasons, spelling, advised=each.kind == STOPPED)
        found.append(Row(each.step, each.kind, "", " ".join(map(_begun, texts))))
    return sorted(found, key=lambda row: math.inf if row.step is None else row.step)


def why(report: Any, spelling: Spelling) -> list[str]:
    """Say why a report is what it is, and what to do unless the guard did it."""
    acted = report.alpha_applied < report.alpha or report.beta_applied < report.beta
    said = [*sentences(report.findings, spelling, advised=acted or report.is_told_what_to_do)]
    if report.advice is not None:  # trials of rates are evidence of the advice alone
        said = [*dict.fromkeys([*said, *sentences(report.advice.evidence, spelling, advised=True)])]
    said = [_begun(sentence) for sentence in said]
    if acted and said:
        return [*said, f"Applied instead: {rates(report.alpha_applied, report.beta_applied)}."]
    return said if acted or report.advice is None else [*said, f"To do: {advised(report.advice, spelling)}"]


def _begun(sentence: str) -> str:
    """Begin a sentence with a capital, unless it begins with the name of a rate."""
    return sentence if sentence.startswith(("alpha", "beta")) else sentence[:1].upper() + sentence[1:]


def _changes(before: Any, report: Any, spelling: Spelling) -> list[Row]:
    step, reason, found = report.step or 0, " ".join(why(report, spelling)), []
    if before is None or before.status != report.status:
        what = "first check" if before is None else f"was {before.status}"
        found.append(Row(step, report.status, what, reason))
        reason = ""
    for name in ("alpha", "beta"):
        scheduled, applied = getattr(report, name), getattr(report, f"{name}_applied")
        earlier = math.nan if before is None else getattr(before, f"{name}_applied")
        held = before is not None and earlier < getattr(before, name)
        capped = applied < scheduled
        if not (capped or held) or math.isclose(applied, earlier, rel_tol=1e-9):
            continue
        lowered = capped and not (held and applied > earlier)
        start = earlier if held else scheduled
        limits = f"scheduled {scheduled:.3g}, {name}_c = {getattr(report, f'{name}_c'):.3g}"
        kind = CAPPED if lowered else RELEASED
        found.append(Row(step, kind, f"{name} {start:.3g} → {applied:.3g}", reason if lowered and reason else limits))
    return found


class Rollback(NamedTuple):
    """A rollback: the step it was made at, and the step whose parameters the run went back to."""

    at: int
    to: int
    loss: float


def rollbacks(events: Sequence[Any]) -> list[Rollback]:
    """Read the rollbacks among a run's events."""
    found = [(each.step, reason) for each in events if each.kind == ROLLED_BACK for reason in each.reasons]
    return [
        Rollback(at, reason.steps, reason.losses[reason.kind is Kind.ROLLED_BACK_AT_END])
        for at, reason in found
        if at is not None
    ]


def parameters_of(step: int, made: Sequence[Rollback]) -> str:
    """Say whose parameters were measured at a step, where they are not those that training went on with."""
    back = next((each for each in made if each.to < step < each.at), None)
    if back is not None:
        return f"rolled back at step {back.at}"
    gone = next((each for each in made if each.at == step), None)
    return "" if gone is None else f"after the rollback to step {gone.to}"


def note_on_parameters(step: int, made: Sequence[Rollback]) -> str:
    """Say the same in a sentence; empty for parameters that training went on with."""
    whose = parameters_of(step, made)
    if whose.startswith(ROLLED_BACK):
        return f"These parameters were {whose}: training did not go on with them."
    return f"Measured at step {step}, {whose}." if whose else ""
