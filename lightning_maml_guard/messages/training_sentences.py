"""Sentences about what a guard cannot see of a training, and about a problem that differs from it."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.messages.spelling import to_configure

_PER_OPTIMIZER = (
    "watch one optimizer at a time: a ConvergenceGuard(problem=...) for each, whose function (module, batch) returns "
    "PlainProblem(params, loss) of lightning_maml_guard.stability.problems, with the parameters that optimizer moves, "
    "by name, and the loss it descends as a function of them."
)


def take_turns() -> str:
    """Say what to do where optimizers take turns."""
    return f"If it has several optimizers that take turns (a GAN), {_PER_OPTIMIZER}"


# Why the problem's loss or gradient differs from training's and what to do, by ``Reason.effect``.
_DIFFERENCES = {
    "tasks": (
        "Training's is {times}, and the batch has {steps} tasks: one sums over the tasks where the other averages, as "
        "a MetaProblem does.",
        "Divide the loss by the number of tasks in training_step. Until then the critical rates are not those of this "
        "training.",
    ),
    "accumulated": (
        "Training's is {times}, and {steps} batches are accumulated: the loss is divided by their number twice, or not "
        "at all. Lightning divides it itself.",
        "Return the loss of one batch as it is.",
    ),
    "frozen": (
        "`params` holds parameters that are frozen (requires_grad=False): {what}.",
        "Leave them out: {{name: p for name, p in module.named_parameters() if p.requires_grad}}.",
    ),
    "not held": (
        "`params` holds parameters that no optimizer moves: {what}.",
        "Leave out what training neither moves nor adapts.",
    ),
    "lacking": (
        "The optimizer moves parameters that `params` lacks.",
        "Put every parameter that training moves into `params`.",
    ),
    "gradient": (
        "The losses agree where both are known, the meta-gradients do not: another `order` (first-order for exact "
        "MAML), a detach(), a loss for logging only, or a step along no gradient (Reptile, iMAML).",
        "State the problem with the order that training_step computes. Where it has none, advice about the inner rate "
        "holds, and critical outer rates are those of the problem as stated.",
    ),
    "plain": (
        "It is another loss: a term is left out, another reduction taken, or it is that of another optimizer, or after "
        "another one's step.",
        "Make the problem's loss the one that its optimizer descends. Where optimizers take turns, the difference that "
        "the others' steps make is no mistake.",
    ),
    "not finite": (
        "Training's loss is finite and the problem's is not: padding with nan, or an inner loop of its own.",
        "Give the problem the data and the loss that training_step uses.",
    ),
}
_OTHER_DIFFERENCE = (
    "It is another loss. The problem has {tasks} (the first dimension of `support` and `query`); usual causes are "
    "another inner_lr, number of inner steps or inner optimizer, support for query, shots taken for tasks, or a term "
    "of the loss left out.",
    "Make the problem's loss that of training_step.",
)


def _problem_differs(reason: Reason) -> str:
    if reason.effect == "evidence":
        return (
            "The problem that is measured is not what training_step trains, as was said: what was tried on copies may "
            "not hold for training."
        )
    own, training, _ = reason.losses
    factor = reason.value if reason.value >= 1 else 1 / reason.value if reason.value > 0 else math.nan
    said = "the problem that is measured is not what training_step trains: "
    if math.isnan(training):
        said += f"on the same batch their gradients differ (the problem's loss is {own:.3g})."
    else:
        said += f"the same batch has the loss {own:.3g} in the problem and {training:.3g} in training_step."
    numbers = {
        "times": f"{factor:.3g} times {'larger' if reason.value >= 1 else 'smaller'}",
        "tasks": f"{reason.steps} task{'s' if reason.steps != 1 else ''}",
        "steps": reason.steps,
        "what": reason.what,
    }
    why, to_do = (each.format(**numbers) for each in _DIFFERENCES.get(reason.effect, _OTHER_DIFFERENCE))
    return f"{said}\nWhy: {why}\nTo do: {to_do}"


def _own_gradients(reason: Reason) -> str:
    if reason.effect == "evidence":
        return (
            "training_step takes gradients itself. If that is an inner loop, its rate may be what is too large: "
            "without a `meta_problem` it is not judged."
        )
    return (
        "training_step takes gradients itself, and is watched as plain training.\nTo do: If that is an inner loop, "
        'describe it by `meta_problem` (docs/guide.md, "A MAML module of your own"): without it the inner rate is not '
        "judged, and the outer one is blamed instead. If it is something else, such as a gradient penalty, there is "
        "nothing to do."
    )


def _clipping_not_seen(reason: Reason) -> str:
    said = "gradients that training_step clips by itself are not clipped on copies"
    if reason.step is None:
        return f"{said[0].upper()}{said[1:]}: if it clips them, higher rates may train than those that were found to."
    to_set = " and ".join(to_configure(reason.alpha, reason.beta, reason.effect))
    return (
        f"step {reason.step}: steps tried on copies diverge, while no rate is known to exceed its critical value. "
        f"{said[0].upper()}{said[1:]}, so this alone changes nothing.\nTo do: If they are not clipped, "
        f"{f'set {to_set}' if to_set else 'lower the rates'}."
    )


TRAINING: dict[Kind, Callable[[Reason], str]] = {
    Kind.PROBLEM_DIFFERS: _problem_differs,
    Kind.BAREBONES: lambda reason: (
        "nothing is done in this run: Trainer(barebones=True) asks for no logging and no extra work."
    ),
    Kind.MAXIMIZES: lambda reason: (
        f"nothing is done in this run: {reason.what}(maximize=True) climbs the loss, and a guard takes a loss that "
        "rises for one that diverges.\nTo do: Return the negated loss from training_step, and leave maximize out."
    ),
    Kind.NO_OPTIMIZER: lambda reason: (
        "nothing is done in this run: configure_optimizers returns no optimizer, so there is no outer rate to judge.\n"
        "To do: Move the parameters by an optimizer; put the direction of an update of your own (Reptile) into their "
        ".grad before its step()."
    ),
    Kind.OWN_BATCHES: lambda reason: (
        "nothing is done in this run: training_step takes `dataloader_iter` and draws its batches itself, so the batch "
        "of the coming step is not known.\nTo do: Let it take `batch`."
    ),
    Kind.NO_STEP_LOSS: lambda reason: (
        "training_step returns no loss, so nothing calls a check between the scheduled ones, a diverged run is rolled "
        "back only at a check, and the loss at the first check is taken for that at the start. Return the loss from "
        "training_step to avoid all this."
    ),
    Kind.OWN_GRADIENTS: _own_gradients,
    Kind.OPTIMIZERS_TAKE_TURNS: lambda reason: (
        "there are no more checks: the optimizers that move the problem's parameters take turns, so no single "
        f"problem describes their steps.\nTo do: {_PER_OPTIMIZER[0].upper()}{_PER_OPTIMIZER[1:]}"
    ),
    Kind.CLIPPING_NOT_SEEN: _clipping_not_seen,
    Kind.CLIPPING_FAILED: lambda reason: (
        "configure_gradient_clipping could not be called on copies, so a lookahead does not clip as the run does, and "
        f"a lookahead alone changes nothing.\nCause: {reason.error}: {reason.detail}"
    ),
}
