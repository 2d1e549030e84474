"""How a run came out: in one sentence, and in a few lines."""

from __future__ import annotations

import math
from collections import Counter

from lightning_maml_guard.messages.advice_sentences import advised
from lightning_maml_guard.messages.spelling import multiple, two_digits
from lightning_maml_guard.pages.events import rollbacks
from lightning_maml_guard.pages.record import RunRecord


def outcome(record: RunRecord) -> str:
    """Say in one sentence how a run came out: whether it diverged, what the guard did, and where the loss ended."""
    made, parts = rollbacks(record.events), []
    if made:
        last = made[-1]
        again = f" (rollback {len(made)})" if len(made) > 1 else ""
        parts.append(f"diverged at step {last.at}")
        parts.append(f"rolled back to {last.to}{again}")
    if record.stopped_step is not None:
        parts.append(f"stopped by the guard at step {record.stopped_step}")
    if not parts:
        parts.append(f"{_diverged_or_trained(record)} {counted(record.steps, 'step')}")
    ended = _ended(record)
    said = "; ".join([*parts, *([ended] if ended else [])])
    return said[0].upper() + said[1:]


def summary(record: RunRecord) -> str:
    """Sum a run up in a few lines: outcome, checks with their states and cost, rates applied, what to set."""
    lines = [f"ConvergenceGuard: {outcome(record)}."]
    history = record.history
    if history:
        states = ", ".join(f"{number} {state}" for state, number in Counter(each.status for each in history).items())
        cost = ""
        if record.seconds > 0:
            taken, share = two_digits(record.check_seconds), two_digits(100 * record.check_seconds / record.seconds)
            cost = f"; {taken} s of {two_digits(record.seconds)} s ({share} %)"
        lines.append(f"{counted(len(history), 'check')}: {states}{cost}.")
        lines.append(f"At the last check, step {history[-1].step}: {', '.join(_rates(history[-1]))}.")
    else:
        lines.append("No check was made.")
    if record.advice is not None:
        lines.append(f"Advice: {advised(record.advice, record.spelling)}")
    return "\n".join(lines)


def counted(number: int, what: str) -> str:
    """Write a number of things."""
    return f"{number} {what}" + ("s" if number != 1 else "")


def _rates(report: object) -> list[str]:
    return [found for name in ("alpha", "beta") if (found := _rate(report, name))]


def _rate(report: object, name: str) -> str:
    rate, limit = getattr(report, name), getattr(report, f"{name}_c")
    applied, ratio = getattr(report, f"{name}_applied"), getattr(report, f"{name}_ratio")
    if math.isnan(rate):
        return ""
    text = f"{name} = {rate:.3g}"
    if math.isfinite(ratio):
        text += f" is {multiple(ratio)} {name}_c = {limit:.3g}"
    elif limit == 0:
        text += f" exceeds {name}_c = 0"
    elif math.isnan(limit):
        text += " (not judged)"
    return f"{text}, applied as {applied:.3g}" if applied < rate else text


def _diverged_or_trained(record: RunRecord) -> str:
    start, last = record.start, record.losses.final
    gone = math.isinf(last) or (start > 0 and last > record.divergence_ratio * start)
    return "diverged within" if gone else "trained"


def _ended(record: RunRecord) -> str:
    start, last = record.start, record.losses.final
    if math.isnan(last):
        return ""
    if not math.isfinite(last):
        return "the loss is not finite"
    return f"the loss went from {start:.3g} to {last:.3g}" if record.steps > 1 else f"the loss is {last:.3g}"
