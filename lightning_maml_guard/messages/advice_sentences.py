"""Advice in words: one line that says what is wrong and what to set, then why."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_maml_guard.messages.advice import Advice, Cause
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.messages.sentences import cause, sentence
from lightning_maml_guard.messages.spelling import IN_PYTHON, Spelling, to_configure

NO_WAY_BACK = "Training stops: the parameters are not finite, and there are no earlier ones that would stay finite."


def advised(advice: Advice, spelling: Spelling = IN_PYTHON) -> str:
    """Say in one line what is wrong and what to set."""
    alpha, beta = f"alpha = {advice.configured_alpha:.3g}", f"beta = {advice.configured_beta:.3g}"
    where = "" if advice.peak_step is None else f" at step {advice.peak_step}"
    takes = "took" if advice.peak_step is not None and (advice.step or 0) > advice.peak_step else "takes"
    own = any(each.kind is Kind.OWN_GRADIENTS for each in advice.evidence)
    unless = ", unless it is the rate of an inner loop that is" if own else ""
    wrong = {
        Cause.ALPHA: f"{alpha} is too large",
        Cause.BETA: f"{beta} is too large{unless}",
        Cause.BOTH: f"{alpha} and {beta} are too large",
        Cause.SCHEDULE: f"the schedule {takes} beta to {advice.configured_beta:.3g}{where}, which is too large",
        Cause.DEAD_UNITS: f"{beta} is too large: units have died",
        Cause.BATCH: "a batch is an outlier; the rates are not to blame",
        Cause.UNKNOWN: "training diverges for a reason that is not known",
    }[advice.cause]
    to_set = to_configure(advice.alpha, advice.beta, advice.setting, several=advice.several)
    if advice.gradient_clip_val is not None:
        to_set.append(f"{spelling.trainer(gradient_clip_val=advice.gradient_clip_val)}, or fix the batch")
    if not to_set and advice.cause is Cause.BATCH:
        return f"{wrong}. Fix the batch, or leave it out: gradients that are not finite cannot be clipped."
    if not to_set:
        found = {each.kind for each in advice.evidence}
        if Kind.RATES_MOVED in found:
            return (
                "training moves the inner rates that it learns too far. Lower the lr that the optimizer moves them at."
            )
        if left_at_any_rate(advice):
            return (
                "the loss has risen above its best, and rises at lower rates too. Look at the data and the loss: that "
                "of a policy gradient does not say what was learned."
            )
        if Kind.NAN_IN_DATA in found:
            return "the data of the problem holds nan, so that its loss is nan. Leave what is nan out of the data."
        if no_rate_survives(advice):
            wrong = "training diverges at every rate that was tried"
        untried = found & {Kind.LOSS_DIVERGED, Kind.LOSS_NOT_FINITE} and Kind.RATES_TRIED not in found
        return f"{wrong}. Look at {'the rates, ' if untried else ''}the data, the loss and the precision."
    return f"{wrong}. Set {' and '.join(to_set)}."


def left_at_any_rate(advice: Advice) -> bool:
    """Whether what was learned is lost, and the rates that were tried would not have kept it."""
    found = {each.kind: each.losses for each in advice.evidence}
    if advice.cause is not Cause.UNKNOWN or not {Kind.LEARNING_LOST, Kind.RATES_TRIED} <= set(found):
        return False
    return min(found[Kind.RATES_TRIED][:2]) > found[Kind.LEARNING_LOST][0]


def no_rate_survives(advice: Advice) -> bool:
    """Whether the loss is finite at none of the rates that were tried."""
    tried = [each.losses[1] for each in advice.evidence if each.kind is Kind.RATES_TRIED]
    return advice.cause is Cause.UNKNOWN and bool(tried) and not any(map(math.isfinite, tried))


def advice_given(step: int, advice: Advice, effect: Sequence[str], spelling: Spelling) -> str:
    """Say what is wrong and what to set, then why, then what the guard does about it."""
    why = [f"Why: {cause(each, spelling)}" for each in advice.evidence]
    return "\n".join([f"ConvergenceGuard: step {step}: {advised(advice, spelling)}", *dict.fromkeys(why), *effect])


def given_up(reason: Reason, advice: Advice | None, spelling: Spelling) -> str:
    """Say why training stops for good, and what to do."""
    to_do = "Look at the data, the loss and the precision." if advice is None else advised(advice, spelling)
    return f"ConvergenceGuard: training stops. {sentence(reason)}\n{to_do[0].upper()}{to_do[1:]}"


def last_step(least: Sequence[str]) -> str:
    """Say what the Trainer reaches before it stops, if anything; else, that its last step moves nothing."""
    return f"The Trainer first reaches {' and '.join(least)}." if least else "It is taken at beta = 0."


def waiting(step: int) -> str:
    """Say what training waits for while a check takes long."""
    return (
        f"ConvergenceGuard: step {step}: training waits while lower rates are tried on copies. That takes as long as "
        "several hundred training steps, and happens at most four times in a run."
    )
