"""Every reason has words, in full; and nothing reads them back."""

import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_maml_guard import MetaProblem
from lightning_maml_guard.maml.batch_errors import explained
from lightning_maml_guard.messages.reasons import IN_USERS_CODE, Kind, Reason, Remedy, of_error
from lightning_maml_guard.messages.sentences import (
    announced,
    cause,
    rates,
    remedy,
    returned,
    sentence,
    sentences,
)
from lightning_maml_guard.utils.checks import check_count

PACKAGE = Path(__file__).parents[2] / "lightning_maml_guard"
MEASURED = {"interval": (0.6, 0.65), "step": 3}
FAILED = {"error": "OSError", "detail": "disk full", "where": "data.py, line 3, in load"}
nan = math.nan

# An example of each kind.
EXAMPLES = [
    (
        Reason(
            Kind.ABOVE_LIMIT,
            rate="beta",
            value=1.5,
            limit=0.625,
            margin=0.9,
            effect="grows",
            growth=3.8,
            remedy=Remedy.LOWER_BETA,
            **MEASURED,
        ),
        "beta = 1.5 is 2.4x beta_c = 0.625 (0.6 to 0.65): along the sharpest direction each step multiplies the error "
        "by 3.8. Lower the optimizer's lr below 0.562.",
    ),
    (
        Reason(Kind.TOO_CLOSE, rate="alpha", value=0.24, limit=0.25, remedy=Remedy.MEASURE_SHARPER, **MEASURED),
        "alpha = 0.24 is too close to alpha_c = 0.25 (0.6 to 0.65) to be called safe or unsafe. Raise max_iter or lower "
        "tol for a sharper answer.",
    ),
    (
        Reason(Kind.NOT_JUDGED, rate="beta", detail="Adamax is not known."),
        "beta is not judged: Adamax is not known.",
    ),
    (
        Reason(Kind.NAN_IN_DATA, detail="The task loss is nan."),
        "The curvature could not be measured: The task loss is nan. The data holds nan. If it pads tasks to one size, "
        "list the tasks instead, each of its own size: support=[(x_1, y_1), (x_2, y_2), ...].",
    ),
    (
        Reason(Kind.NO_CURVATURE, step=0),
        "The loss has no curvature at these parameters and this batch, so there is no limit to compare with. That is "
        "not the same as safe: ReLU networks with dead units and linear losses look like this.",
    ),
    (
        Reason(Kind.NOT_MEASURED, detail="The task loss is nan."),
        "The curvature could not be measured: The task loss is nan.",
    ),
    (
        Reason(Kind.NO_EXACT_LIMIT, error="RuntimeError", detail="no second derivative"),
        "exact_beta_c could not be measured (RuntimeError: no second derivative); the simplified "
        "criterion is still checked.",
    ),
    (
        Reason(Kind.NO_DOUBLE_BACKWARD, what="Hessian", detail="not implemented"),
        "Hessian: this network has no second derivative by double backward (not implemented), so its "
        "curvature is measured by finite differences of gradients (less sharp, two gradients per "
        "product).",
    ),
    (
        Reason(Kind.WRONG_DOUBLE_BACKWARD, what="meta-update", value=0.25),
        "meta-update: the second derivative by double backward disagrees with finite differences by "
        "25.0%: a layer's double backward is wrong (a custom autograd Function without one), or the "
        "loss holds a value that was detached from the parameters, as in first-order MAML or a policy gradient. "
        "The curvature is measured by finite differences of gradients instead.",
    ),
    (
        Reason(
            Kind.LOOKAHEAD_DIVERGES,
            losses=(2.0, 1234.5, 1.0),
            steps=10,
            alpha=0.05,
            beta=1.5,
            remedy=Remedy.LOWER_BETA_UNSPECIFIED,
        ),
        "The next 10 steps, tried on copies at alpha = 0.05 and beta = 1.5, take the loss from 2 to "
        "1.23e+03 (training started from 1). Lower the optimizer's lr.",
    ),
    (
        Reason(Kind.LOSS_NOT_FINITE, losses=(nan, nan, 1.0), remedy=Remedy.START_AGAIN),
        "The loss is nan at these parameters. Start again with lower rates; ConvergenceGuard(action='rescale') rolls a "
        "run back to the last parameters measured safe.",
    ),
    (
        Reason(Kind.CHECK_FAILED, step=6, **FAILED),
        "the check at step 6 failed.\n"
        "Cause: OSError: disk full (data.py, line 3, in load)\n"
        "To do: If it comes from your code (the problem, the loss, a logger), fix it there. Training continues unguarded "
        "until a check succeeds. This is said once for each cause.",
    ),
    (
        Reason(Kind.CHECK_FAILED, step=6, effect=IN_USERS_CODE, **FAILED),
        "the check at step 6 failed.\n"
        "Cause: OSError: disk full\n"
        "To do: Fix data.py, line 3, in load. Training continues unguarded until a check succeeds. This is said once for "
        "each cause.",
    ),
    (
        Reason(Kind.NO_CURVATURE_MEASURED, step=6, **FAILED),
        "the check at step 6 failed to measure the curvature.\n"
        "Cause: OSError: disk full (data.py, line 3, in load)\n"
        "To do: If it comes from your code (the problem, the loss, a logger), fix it there. The lookahead alone judges "
        "until a check succeeds. This is said once for each cause.",
    ),
    (
        Reason(Kind.LOSS_DIVERGED, losses=(1234.5, nan, 1.5), remedy=Remedy.LOWER_BETA_UNSPECIFIED),
        "The last loss is 1.23e+03, the first 1.5. Lower the optimizer's lr.",
    ),
    (
        Reason(Kind.TASK_FAILED, what="roll the last step back", error="OSError", detail="disk full"),
        "could not roll the last step back; training goes on.\nCause: OSError: disk full",
    ),
    (
        Reason(
            Kind.BATCH_NOT_COPIED, step=4, what="lock", error="BatchCopyError", detail="cannot pickle 'lock' object"
        ),
        "the batch at step 4 cannot be copied (lock), so it is not checked; training goes on. A check works on a copy, "
        "so that training gets the batch unchanged.\n"
        "Cause: cannot pickle 'lock' object\n"
        "To do: Leave out of the batch what cannot be copied, or give lock a method clone().",
    ),
    (
        Reason(Kind.CAP_IGNORED, limit=0.01, value=0.05),
        "the module has an attribute inner_lr_cap, but under a cap of 0.01 the inner rate of its problem is 0.05, so the "
        "guard does not lower it.\n"
        "To do: Where the cap is not None, use the smaller of both in the inner loop and in the problem that is given to "
        "the guard, or remove the attribute.",
    ),
    (
        Reason(Kind.STATE_NOT_READ, detail="`caps.beta` is out of its range (-5)"),
        "the guard's state in the checkpoint cannot be read, so it starts anew.\n"
        "Cause: `caps.beta` is out of its range (-5)",
    ),
    (
        Reason(Kind.NO_LOOKAHEAD, detail="LBFGS needs a closure."),
        "the next steps cannot be tried, so the curvature decides where it judges a rate, and else the last loss. LBFGS "
        "needs a closure.",
    ),
    (
        Reason(Kind.NO_GRADIENT_NORM, error="OSError", detail="disk full"),
        "a jump of the loss still calls a check, a jump of the gradient norm does not: the norm could not be computed.\n"
        "Cause: OSError: disk full",
    ),
    (
        Reason(Kind.NO_SNAPSHOT, step=20, steps=10, error="MemoryError", detail="no room"),
        "parameters and optimizer state could not be copied at step 20, so a rollback goes to step 10. "
        "snapshot_device='cpu' keeps the copy off the device.\n"
        "Cause: MemoryError: no room",
    ),
    (
        Reason(Kind.NETWORK_COLLAPSED, step=15, value=0.5, limit=10.0, losses=(nan, 0.98, 1.0)),
        "step 15 is stable, but the network may have died.\n"
        "Why: lambda_max = 0.5 is 0.05 of what it was, while the loss (0.98) is near where training "
        "started (1): this happens when ReLUs have died.\n"
        "To do: Start again with lower rates (ConvergenceGuard(action='rescale', margin=0.5) keeps them "
        "lower), or with another activation.",
    ),
    (
        Reason(Kind.NETWORK_COLLAPSED, step=15, value=0.5, limit=10.0, losses=(nan, 0.98, 1.0), counts=(37, 40)),
        "step 15 is stable, but the network may have died.\n"
        "Why: lambda_max = 0.5 is 0.05 of what it was, while the loss (0.98) is near where training "
        "started (1): 37 of 40 ReLU units are 0 on the whole batch.\n"
        "To do: Start again with lower rates (ConvergenceGuard(action='rescale', margin=0.5) keeps them "
        "lower), or with another activation.",
    ),
    (
        Reason(Kind.BAREBONES),
        "nothing is done in this run: Trainer(barebones=True) asks for no logging and no extra work.",
    ),
    (
        Reason(Kind.MAXIMIZES, what="SGD"),
        "nothing is done in this run: SGD(maximize=True) climbs the loss, and a guard takes a loss that rises for one "
        "that diverges.\nTo do: Return the negated loss from training_step, and leave maximize out.",
    ),
    (
        Reason(Kind.NO_OPTIMIZER),
        "nothing is done in this run: configure_optimizers returns no optimizer, so there is no outer rate to judge.\n"
        "To do: Move the parameters by an optimizer; put the direction of an update of your own (Reptile) into their "
        ".grad before its step().",
    ),
    (
        Reason(Kind.OWN_BATCHES),
        "nothing is done in this run: training_step takes `dataloader_iter` and draws its batches itself, so the batch "
        "of the coming step is not known.\nTo do: Let it take `batch`.",
    ),
    (
        Reason(Kind.RATES_MOVED, value=0.38, limit=0.05, steps=0),
        "training has moved the inner rates that it learns: the largest was 0.05 at step 0 and is 0.38 now. Have the "
        "optimizer move them at a lower lr, in a parameter group of their own.",
    ),
    (
        Reason(Kind.ROLLED_BACK, step=15, steps=10, losses=(nan, nan, nan), counts=(1, 10), alpha=0.05, beta=0.05),
        "the loss was nan at step 15, so parameters and optimizer state were rolled back to step 10 and "
        "the batches since are skipped (rollback 1 of at most 10).\n"
        "Applied from now on: alpha = 0.05, beta = 0.05.",
    ),
    (
        Reason(Kind.ROLLED_BACK_AT_END, step=20, steps=10, losses=(nan, 1e4, 1.0)),
        "after the last step the loss was 1e+04 (training started at 1), so parameters and optimizer "
        "state were rolled back to step 10.",
    ),
    (
        Reason(Kind.TOO_MANY_ROLLBACKS, step=15, losses=(nan, nan, nan), counts=(2, 2)),
        "The loss was nan at step 15 after 2 rollbacks (max_rollbacks), each with lower rates.",
    ),
    (
        Reason(Kind.NO_BETA_SUGGESTED, detail="LadderOptions has steps=0"),
        "No rates are suggested, for none were tried: LadderOptions has steps=0.",
    ),
    (
        Reason(Kind.NO_RATE_TRAINS, steps=40),
        "No rates are suggested: at none of those tried is the loss within 40 steps on copies below that before "
        "training. More steps tell more (ladder=LadderOptions(longest=...)), or the data or the loss is at fault.",
    ),
    (
        Reason(Kind.LITTLE_LEARNED, steps=160, losses=(1.7, 1.609, nan)),
        "The suggested rates are a guess: in 160 steps on copies the loss falls by less than a tenth, from 1.7 to "
        "1.61. More steps tell more (ladder=LadderOptions(longest=...)).",
    ),
    (
        Reason(Kind.ADAPTATION_HARMFUL, alpha=0.5, losses=(3.1, 770.0, nan)),
        "alpha = 0.5 makes the tasks worse: the query loss is 3.1 before adaptation and 770 after it.",
    ),
    (
        Reason(Kind.ADAPTATION_HARMFUL, alpha=0.5, losses=(3.1, math.inf, nan), steps=2),
        "alpha = 0.5 makes the tasks worse: the query loss is 3.1 before adaptation and inf after it. The inner loop "
        "diverges from step 2 on.",
    ),
    (
        Reason(Kind.RATES_TRIED, losses=(2.5, 0.25, 1.0), steps=30, alpha=0.05, beta=0.125),
        "30 steps tried on copies end at a loss of 2.5; with alpha = 0.05, beta = 0.125 they end at 0.25.",
    ),
    (
        Reason(Kind.RATES_TRIED, losses=(math.inf, math.inf, 1.0), steps=30, beta=0.125),
        "30 steps tried on copies diverge; with beta = 0.125 they end at no finite loss either.",
    ),
    (
        Reason(Kind.SCHEDULE_AHEAD, beta=0.3, limit=0.177, steps=300, step=178),
        "the schedule takes beta to 0.3 at step 300; from step 178 on it is above the current beta_c = 0.177.",
    ),
    (
        Reason(Kind.SCHEDULE_AHEAD, beta=0.3, limit=0.177, steps=300, step=318),
        "the schedule took beta to 0.3 at step 300; from step 318 on it is above the current beta_c = 0.177.",
    ),
    (
        Reason(Kind.SCHEDULE_AHEAD, beta=0.3, limit=0.177, steps=300),
        "the schedule takes beta to 0.3 at step 300; the current beta_c is 0.177.",
    ),
    (
        Reason(Kind.ODD_BATCH, losses=(1e4, 1.25, 1.5), step=12),
        "at the same parameters the batch of step 12 has a loss of 1e+04 and the batches around it one of 1.25; without "
        "it the next steps survive at the rates as they are.",
    ),
    (
        Reason(Kind.UNITS_DIED, counts=(37, 40)),
        "37 of 40 ReLU units are 0 on the whole batch.",
    ),
    (
        Reason(Kind.NOT_LEARNING, losses=(2.9, nan, 3.25), steps=64),
        "the loss hardly falls: it is 2.9 on average after 64 steps, and the first losses were about 3.25.",
    ),
    (
        Reason(Kind.LEARNING_LOST, losses=(0.2, 0.9, 1.25), steps=56),
        "the run has collapsed: at least half of what it had learned is lost. On the latest batches the loss is 0.9; "
        "with the parameters of step 56 it is 0.2, before training 1.25.",
    ),
    (
        Reason(Kind.STALLED, losses=(1.6, nan, 2.5), limit=1.609, steps=128, counts=(37, 40)),
        "the loss has hardly fallen: after 128 steps its mean is 1.6, it started at 2.5, and guessing would give 1.61. "
        "37 of 40 ReLU units are 0 on the whole batch.",
    ),
    (
        Reason(Kind.STALLED, losses=(2.6, nan, 2.5), steps=64, value=0.08),
        "the loss has not fallen: after 64 steps its mean is 2.6, it started at 2.5. beta was never above 0.08 of "
        "beta_c: a higher rate may learn faster.",
    ),
    (
        Reason(Kind.STALLED, losses=(2.4, nan, 2.5), steps=64, value=0.5),
        "the loss has hardly fallen: after 64 steps its mean is 2.4, it started at 2.5.",
    ),
    (
        Reason(Kind.SCHEDULE_NOT_READ, error="NotImplementedError", detail="it has no state_dict"),
        "the learning rate schedule cannot be read ahead, so each rate is judged when it is due.\n"
        "Cause: NotImplementedError: it has no state_dict",
    ),
    (
        Reason(Kind.TEXT, detail="Said by an older version."),
        "Said by an older version.",
    ),
    (
        Reason(Kind.PROBLEM_DIFFERS, effect="tasks", value=16.0, losses=(2.95, 47.2, nan), steps=16),
        "the problem that is measured is not what training_step trains: the same batch has the loss 2.95 in the problem "
        "and 47.2 in training_step.\nWhy: Training's is 16 times larger, and the batch has 16 tasks: one sums over the "
        "tasks where the other averages, as a MetaProblem does.\nTo do: Divide the loss by the number of tasks in "
        "training_step. Until then the critical rates are not those of this training.",
    ),
    (
        Reason(Kind.PROBLEM_DIFFERS, effect="gradient", losses=(2.95, nan, nan), steps=16),
        "the problem that is measured is not what training_step trains: on the same batch their gradients differ (the "
        "problem's loss is 2.95).\nWhy: The losses agree where both are known, the meta-gradients do not: another "
        "`order` (first-order for exact MAML), a detach(), a loss for logging only, or a step along no gradient "
        "(Reptile, iMAML).\nTo do: State the problem with the order that training_step computes. Where it has none, "
        "advice about the inner rate holds, and critical outer rates are those of the problem as stated.",
    ),
    (
        Reason(Kind.PROBLEM_DIFFERS, effect="plain", losses=(2.95, 47.2, nan), steps=1),
        "the problem that is measured is not what training_step trains: the same batch has the loss 2.95 in the "
        "problem and 47.2 in training_step.\nWhy: It is another loss: a term is left out, another reduction taken, or "
        "it is that of another optimizer, or after another one's step.\nTo do: Make the problem's loss the one that "
        "its optimizer descends. Where optimizers take turns, the difference that the others' steps make is no mistake.",
    ),
    (
        Reason(Kind.NO_STEP_LOSS),
        "training_step returns no loss, so nothing calls a check between the scheduled ones, a diverged run is rolled "
        "back only at a check, and the loss at the first check is taken for that at the start. Return the loss from "
        "training_step to avoid all this.",
    ),
    (
        Reason(Kind.OWN_GRADIENTS),
        "training_step takes gradients itself, and is watched as plain training.\nTo do: If that is an inner loop, "
        'describe it by `meta_problem` (docs/guide.md, "A MAML module of your own"): without it the inner rate is not '
        "judged, and the outer one is blamed instead. If it is something else, such as a gradient penalty, there is "
        "nothing to do.",
    ),
    (
        Reason(Kind.OWN_GRADIENTS, effect="evidence"),
        "training_step takes gradients itself. If that is an inner loop, its rate may be what is too large: without a "
        "`meta_problem` it is not judged.",
    ),
    (
        Reason(Kind.PROBLEM_DIFFERS, effect="evidence"),
        "The problem that is measured is not what training_step trains, as was said: what was tried on copies may not "
        "hold for training.",
    ),
    (
        Reason(Kind.OPTIMIZERS_TAKE_TURNS),
        "there are no more checks: the optimizers that move the problem's parameters take turns, so no single "
        "problem describes their steps.\nTo do: Watch one optimizer at a time: a ConvergenceGuard(problem=...) for "
        "each, whose function (module, batch) returns PlainProblem(params, loss) of "
        "lightning_maml_guard.stability.problems, with the parameters that optimizer moves, by name, and the loss it "
        "descends as a function of them.",
    ),
    (
        Reason(Kind.CLIPPING_NOT_SEEN, step=113, beta=0.25, effect="lr"),
        "step 113: steps tried on copies diverge, while no rate is known to exceed its critical value. Gradients that "
        "training_step clips by itself are not clipped on copies, so this alone changes nothing.\nTo do: If they are "
        "not clipped, set the optimizer's lr to 0.25.",
    ),
    (
        Reason(Kind.CLIPPING_NOT_SEEN, step=113, alpha=0.5, beta=0.25, effect="max_lr"),
        "step 113: steps tried on copies diverge, while no rate is known to exceed its critical value. Gradients that "
        "training_step clips by itself are not clipped on copies, so this alone changes nothing.\nTo do: If they are "
        "not clipped, set the inner rate (inner_lr) to 0.5 and the schedule's max_lr to 0.25.",
    ),
    (
        Reason(Kind.CLIPPING_NOT_SEEN, step=113),
        "step 113: steps tried on copies diverge, while no rate is known to exceed its critical value. Gradients that "
        "training_step clips by itself are not clipped on copies, so this alone changes nothing.\nTo do: If they are "
        "not clipped, lower the rates.",
    ),
    (
        Reason(Kind.CLIPPING_NOT_SEEN),
        "Gradients that training_step clips by itself are not clipped on copies: if it clips them, higher rates may "
        "train than those that were found to.",
    ),
    (
        Reason(Kind.CLIPPING_FAILED, error="AssertionError", detail="not my optimizer"),
        "configure_gradient_clipping could not be called on copies, so a lookahead does not clip as the run does, and "
        "a lookahead alone changes nothing.\nCause: AssertionError: not my optimizer",
    ),
]


