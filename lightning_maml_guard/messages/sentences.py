"""Every sentence a user of the guard reads, made from reasons. Nothing is ever parsed out of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning_maml_guard.messages.effects import EFFECTS, ORDERS
from lightning_maml_guard.messages.evidence import EVIDENCE
from lightning_maml_guard.messages.notices import NOTICES
from lightning_maml_guard.messages.reasons import IN_USERS_CODE, Kind, Reason, Remedy
from lightning_maml_guard.messages.spelling import IN_PYTHON, Spelling, multiple, rates, two_digits
from lightning_maml_guard.messages.training_sentences import TRAINING


def sentence(reason: Reason, spelling: Spelling = IN_PYTHON) -> str:
    """Put a reason into words: what happened and why, then what to do."""
    return " ".join(filter(None, (cause(reason, spelling), remedy(reason, spelling))))


def sentences(reasons: Sequence[Reason], spelling: Spelling = IN_PYTHON, *, advised: bool = False) -> tuple[str, ...]:
    """Put several reasons into words, a text each; ``advised``: advice beside them says what to do."""
    return tuple((cause if advised else sentence)(each, spelling) for each in reasons)


def cause(reason: Reason, spelling: Spelling = IN_PYTHON) -> str:
    """Say what happened and why, without what to do."""
    if reason.kind is Kind.NETWORK_COLLAPSED:  # names an argument of the guard
        return _network_collapsed(reason, spelling)
    return _CAUSES[reason.kind](reason)


def remedy(reason: Reason, spelling: Spelling = IN_PYTHON) -> str:
    """Say what to do; empty where there is nothing to do."""
    below = f"below {reason.margin * reason.limit:.3g}"
    rescale = spelling.guard(action="rescale")
    return {
        Remedy.NONE: "",
        Remedy.LOWER_ALPHA: f"Lower the inner rate (inner_lr) {below}.",
        Remedy.LOWER_ALPHA_FIRST: "Lower the inner rate first.",
        Remedy.LOWER_BETA: f"Lower the optimizer's lr {below}.",
        Remedy.LOWER_BETA_IF_STILL_ABOVE: "Lower the optimizer's lr only if it exceeds beta_c at the lowered inner "
        "rate too: beta_c moves with alpha.",
        Remedy.LOWER_BETA_UNSPECIFIED: "Lower the optimizer's lr.",
        Remedy.MEASURE_SHARPER: "Raise max_iter or lower tol for a sharper answer.",
        Remedy.START_AGAIN: f"Start again with lower rates; {rescale} rolls a run back to the last parameters "
        "measured safe.",
    }[reason.remedy]


def announced(reason: Reason, spelling: Spelling = IN_PYTHON) -> str:
    """Say something outside of a change of state, to be read by itself; a line each for cause and remedy."""
    at = f"step {reason.step}: " if reason.kind in _MEASURED and reason.step is not None else ""
    return f"ConvergenceGuard: {at}{sentence(reason, spelling)}"


def returned(step: int, *, safe: bool, applied: float, configured: float, tried: bool = True) -> str:
    """Say that the rates are not unsafe any more; the two rates are the outer rate's; ``tried``: by a lookahead."""
    if safe:
        said = "the rates are back in the safe region."
    elif not tried:
        said = "neither the curvature nor the last loss says any more that the run diverges."
    elif applied < configured:
        said = f"the next steps survive at the applied beta = {applied:.3g} (configured: {configured:.3g})."
    else:
        said = "the next steps survive again, at the edge of stability."
    return f"ConvergenceGuard: step {step}: {said}"


def rates_lowered(step: int, alpha: float, beta: float, *, left_best: bool, raised: bool) -> str:
    """Say that the rates of a run that loses ground, or stands still, are lowered, and to what."""
    rises = "has risen above its lowest mean" if left_best else "does not fall any more"
    why = f"the loss {rises}, and at lower rates the next steps end lower."
    if raised:
        why = "the loss has not fallen since the outer rate was raised."
    return f"ConvergenceGuard: step {step}: {why} Applied from now on: {rates(alpha, beta)}."


def _limit(reason: Reason) -> str:
    low, high = reason.interval
    return f"{reason.rate}_c = {reason.limit:.3g} ({low:.3g} to {high:.3g})"


def _beside_limit(reason: Reason) -> str:
    """Say how many times its limit a rate is; ``margin`` only where the limit itself is kept."""
    rate = f"{reason.rate} = {reason.value:.3g}"
    if not reason.limit > 0:
        return f"{rate} exceeds {_limit(reason)}"
    share = reason.value / reason.limit
    said = f"{rate} is {multiple(share)} {_limit(reason)}"
    return said if reason.margin == 1 or share > 1 else f"{said}, above the margin of {reason.margin:g}"


