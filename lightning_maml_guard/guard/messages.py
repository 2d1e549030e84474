"""What a guard says when a state changes."""

from __future__ import annotations

import math
import re
import textwrap
import traceback
from pathlib import Path
from typing import Any

import torch

from lightning_maml_guard.guard.lookahead import Trial
from lightning_maml_guard.guard.rescale import Caps
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import SAFE
from lightning_maml_guard.utils.distributed import SharedError

_WIDTH = 100
# Reasons are sentences; the last one of those that have a remedy is the remedy.
_ADVICE = re.compile(r"(?<=[.)]) (?=(?:Lower|Raise|Start again)\b)")


class Spelling:
    """How the user of a guard writes its arguments: in Python; the command line has a spelling of its own."""

    def arguments(self, **given: Any) -> str:
        """Write arguments.

        Args:
            **given: Their names and values.

        Returns:
            The text.
        """
        return ", ".join(f"{name}={value!r}" for name, value in given.items())

    def guard(self, **given: Any) -> str:
        """Write a guard with these arguments.

        Args:
            **given: Their names and values.

        Returns:
            The text.
        """
        return f"ConvergenceGuard({self.arguments(**given)})"


IN_PYTHON = Spelling()


def left(report: StabilityReport, action: str, step: int, caps: Caps, spelling: Spelling) -> str:
    """Say that the rates left the safe region.

    Args:
        report: The report that says so.
        action: What the guard does about it.
        step: Training step.
        caps: The caps from now on.
        spelling: How the guard's arguments are written.

    Returns:
        The message.
    """
    alpha, beta = caps.applied(report.alpha, report.beta)
    inner = "" if math.isnan(alpha) else f"alpha = {alpha:.3g}, "
    effect = {
        "warn": [f"Or let the guard do it: {spelling.guard(action='rescale')}."],
        "stop": [f"Training stops after this step ({spelling.arguments(action='stop')})."],
        "rescale": [f"Applied from now on: {inner}beta = {beta:.3g} ({spelling.arguments(action='rescale')})."],
    }.get(action, [])
    split = [_ADVICE.split(reason, maxsplit=1) for reason in report.reasons]
    why = [f"Why: {cause}" for cause, *_ in split]
    do = [f"To do: {each}" for _, *advice in split for each in advice]
    head = f"ConvergenceGuard: the learning rates left the safe region at step {step}."
    return "\n".join([head, *why, *dict.fromkeys(do), *effect])


def reasons(report: StabilityReport) -> list[str]:
    """Say why a report is what it is, and what to do unless the guard did it.

    Args:
        report: The report.

    Returns:
        The reasons.
    """
    if report.alpha_applied < report.alpha or report.beta_applied < report.beta:
        return [_ADVICE.split(reason, maxsplit=1)[0] for reason in report.reasons]
    return list(report.reasons)


def returned(report: StabilityReport, state: str, caps: Caps) -> str:
    """Say that the rates are not unsafe any more.

    Args:
        report: The report that says so.
        state: The state after it.
        caps: The caps from now on.

    Returns:
        The message.
    """
    if state == SAFE:
        return "the rates are back in the safe region."
    beta = caps.applied(report.alpha, report.beta)[1]
    if beta < report.beta:
        return f"the coming steps survive at the applied beta = {beta:.3g} (configured: {report.beta:.3g})."
    return "the coming steps survive again, at the edge of stability."


