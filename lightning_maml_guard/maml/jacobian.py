"""The meta-update as a gradient field ``G(theta)``, whose Jacobian ``J = dG/dtheta`` decides stability.

No formula for ``J`` is used: the meta-gradients are functions without ``detach``, so autograd differentiates them as
they are, with ``K`` steps, learned inner rates and parameters that are not adapted.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lightning_maml_guard.kernels.shared_weights import StackLosses
from lightning_maml_guard.linalg.operators import Field, FieldValue, gradient_of
from lightning_maml_guard.maml.inner_loop import InnerRate, Params, adapted_loss
from lightning_maml_guard.maml.inner_updates import beside
from lightning_maml_guard.maml.meta_gradient import SideBySide, meta_gradient_at, task_meta_gradient
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.utils.task_map import TaskMap, task_count

# A step without weights of each task's own is several times as fast if it is no slower with so many times the shots.
_MANY = 4


def is_symmetric(problem: MetaProblem) -> bool:
    """Return True if ``J`` is symmetric: exact MAML descends a loss, the other orders do not."""
    return problem.order == "exact"


def meta_field(problem: MetaProblem, tasks: TaskMap) -> Field:
    """Return the gradient field of the meta-update, the mean over the tasks; its value is the mean query loss.

    ``problem.params`` is not read: the field takes its own.
    """
    rates = problem.rate_by_step()
    if _is_wide(problem):
        return gradient_of(lambda theta: problem.adapted_losses(theta, rates, problem.support, problem.query).mean())
    if is_symmetric(problem):

        def exact(params: Params, differentiable: bool) -> FieldValue:
            copies: list[Params] = []
            steps = problem.inner_steps
            loss = gradient_of(lambda theta: _query_losses(problem, theta, rates, tasks, copies, steps).mean())
            found = loss(params, differentiable)
            while sum(len(next(iter(group.values()))) for group in copies) > problem.tasks:
                del copies[0]  # of a vmap that failed before the loop
            return found._replace(by_task=copies)

        return exact

    def field(params: Params, differentiable: bool) -> FieldValue:
        # The gradients inside need no graph outside.
        with torch.set_grad_enabled(differentiable):
            found = meta_gradient_at(problem, params, rates, tasks)
        return FieldValue(found.losses.mean().detach(), dict(found.gradients))

    return field


def query_losses(problem: MetaProblem, params: Params, factor: float, tasks: TaskMap) -> Tensor:
    """Compute the tasks' query losses after adaptation at scaled inner rates, of 0: without it; no gradient is taken.

    ``problem.params`` is not read.
    """
    rates, steps = problem.at_factor(factor).rate_by_step(), problem.inner_steps if factor else 0
    if _is_wide(problem):  # its inner loop differentiates by what depends on the parameters
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        losses = cast(StackLosses, problem.task_losses)
        return losses.adapted(leaves, cast(float, rates), problem.support, problem.query, steps).detach()
    theta = {name: value.detach() for name, value in params.items()}
    return _query_losses(problem, theta, rates, tasks, [], steps).detach()


def _is_wide(problem: MetaProblem) -> bool:
    """Whether weights of each task's own, which tell the tasks apart in each product, cost more than that is worth."""
    losses = problem.task_losses
    if not (problem.shares_weights and isinstance(losses, StackLosses)):
        return False
    return problem.looped or losses.is_worthwhile(problem.support, _MANY * problem.inner_steps)


def _query_losses(
    problem: MetaProblem, params: Params, rates: InnerRate, tasks: TaskMap, copies: list[Params], steps: int
) -> Tensor:
    """The query losses after adaptation, and in ``copies`` the parameters of every group of tasks."""

    def one(support: Any, query: Any) -> Tensor:
        own = {name: value.unsqueeze(0) for name, value in params.items()}
        copies.append(own)
        theta = {name: value[0] for name, value in own.items()}
        return adapted_loss(problem.loss, theta, rates, support, query, steps, problem.inner_update)[0]

    def together(support: Any, query: Any) -> Tensor:
        side = SideBySide(params, rates, task_count(support, "support"))
        copies.append(side.params)
        loss, update = problem.side_by_side(), beside(problem.inner_update)
        return adapted_loss(loss, side.params, side.rates, support, query, steps, update)[0]

    return tasks.apply(one, together, problem.support, problem.query)


def curvature_by_task(problem: MetaProblem, params: Params, direction: Params, tasks: TaskMap) -> Tensor:
    """Return each task's curvature of the meta-update along one direction, ``u . J_task u``, of shape ``(tasks,)``.

    One backward pass serves all tasks: the derivative of ``u . G_task(theta + t*u)`` towards each task's ``t``.
    """
    rates = problem.rate_by_step()
    offsets = next(iter(params.values())).new_zeros(problem.tasks).requires_grad_()
    if _is_wide(problem):
        moved = offsets, direction
        losses = problem.adapted_losses(params, rates, problem.support, problem.query, moved)
        (slope,) = torch.autograd.grad(losses.sum(), offsets, create_graph=True)
        return torch.autograd.grad(slope.sum(), offsets)[0]

    def along(offset: Tensor, support: Any, query: Any) -> Tensor:
        moved = {name: value.detach() + offset * direction[name] for name, value in params.items()}
        (gradient, _), _ = task_meta_gradient(
            problem.loss,
            moved,
            rates,
            support,
            query,
            inner_steps=problem.inner_steps,
            order=problem.order,
            update=problem.inner_update,
        )
        return torch.stack([(gradient[name] * direction[name]).sum() for name in gradient]).sum()

    slopes = tasks(along, offsets, problem.support, problem.query, in_dims=(0, 0, 0))
    (curvatures,) = torch.autograd.grad(slopes.sum(), offsets)
    return curvatures.detach()