@pytest.mark.parametrize(("reason", "words"), EXAMPLES, ids=[reason.kind.name for reason, _ in EXAMPLES])
def test_a_reason_is_worded(reason, words):
    assert sentence(reason) == words


def test_every_kind_has_an_example_and_words_for_a_reason_that_knows_nothing_more():
    assert {reason.kind for reason, _ in EXAMPLES} == set(Kind)
    for kind in Kind:
        for reason in (Reason(kind), Reason(kind, rate="beta", detail="x", step=1, because=Reason(kind, detail="x"))):
            assert announced(reason).startswith("ConvergenceGuard: ")
            assert cause(reason) or (kind is Kind.TEXT and not reason.detail)


REMEDIES = {
    Remedy.NONE: "",
    Remedy.LOWER_ALPHA: "Lower the inner rate (inner_lr) below 0.225.",
    Remedy.LOWER_ALPHA_FIRST: "Lower the inner rate first.",
    Remedy.LOWER_BETA: "Lower the optimizer's lr below 0.225.",
    Remedy.LOWER_BETA_IF_STILL_ABOVE: "Lower the optimizer's lr only if it exceeds beta_c at the lowered inner rate too: "
    "beta_c moves with alpha.",
    Remedy.LOWER_BETA_UNSPECIFIED: "Lower the optimizer's lr.",
    Remedy.MEASURE_SHARPER: "Raise max_iter or lower tol for a sharper answer.",
    Remedy.START_AGAIN: "Start again with lower rates; ConvergenceGuard(action='rescale') rolls a run back to the last "
    "parameters measured safe.",
}