def tried(
    trial: Trial, reference: float, alpha: float, beta: float, explained: bool, spelling: Spelling = IN_PYTHON
) -> str:
    """Say what a trial that failed saw.

    Args:
        trial: The trial.
        reference: Loss that training started from.
        alpha: The inner rate it was tried at; ``nan`` without an inner loop.
        beta: The meta rate.
        explained: Whether the critical values say why.
        spelling: How the guard's arguments are written.

    Returns:
        The message.
    """
    if not math.isfinite(trial.begin):
        return (
            f"The loss is {trial.begin} already, so no rate brings this run back. Start again with lower rates; "
            f"{spelling.guard(action='rescale', rollback=True)} takes a run back to the last parameters measured safe."
        )
    steps = len(trial.losses) - 1
    rates = ("" if math.isnan(alpha) else f"alpha = {alpha:.3g} and ") + f"beta = {beta:.3g}"
    said = (
        f"The coming {steps} steps, tried on copies at {rates}, take the loss from {trial.begin:.3g} to "
        f"{trial.end:.3g} (training started from {reference:.3g})."
    )
    if explained:
        return said
    return said + (
        " The curvature at this point alone does not explain it: it changes along the way. Lower the optimizer's lr."
    )


def nothing_learned(step: int, curvature: float, sharpest: float, loss: float, start: float, spelling: Spelling) -> str:
    """Say that the rates are stable because there is nothing left that they could move.

    Args:
        step: Training step.
        curvature: Largest eigenvalue now.
        sharpest: The largest it has been.
        loss: Running mean of the loss.
        start: Loss that training started from.
        spelling: How the guard's arguments are written.

    Returns:
        The message.
    """
    return (
        f"ConvergenceGuard: step {step} is stable, but the run may have lost its network.\nWhy: lambda_max = "
        f"{curvature:.3g} is {curvature / sharpest:.2g} of what it was, while the loss ({loss:.3g}) is near where "
        f"training started ({start:.3g}): so it is when ReLUs have died, which no rate brings back.\nTo do: Start "
        f"again with lower rates ({spelling.guard(action='rescale', margin=0.5)} keeps them lower), or with another "
        "activation."
    )


def failed(step: int, error: Exception) -> str:
    """Say that a check failed.

    Args:
        step: Training step.
        error: What it failed with.

    Returns:
        The message: where, why, what to do.
    """
    trace = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(trace[-1].filename).name}, line {trace[-1].lineno}, in {trace[-1].name})" if trace else ""
    if isinstance(error, torch.OutOfMemoryError):
        remedy = (
            "A check needs about max_iter vectors of the parameters' size and the graph of a second derivative: lower "
            "max_iter or the module's task_chunk_size, or pass tasks_per_check, basis='bfloat16' or 'cpu', "
            "trial_steps=0 or replay=1."
        )
    elif isinstance(error, SharedError):
        where, remedy = "", "Look at that rank; the others are well."
    else:
        remedy = "If it comes from code of yours (the problem, the loss, a logger), mend it there; the run goes on."
    return (
        f"ConvergenceGuard: the check at step {step} failed; training goes on without it.\nCause: "
        f"{type(error).__name__}: {error}{where}.\nTo do: {remedy} This is said once for each cause."
    )


def rolled_back(step: int, to: int, loss: float, caps: Caps, report: StabilityReport, count: int, bound: int) -> str:
    """Say that a run was taken back.

    Args:
        step: Training step.
        to: Step of the snapshot.
        loss: Loss that was lost.
        caps: The caps from now on.
        report: The report at the snapshot.
        count: How many times so far.
        bound: How many times at most.

    Returns:
        The message.
    """
    alpha, beta = caps.applied(report.alpha, report.beta)
    inner = "" if math.isnan(alpha) else f"alpha = {alpha:.3g}, "
    return (
        f"ConvergenceGuard: the loss was {loss:.3g} at step {step}, so parameters and optimizer state were taken back "
        f"to step {to} and the batches since are skipped (rollback {count} of at most {bound}).\nApplied from now on: "
        f"{inner}beta = {beta:.3g}."
    )


def block(message: str) -> str:
    """Lay a message out for reading in a terminal.

    Args:
        message: What happened, why and what to do, a line each.

    Returns:
        The lines, wrapped; all but the first are indented.
    """
    first, *others = message.splitlines()
    options: dict[str, Any] = {"width": _WIDTH, "break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(first, subsequent_indent="  ", **options)
    for other in others:
        lines += textwrap.wrap(other, initial_indent="  ", subsequent_indent="    ", **options)
    return "\n".join(lines)
