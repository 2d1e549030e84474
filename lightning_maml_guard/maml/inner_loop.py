"""The inner loop: adapt to one task with ``K`` steps of its optimizer, as a function of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_maml_guard.utils.checks import shown
from lightning_maml_guard.utils.functorch import inside_transform

Params = dict[str, Tensor]
TaskLoss = Callable[[Params, Any], Tensor]
# One rate for all steps, for all parameters or for each that is adapted; or one such rate per step, in a tuple.
StepRate = float | Tensor | dict[str, Tensor]
InnerRate = StepRate | tuple[StepRate, ...]
# (params, grads, state) -> (params, state); the state is None before the first step. None: gradient descent.
InnerUpdate = Callable[[Params, Params, Any], tuple[Params, Any]] | None
P = TypeVar("P")
T = TypeVar("T")


def gradient(function: Callable[[P], tuple[Tensor, T]], point: P) -> tuple[P, T]:
    """Differentiate the sum of what a function returns: ``torch.func.grad(function, has_aux=True)(point)``.

    Outside of ``vmap`` and ``grad`` it uses ``torch.autograd.grad``, which gives the same numbers without torch.func's
    cost per operation: a convolutional network's tasks, one after another on a CPU, take a third less time. The
    results can be differentiated again if ``point`` requires a gradient.
    """
    if inside_transform():
        return torch.func.grad(function, has_aux=True)(point)  # of one task: a scalar
    # Of the usual dict of tensors, without the cost of a general tree.
    flat = type(point) is dict and all(isinstance(each, Tensor) for each in cast(Params, point).values())
    leaves, spec = (list(cast(Params, point).values()), None) if flat else tree_flatten(point)

    def together(values: list[Tensor]) -> P:
        if spec is None:
            return cast(P, dict(zip(cast(Params, point), values, strict=True)))
        return tree_unflatten(values, spec)

    connected = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    with torch.enable_grad():
        # New tensors, so that tensors the function closes over count as constants, as they do for torch.func.
        leaves = [
            leaf.view_as(leaf) if connected and leaf.requires_grad else leaf.detach().requires_grad_()
            for leaf in leaves
        ]
        value, extra = function(together(leaves))
        found = (
            torch.autograd.grad(value.sum(), leaves, create_graph=connected, allow_unused=True)
            if value.requires_grad
            else [None for _ in leaves]
        )
        # Not by materialize_grads: torch 2.6 makes zeros that require a gradient whether a graph is asked for or not.
        full = [
            torch.zeros_like(x, requires_grad=connected) if g is None else g for g, x in zip(found, leaves, strict=True)
        ]
    return together(full), extra if connected else _detached(extra)


def _detached(value: Any) -> Any:
    if type(value) is tuple:  # without the cost of a general tree
        return tuple(map(_detached, value))
    return value.detach() if isinstance(value, Tensor) else tree_map(_detached_leaf, value)


def _detached_leaf(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def rate_of_step(rates: InnerRate, step: int) -> StepRate:
    """Return the rate of one inner step; steps beyond the last rate use that one."""
    return rates[min(step, len(rates) - 1)] if isinstance(rates, tuple) else rates


def adapt(
    task_loss: TaskLoss,
    params: Params,
    support: Any,
    inner_lr: InnerRate,
    inner_steps: int,
    update: InnerUpdate = None,
) -> Params:
    """Adapt the parameters to one task: ``theta_{k+1} = theta_k - alpha_k * grad L(theta_k)``.

    With an ``update`` of its own, ``alpha_k`` times the movement that makes of the gradient. Nothing is detached, so
    the result can be differentiated. Parameters that a dict of rates does not name stay as they are, and are returned
    too.
    """
    adapted, _ = adapt_with_sum(task_loss, params, support, inner_lr, inner_steps, update, summed=False)
    return adapted


def adapted_loss(
    task_loss: TaskLoss,
    params: Params,
    rates: InnerRate,
    support: Any,
    query: Any,
    inner_steps: int,
    update: InnerUpdate = None,
) -> tuple[Tensor, Params]:
    """Return the query loss after adaptation, ``L_Q(theta_K)``, and the adapted parameters ``theta_K``."""
    adapted = adapt(task_loss, params, support, rates, inner_steps, update)
    return task_loss(adapted, query), adapted


def adapt_with_sum(
    task_loss: TaskLoss,
    params: Params,
    support: Any,
    inner_lr: InnerRate,
    inner_steps: int,
    update: InnerUpdate = None,
    *,
    summed: bool = True,
) -> tuple[Params, tuple[Params, ...]]:
    """Adapt, and also return the sum of the descended directions of each rate: the derivative towards it needs that.

    Without ``summed``, which costs another pass over the parameters at each step, the last of them.
    """
    named = rate_of_step(inner_lr, 0)
    moving = {name: params[name] for name in params if not isinstance(named, dict) or name in named}
    still = {name: value for name, value in params.items() if name not in moving}
    totals: list[Params | None] = [None] * (len(inner_lr) if isinstance(inner_lr, tuple) else 1)
    state = None
    for step in range(inner_steps):
        directions, _ = gradient(lambda fast: (task_loss({**still, **fast}, support), ()), moving)
        if update is not None:
            moved, state = _moved(update, moving, directions, state)
            directions = {name: value - moved[name] for name, value in moving.items()}
        at = min(step, len(totals) - 1)
        total = totals[at] if summed else None
        totals[at] = directions if total is None else {name: total[name] + each for name, each in directions.items()}
        rate = rate_of_step(inner_lr, step)
        moving = {
            name: _descended(value, directions[name], rate[name] if isinstance(rate, dict) else rate)
            for name, value in moving.items()
        }
    none = {name: torch.zeros_like(value) for name, value in moving.items()} if None in totals else {}
    found = tuple(none if each is None else each for each in totals)
    return {name: moving.get(name, value) for name, value in params.items()}, found


def _moved(update: Any, params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
    found = update(params, grads, state)
    if (
        isinstance(found, tuple)
        and len(found) == 2
        and isinstance(found[0], dict)
        and {name: value.shape for name, value in found[0].items()} == {n: v.shape for n, v in params.items()}
    ):
        return found
    raise TypeError(
        "Expected `inner_update` to return (params, state), the params a dict of those it was given, but got "
        f"{shown(found)}. Return {{name: value - step[name] for name, value in params.items()}}, state."
    )


def _descended(value: Tensor, slope: Tensor, rate: Tensor | float) -> Tensor:
    # One operation instead of two, forward and backward (torch.sub has two): 4 % of a small network's step.
    return value - rate * slope if isinstance(rate, Tensor) else torch.add(value, slope, alpha=-rate)