@pytest.mark.parametrize("what", Remedy, ids=lambda each: each.name)
def test_every_remedy_has_words(what):
    assert remedy(Reason(Kind.TEXT, limit=0.25, margin=0.9, remedy=what)) == REMEDIES[what]


BETA = next(reason for reason, _ in EXAMPLES if reason.kind is Kind.ABOVE_LIMIT)
ALPHA = Reason(Kind.ABOVE_LIMIT, rate="alpha", value=0.4, limit=0.25, interval=(0.2, 0.3), remedy=Remedy.LOWER_ALPHA)


@pytest.mark.parametrize(
    ("reason", "ending"),
    [
        (replace(BETA, growth=nan), "the update grows along the sharpest direction."),
        (replace(BETA, effect="no stable rate"), "no positive outer rate is stable while alpha exceeds alpha_c."),
        (
            replace(BETA, value=0.6, effect="within the margin"),
            "the update is nearer to its limit than the margin allows.",
        ),
        (
            replace(ALPHA, effect="inner loop"),
            "the inner loop itself diverges: along the sharpest direction each inner step multiplies the error by "
            "|1 - alpha*lambda_max| > 1.",
        ),
        (
            replace(ALPHA, effect="first order"),
            "first-order MAML's update, lambda*(1 - alpha*lambda)^K, turns against the sharpest direction, so no outer "
            "rate brings it to a minimum.",
        ),
        (
            replace(ALPHA, effect="simplified", order="first"),
            "simplified MAML's objective, lambda - alpha*lambda^2, curves downwards along the sharpest direction, so no "
            "outer rate brings it to a minimum. (This is the simplified criterion; it holds for first-order MAML with one "
            "inner step.)",
        ),
    ],
)
def test_an_effect_of_a_rate_above_its_limit_is_worded(reason, ending):
    assert cause(reason).endswith(f": {ending}")


