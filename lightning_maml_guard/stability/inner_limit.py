"""What an inner loop says about its own limit: gradient descent, rates of each step, an optimizer of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_maml_guard.linalg.layout import Params, rows_of
from lightning_maml_guard.maml.inner_updates import Adam, Momentum, RMSprop
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.optim.stability_limits import adam_response, rmsprop_response, sgd_response
from lightning_maml_guard.theory.multiplier import inner_limit, multiplier, turns_at

# Rates of each step count as one profile for all parameters if they differ from it by no more than this share.
_PROPORTIONAL = 1e-6
_NEGATIVE_RATE = "a learned inner rate is negative, and the condition is about rates of at least 0."


@dataclass(frozen=True)
class InnerLoopLimit:
    """The limit of ``alpha`` in units of the curvature.

    Attributes:
        limit: ``alpha_c * lambda_max``, of the Hessian scaled by ``rates / alpha``; ``nan`` if it is not known.
        rates: One rate per parameter entry, the largest over the steps (order simplified: their mean); None where one
            rate moves everything.
        note: Why no limit is known, or what lies beyond a lower bound.
        lower_bound: Whether the limit is a lower bound only.
    """

    limit: float
    rates: Params | None = None
    note: str = ""
    lower_bound: bool = False


def inner_loop_limit(problem: MetaProblem) -> InnerLoopLimit:
    """State the limit of a problem's inner loop."""
    usual = multiplier(problem.alpha, problem.order, problem.inner_steps).inner_limit
    rates = None if problem.uniform else problem.rates()
    if problem.per_step:
        assert rates is not None
        return _of_each_step(problem, rates, usual)
    if problem.inner_update is not None:
        limit, note = _of_update(problem)
        return InnerLoopLimit(limit, rates, note)
    return InnerLoopLimit(usual, rates)


def _of_each_step(problem: MetaProblem, rates: Params, usual: float) -> InnerLoopLimit:
    each = torch.cat([rows_of(rate.double()) for rate in rates.values()], 1)
    top = each.amax(0)
    largest = {name: rate.amax(0) for name, rate in rates.items()}
    if problem.inner_update is not None:
        return InnerLoopLimit(math.nan, largest, "no limit is known of inner rates by step under an `inner_update`.")
    if bool((each < 0).any()):
        return InnerLoopLimit(math.nan, largest, _NEGATIVE_RATE)
    if problem.order == "simplified":
        return InnerLoopLimit(usual, {name: rate.mean(0) for name, rate in rates.items()})
    square = (top * top).sum()
    ratios = (each * top).sum(1) / square if bool(square > 0) else torch.ones_like(each[:, 0])
    deviation = (each - ratios.unsqueeze(1) * top).abs().amax()
    if bool(deviation <= _PROPORTIONAL * top.amax()):
        return InnerLoopLimit(inner_limit(problem.order, (ratios / ratios.max()).tolist()), largest)
    note = (
        "the inner rates differ between steps and parameters at once, so the steps share no directions and only a "
        "lower bound of their limit is known."
    )
    # Every step contracts in the norm of the Hessian while each of its rates is below 2 over its curvature.
    return InnerLoopLimit(2.0 if problem.order == "exact" else math.nan, largest, note, lower_bound=True)


def _of_update(problem: MetaProblem) -> tuple[float, str]:
    update = problem.inner_update
    if isinstance(update, Momentum):
        response = sgd_response(update.momentum, nesterov=update.nesterov)
        limit = response.limit
        if problem.order == "first":
            limit = turns_at(lambda z: response.contraction(z, problem.inner_steps), limit)
        return limit, ""
    if isinstance(update, (Adam, RMSprop)):
        name = type(update).__name__
        frozen = adam_response(update.betas[0]) if isinstance(update, Adam) else rmsprop_response(update.momentum)
        return math.nan, (
            f"the inner loop's {name} divides by a second moment that starts anew for each task and changes in every "
            f"step, and its limit is known for a frozen one alone: {frozen.limit:.3g} over the curvature divided by "
            "its root. exact_beta_c is measured with the real one."
        )
    return math.nan, "the limit of an `inner_update` of one's own is not known. exact_beta_c is measured through it."
