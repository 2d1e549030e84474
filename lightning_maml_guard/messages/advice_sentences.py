"""Advice in words: one line that says what is wrong and what to set, then why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning_maml_guard.messages.advice import Advice, Cause
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.messages.spelling import IN_PYTHON, Spelling


def advised(advice: Advice, spelling: Spelling = IN_PYTHON) -> str:
    """Say in one line what is wrong and what to set."""
    alpha, beta = f"alpha = {advice.configured_alpha:.3g}", f"beta = {advice.configured_beta:.3g}"
    where = "" if advice.peak_step is None else f" at step {advice.peak_step}"
    wrong = {
        Cause.ALPHA: f"{alpha} is too large",
        Cause.BETA: f"{beta} is too large",
        Cause.BOTH: f"{alpha} and {beta} are too large",
        Cause.SCHEDULE: f"the schedule takes beta to {advice.configured_beta:.3g}{where}, which is too large",
        Cause.DEAD_UNITS: f"{beta} is too large: units have died",
        Cause.BATCH: "a batch is an outlier; the rates are not to blame",
        Cause.UNKNOWN: "training diverges, and no lower rates were found at which it learns",
    }[advice.cause]
    to_set = []
    if advice.alpha is not None:
        to_set.append(f"the inner rate (inner_lr) to {advice.alpha:.3g}")
    if advice.beta is not None:
        to_set.append(f"the optimizer's lr to {advice.beta:.3g}")
    if advice.gradient_clip_val is not None:
        to_set.append(f"{spelling.trainer(gradient_clip_val=advice.gradient_clip_val)}, or mend the batch")
    if not to_set:
        return f"{wrong}. Look at the data, the loss and the precision."
    return f"{wrong}. Set {' and '.join(to_set)}."


def _adaptation_harmful(reason: Reason, spelling: Spelling) -> str:
    before, after, _ = reason.losses
    said = f"alpha = {reason.alpha:.3g} makes the tasks worse: the query loss is {before:.3g} before adaptation and "
    said += f"{after:.3g} after it."
    return f"{said} The inner loop diverges from step {reason.steps} on." if reason.steps else said


def _rates_tried(reason: Reason, spelling: Spelling) -> str:
    present, lowered, _ = reason.losses
    now = f"end at a loss of {present:.3g}" if math.isfinite(present) else "let the loss leave"
    end = f"{lowered:.3g}" if math.isfinite(lowered) else "no finite loss either"
    return f"{reason.steps} steps tried on copies {now}; with {rates(reason.alpha, reason.beta)} they end at {end}."


def _schedule_ahead(reason: Reason, spelling: Spelling) -> str:
    peak = f"the schedule takes beta to {reason.beta:.3g} at step {reason.steps}"
    if reason.step is None:
        return f"{peak}; beta_c at the parameters of now is {reason.limit:.3g}."
    return f"{peak}; it exceeds today's beta_c = {reason.limit:.3g} from step {reason.step} on."


def _odd_batch(reason: Reason, spelling: Spelling) -> str:
    odd, usual, _ = reason.losses
    return (
        f"at the same parameters the batch of step {reason.step} has a loss of {odd:.3g} and the batches around it one "
        f"of {usual:.3g}; without it the next steps survive at the rates as they are."
    )


def advice_given(step: int, advice: Advice, effect: Sequence[str], spelling: Spelling) -> str:
    """Say what is wrong and what to set, then why, then what the guard does about it."""
    why = [f"Why: {cause(each, spelling)}" for each in advice.evidence]
    return "\n".join([f"ConvergenceGuard: step {step}: {advised(advice, spelling)}", *dict.fromkeys(why), *effect])


ADVICE: dict[Kind, Callable[[Reason, Spelling], str]] = {
    Kind.ADAPTATION_HARMFUL: _adaptation_harmful,
    Kind.RATES_TRIED: _rates_tried,
    Kind.SCHEDULE_AHEAD: _schedule_ahead,
    Kind.ODD_BATCH: _odd_batch,
    Kind.UNITS_DIED: lambda reason, spelling: (
        f"{reason.counts[0]} of {reason.counts[1]} ReLU units are 0 on the whole batch."
    ),
}