def test_where_only_a_part_is_known_the_rest_is_left_out():
    known = Reason(Kind.LOOKAHEAD_DIVERGES, losses=(2.0, 99.0, 1.0), steps=10, beta=1.5)
    assert sentence(known) == (
        "The next 10 steps, tried on copies at beta = 1.5, take the loss from 2 to 99 (training started from 1)."
    )
    assert sentence(replace(known, losses=(1.1, 99.0, 1.0))).endswith("take the loss from 1.1 to 99.")
    assert "so there is nothing to roll back to." in sentence(Reason(Kind.NO_SNAPSHOT, step=0, steps=-1, **FAILED))
    assert sentence(Reason(Kind.ROLLED_BACK_AT_END, steps=10)) == (
        "the last step made parameters non-finite, so parameters and optimizer state were rolled back to step 10."
    )
    halved = Reason(Kind.ROLLED_BACK, step=15, steps=10, counts=(1, 10), beta=0.05, effect="halved", value=5.0)
    assert sentence(halved).endswith(
        "(rollback 1 of at most 10). 5 of 15 steps are lost. "
        "The curvature there could not be measured, so the outer rate is halved: beta = 0.05."
    )
    assert rates(nan, 0.5) == "beta = 0.5" and rates(0.1, 0.5) == "alpha = 0.1, beta = 0.5"