def _above_limit(reason: Reason) -> str:
    effect = EFFECTS.get(reason.effect, "")
    if reason.effect == "grows":
        effect = "the update grows along the sharpest direction."
        if reason.growth > 1:
            effect = f"along the sharpest direction each step multiplies the error by {two_digits(reason.growth)}."
    said = f"{_beside_limit(reason)}: {effect}"
    return f"{said} {ORDERS[reason.order]}" if reason.order else said


def _too_close(reason: Reason) -> str:
    scaled = f"{reason.margin:g} * " if reason.margin != 1 else ""
    return f"{reason.rate} = {reason.value:.3g} is too close to {scaled}{_limit(reason)} to be called safe or unsafe."


def _not_judged(reason: Reason) -> str:
    return f"{reason.rate} is not judged: {reason.detail or 'its critical value could not be measured.'}"


def _no_curvature(reason: Reason) -> str:
    return (
        "The loss has no curvature at these parameters and this batch, so there is no limit to compare with. That is "
        "not the same as safe: ReLU networks with dead units and linear losses look like this."
    )


def _nan_in_data(reason: Reason) -> str:
    return (
        f"The curvature could not be measured: {reason.detail} The data holds nan. If it pads tasks to one size, list "
        "the tasks instead, each of its own size: support=[(x_1, y_1), (x_2, y_2), ...]."
    )


def _no_exact_limit(reason: Reason) -> str:
    why = f"{reason.error}: {reason.detail}"
    return f"exact_beta_c could not be measured ({why}); the simplified criterion is still checked."


def _no_double_backward(reason: Reason) -> str:
    return (
        f"{reason.what}: this network has no second derivative by double backward ({reason.detail}), so its curvature "
        "is measured by finite differences of gradients (less sharp, two gradients per product)."
    )


def _wrong_double_backward(reason: Reason) -> str:
    return (
        f"{reason.what}: the second derivative by double backward disagrees with finite differences by "
        f"{reason.value:.1%}: a layer's double backward is wrong (a custom autograd Function without one), or the "
        "loss holds a value that was detached from the parameters, as in first-order MAML or a policy gradient. "
        "The curvature is measured by finite differences of gradients instead."
    )


def _lookahead_diverges(reason: Reason) -> str:
    before, after, start = reason.losses
    # Of two batches the losses differ by as much.
    started = "" if math.isclose(before, start, rel_tol=0.25) else f" (training started from {start:.3g})"
    return (
        f"The next {reason.steps} steps, tried on copies at {rates(reason.alpha, reason.beta, ' and ')}, take the loss "
        f"from {before:.3g} to {after:.3g}{started}."
    )


def _loss_not_finite(reason: Reason) -> str:
    return f"The loss is {reason.losses[0]} at these parameters."


def _check_failed(reason: Reason) -> str:
    where = f" ({reason.where})" if reason.where and reason.effect != IN_USERS_CODE else ""
    to_do = {
        IN_USERS_CODE: f"Fix {reason.where}.",
        "out of memory": "A check needs about max_iter vectors of the parameters' size and the graph of a second "
        "derivative: lower max_iter or the module's task_chunk_size, or pass max_tasks, basis='bfloat16' or 'cpu' "
        "(curvature options), or steps=0 or batches=1 (lookahead options).",
        "other rank": "Look at that rank; the other ranks are fine.",
    }.get(reason.effect, "If it comes from your code (the problem, the loss, a logger), fix it there.")
    alone = reason.kind is Kind.NO_CURVATURE_MEASURED
    what = " to measure the curvature" if alone else ""
    until = "The lookahead alone judges" if alone else "Training continues unguarded"
    return (
        f"the check at step {reason.step} failed{what}.\nCause: {reason.error}: {reason.detail}{where}\nTo do: {to_do} "
        f"{until} until a check succeeds. This is said once for each cause."
    )


def _no_lookahead(reason: Reason) -> str:
    if reason.effect == "before training":
        return f"The next steps cannot be tried. {reason.detail}"
    decides = "the curvature decides where it judges a rate, and else the last loss"
    return f"the next steps cannot be tried, so {decides}. {reason.detail}"


def _no_gradient_norm(reason: Reason) -> str:
    return (
        "a jump of the loss still calls a check, a jump of the gradient norm does not: the norm could not be "
        f"computed.\nCause: {reason.error}: {reason.detail}"
    )


def _no_snapshot(reason: Reason) -> str:
    kept = f"a rollback goes to step {reason.steps}" if reason.steps >= 0 else "there is nothing to roll back to"
    return (
        f"parameters and optimizer state could not be copied at step {reason.step}, so {kept}. snapshot_device='cpu' "
        f"keeps the copy off the device.\nCause: {reason.error}: {reason.detail}"
    )


