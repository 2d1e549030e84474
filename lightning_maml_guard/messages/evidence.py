"""The "Why" sentences of advice: what was measured and tried."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.messages.spelling import rates

# An outer rate below this share of its limit may be too low for a run that does not learn.
_LOW = 0.25


def _adaptation_harmful(reason: Reason) -> str:
    before, after, _ = reason.losses
    said = f"alpha = {reason.alpha:.3g} makes the tasks worse: the query loss is {before:.3g} before adaptation and "
    said += f"{after:.3g} after it."
    return f"{said} The inner loop diverges from step {reason.steps} on." if reason.steps else said


def _rates_tried(reason: Reason) -> str:
    present, lowered, _ = reason.losses
    now = f"end at a loss of {present:.3g}" if math.isfinite(present) else "diverge"
    end = f"{lowered:.3g}" if math.isfinite(lowered) else "no finite loss either"
    since = "" if reason.step is None else f" of the parameters of step {reason.step}"
    return (
        f"{reason.steps} steps tried on copies{since} {now}; with {rates(reason.alpha, reason.beta)} they end at {end}."
    )


def _schedule_ahead(reason: Reason) -> str:
    takes = "took" if reason.step is not None and reason.step > reason.steps else "takes"
    peak = f"the schedule {takes} beta to {reason.beta:.3g} at step {reason.steps}"
    if reason.step is None:
        return f"{peak}; the current beta_c is {reason.limit:.3g}."
    return f"{peak}; from step {reason.step} on it is above the current beta_c = {reason.limit:.3g}."


def _odd_batch(reason: Reason) -> str:
    odd, usual, _ = reason.losses
    return (
        f"at the same parameters the batch of step {reason.step} has a loss of {odd:.3g} and the batches around it one "
        f"of {usual:.3g}; without it the next steps survive at the rates as they are."
    )


def _learning_lost(reason: Reason) -> str:
    best, now, start = reason.losses
    return (
        f"the run has collapsed: at least half of what it had learned is lost. On the latest batches the loss is "
        f"{now:.3g}; with the parameters of step {reason.steps} it is {best:.3g}, before training {start:.3g}."
    )


def _stalled(reason: Reason) -> str:
    now, _, start = reason.losses
    fallen = "hardly" if now < start else "not"
    said = f"the loss has {fallen} fallen: after {reason.steps} steps its mean is {now:.3g}, it started at {start:.3g}"
    if not math.isnan(reason.limit):
        said += f", and guessing would give {reason.limit:.3g}"
    if reason.counts[1]:
        said += f". {reason.counts[0]} of {reason.counts[1]} ReLU units are 0 on the whole batch"
    elif reason.value < _LOW:
        said += f". beta was never above {reason.value:.2g} of beta_c: a higher rate may learn faster"
    return f"{said}."


EVIDENCE: dict[Kind, Callable[[Reason], str]] = {
    Kind.ADAPTATION_HARMFUL: _adaptation_harmful,
    Kind.RATES_TRIED: _rates_tried,
    Kind.SCHEDULE_AHEAD: _schedule_ahead,
    Kind.ODD_BATCH: _odd_batch,
    Kind.NOT_LEARNING: lambda reason: (
        f"the loss hardly falls: it is {reason.losses[0]:.3g} on average after {reason.steps} steps, and the first "
        f"losses were about {reason.losses[2]:.3g}."
    ),
    Kind.LEARNING_LOST: _learning_lost,
    Kind.STALLED: _stalled,
    Kind.SCHEDULE_NOT_READ: lambda reason: (
        "the learning rate schedule cannot be read ahead, so each rate is judged when it is due.\n"
        f"Cause: {reason.error}: {reason.detail}"
    ),
    Kind.RATES_MOVED: lambda reason: (
        f"training has moved the inner rates that it learns: the largest was {reason.limit:.3g} at step {reason.steps} "
        f"and is {reason.value:.3g} now. Have the optimizer move them at a lower lr, in a parameter group of their own."
    ),
    Kind.UNITS_DIED: lambda reason: f"{reason.counts[0]} of {reason.counts[1]} ReLU units are 0 on the whole batch.",
}