def test_of_a_return_what_is_true_is_said():
    start = "ConvergenceGuard: step 8: "
    assert returned(8, safe=True, applied=0.1, configured=1.5) == f"{start}the rates are back in the safe region."
    assert returned(8, safe=False, applied=0.1, configured=1.5) == (
        f"{start}the next steps survive at the applied beta = 0.1 (configured: 1.5)."
    )
    assert returned(8, safe=False, applied=1.5, configured=1.5) == (
        f"{start}the next steps survive again, at the edge of stability."
    )
    assert returned(8, safe=False, applied=1.5, configured=1.5, tried=False) == (
        f"{start}neither the curvature nor the last loss says any more that the run diverges."
    )


def test_an_announcement_names_the_step_once():
    assert announced(BETA).startswith("ConvergenceGuard: step 3: beta = 1.5 is 2.4x")
    failed = Reason(Kind.CHECK_FAILED, step=6, **FAILED)
    assert announced(failed).startswith("ConvergenceGuard: the check at step 6 failed")
    assert sentences([BETA, failed]) == (sentence(BETA), sentence(failed))


def test_an_exception_becomes_a_reason_with_the_place_it_came_from():
    try:
        {}["gone"]
    except KeyError as error:
        reason = of_error(Kind.CHECK_FAILED, error, step=2)
    assert (reason.error, reason.detail, reason.step, reason.effect) == ("KeyError", "'gone'", 2, IN_USERS_CODE)
    assert reason.where.startswith("test_sentences.py, line ") and reason.where.endswith(
        "in test_an_exception_becomes_a_reason_with_the_place_it_came_from"
    )
    assert of_error(Kind.CHECK_FAILED, ValueError("x")).where == ""