def _network_collapsed(reason: Reason, spelling: Spelling) -> str:
    _, loss, start = reason.losses
    counted = f"{reason.counts[0]} of {reason.counts[1]} ReLU units are 0 on the whole batch"
    dead = counted if reason.counts[1] else "this happens when ReLUs have died"  # not counted by older versions
    return (
        f"step {reason.step} is stable, but the network may have died.\nWhy: lambda_max = {reason.value:.3g} "
        f"is {reason.value / reason.limit:.2g} of what it was, while the loss ({loss:.3g}) is near where training "
        f"started ({start:.3g}): {dead}.\nTo do: Start again with lower rates "
        f"({spelling.guard(action='rescale', margin=0.5)} keeps them lower), or with another activation."
    )


def _rolled_back(reason: Reason) -> str:
    said = (
        f"the loss was {reason.losses[0]:.3g} at step {reason.step}, so parameters and optimizer state were rolled "
        f"back to step {reason.steps} and the batches since are skipped (rollback {reason.counts[0]} of at most "
        f"{reason.counts[1]})."
    )
    if reason.value >= 0:
        said += f" {reason.value:.0f} of {reason.step} steps are lost."
    if reason.effect == "halved":
        why = "The curvature there could not be measured, so the outer rate is halved"
        return f"{said} {why}: beta = {reason.beta:.3g}."
    if reason.effect == "not lowered":
        return f"{said} The outer rate could not be lowered."
    return f"{said}\nApplied from now on: {rates(reason.alpha, reason.beta)}."


def _rolled_back_at_end(reason: Reason) -> str:
    after, start = reason.losses[1:]
    what = "the last step made parameters non-finite"
    if not math.isnan(start):
        what = f"after the last step the loss was {after:.3g} (training started at {start:.3g})"
    return f"{what}, so parameters and optimizer state were rolled back to step {reason.steps}."


def _too_many_rollbacks(reason: Reason) -> str:
    return (
        f"The loss was {reason.losses[0]:.3g} at step {reason.step} after {reason.counts[0]} rollbacks "
        "(max_rollbacks), each with lower rates."
    )


_LONGER = "More steps tell more (ladder=LadderOptions(longest=...))"


def _no_rate_trains(reason: Reason) -> str:
    return (
        f"No rates are suggested: at none of those tried is the loss within {reason.steps} steps on copies below that "
        f"before training. {_LONGER}, or the data or the loss is at fault."
    )


def _little_learned(reason: Reason) -> str:
    before, after, _ = reason.losses
    return (
        f"The suggested rates are a guess: in {reason.steps} steps on copies the loss falls by less than a tenth, from "
        f"{before:.3g} to {after:.3g}. {_LONGER}."
    )


# What was measured: the step of the measurement is said beside it.
_MEASURED: dict[Kind, Callable[[Reason], str]] = {
    Kind.ABOVE_LIMIT: _above_limit,
    Kind.TOO_CLOSE: _too_close,
    Kind.NOT_JUDGED: _not_judged,
    Kind.NO_CURVATURE: _no_curvature,
    Kind.NOT_MEASURED: lambda reason: f"The curvature could not be measured: {reason.detail}",
    Kind.NAN_IN_DATA: _nan_in_data,
    Kind.LOSS_NOT_FINITE: _loss_not_finite,
    Kind.NO_EXACT_LIMIT: _no_exact_limit,
    Kind.NO_DOUBLE_BACKWARD: _no_double_backward,
    Kind.WRONG_DOUBLE_BACKWARD: _wrong_double_backward,
    Kind.TEXT: lambda reason: reason.detail,
}
_CAUSES: dict[Kind, Callable[[Reason], str]] = {
    **_MEASURED,
    **NOTICES,
    **EVIDENCE,
    **TRAINING,
    Kind.LOOKAHEAD_DIVERGES: _lookahead_diverges,
    Kind.LOSS_DIVERGED: lambda reason: f"The last loss is {reason.losses[0]:.3g}, the first {reason.losses[2]:.3g}.",
    Kind.CHECK_FAILED: _check_failed,
    Kind.NO_CURVATURE_MEASURED: _check_failed,
    Kind.TASK_FAILED: lambda reason: (
        f"could not {reason.what}; training goes on.\nCause: {reason.error}: {reason.detail}"
    ),
    Kind.NO_LOOKAHEAD: _no_lookahead,
    Kind.NO_GRADIENT_NORM: _no_gradient_norm,
    Kind.NO_SNAPSHOT: _no_snapshot,
    Kind.ROLLED_BACK: _rolled_back,
    Kind.ROLLED_BACK_AT_END: _rolled_back_at_end,
    Kind.TOO_MANY_ROLLBACKS: _too_many_rollbacks,
    Kind.NO_BETA_SUGGESTED: lambda reason: f"No rates are suggested, for none were tried: {reason.detail}.",
    Kind.NO_RATE_TRAINS: _no_rate_trains,
    Kind.LITTLE_LEARNED: _little_learned,
}