def test_generated_code_is_nobodys():
    """A dataclass's ``__init__`` has the file name ``<string>``."""
    with pytest.raises(TypeError) as caught:
        MetaProblem({"w": torch.ones(1)}, lambda params, data: params["w"].sum(), [{"x": None}], [{"x": None}])
    reason = of_error(Kind.CHECK_FAILED, caught.value)
    assert reason.where.startswith("test_sentences.py, line ") and reason.where.endswith("generated_code_is_nobodys")


def test_the_place_is_in_the_users_own_file_whoever_raised():
    def task_loss(params, data):
        return torch.ones(2) @ torch.ones(3)

    def by_torch():
        task_loss(None, None)

    def by_this_package():
        check_count("shots", 0)

    def by_this_package_because_of_torch():
        with explained(problem):
            problem.loss(problem.params, None)

    def by_the_standard_library():
        json.loads("[1, ")

    problem = MetaProblem({"w": torch.ones(1)}, task_loss, torch.ones(1, 1), torch.ones(1, 1))
    raisers = {
        by_torch: "task_loss",
        by_this_package: "by_this_package",
        by_this_package_because_of_torch: "task_loss",
        by_the_standard_library: "by_the_standard_library",
    }
    for raises, name in raisers.items():
        with pytest.raises((RuntimeError, ValueError)) as caught:
            raises()
        where = of_error(Kind.CHECK_FAILED, caught.value).where
        assert where.startswith("test_sentences.py, line ") and where.endswith(f"in {name}")


def test_reasons_are_the_same_if_they_differ_in_numbers_alone():
    assert BETA.key == replace(BETA, value=2.0, limit=0.5, step=90, growth=nan).key
    assert len({BETA.key, ALPHA.key, Reason(Kind.TOO_CLOSE, rate="beta").key}) == 3
    failed = Reason(Kind.CHECK_FAILED, where="a.py, line 3", error="OSError", detail="byte 17")
    assert failed.key == replace(failed, detail="byte 18").key != replace(failed, where="a.py, line 4").key
    note = Reason(Kind.NOT_JUDGED, rate="beta", detail="Adamax is not known.")
    assert note.key != replace(note, detail="Rprop is not known.").key


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("room", ["guard", "stability", "tuner"])
def test_no_sentence_is_parsed(room):
    """What holds the data reads the data: no regular expression, and no word of a sentence looked for in one."""
    paths = sorted((PACKAGE / room).glob("*.py"))
    assert len(paths) > 2
    assert not [path.name for path in paths if {"re", "regex"} & set(imported(path))]
    texts = ("Lower the", "Raise max_iter", "Start again", "exceeds", "is not judged", "is too large", "Set the")
    found = [
        (path.name, node.lineno)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare | ast.Call)
        for part in (node.left if isinstance(node, ast.Compare) else node, *getattr(node, "args", ()))
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.strip().startswith(texts)
    ]
    assert not found
