"""Meta-gradients of one task and of a batch of tasks.

Only the forward pass is vmapped, and autograd differentiates the result. Do not write ``grad(vmap(inner step))``: where
torch.func takes the inner gradient inside ``vmap`` and it is differentiated outside, the result is silently wrong
through norm layers (torch 2.13). Where torch.func takes the gradients (under torch.compile), ``vmap`` is outermost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_maml_guard.maml import sequential_queries
from lightning_maml_guard.maml.inner_loop import (
    InnerRate,
    Params,
    TaskLoss,
    adapt_with_sum,
    adapted_loss,
    detached,
    gradient,
)
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.utils.task_map import TaskMap, task_count

Auxiliary = Callable[[Params, Any], Any]


class MetaGradient(NamedTuple):
    """Meta-gradient of a batch of tasks.

    Attributes:
        gradients: Mean over the tasks of ``G(theta)``, by parameter.
        rate_gradients: The same for learned inner rates, by parameter (None without).
        losses: Query loss of each task after adaptation, shape ``(tasks,)``.
        auxiliary: What the ``auxiliary`` function returned, with a leading task dimension.
    """

    gradients: Params
    rate_gradients: Params | None
    losses: Tensor
    auxiliary: Any


def nothing(params: Params, query: Any) -> Tensor:
    """Return an empty tensor: the ``auxiliary`` function if there is none."""
    return torch.zeros(())


def task_meta_gradient(
    task_loss: TaskLoss,
    params: Params,
    inner_lr: InnerRate,
    support: Any,
    query: Any,
    *,
    inner_steps: int,
    order: str,
    learn_rates: bool = False,
    auxiliary: Auxiliary = nothing,
) -> tuple[tuple[Params, Params], tuple[Tensor, Any]]:
    """Compute one task's meta-gradient ``G(theta)``.

    ==========  ==============================================================================
    exact       ``d/dtheta L_Q(theta_K(theta))``, through the inner loop
    first       ``grad L_Q`` at ``theta_K`` (FOMAML)
    simplified  ``g_Q - K*alpha*H_Q g_S``; Takagi et al.'s ``g - alpha*H g`` if support = query
    ==========  ==============================================================================

    Written without ``detach``: the derivative of each towards ``theta`` is the Jacobian that decides stability. For
    ``first`` and ``simplified`` the inner rates' gradient is the first-order ``-sum_k g_k * G``.

    ``learn_rates`` also differentiates towards ``inner_lr``, which must be a dict then. Returns ``((gradient, rate
    gradient), (query loss after adaptation, auxiliary))``; the rate gradient is an empty dict unless asked for.
    """
    if order == "exact":

        def objective(theta: Params, rates: InnerRate) -> tuple[Tensor, tuple[Tensor, Any]]:
            loss, adapted = adapted_loss(task_loss, theta, rates, support, query, inner_steps)
            return loss, (loss, auxiliary(adapted, query))

        if learn_rates:
            return gradient(lambda point: objective(*point), (params, cast(Params, inner_lr)))
        found, report = gradient(lambda theta: objective(theta, inner_lr), params)
        return (found, {}), report

    adapted, total = adapt_with_sum(task_loss, params, support, inner_lr, inner_steps)
    if order == "first":

        def at_adapted(point: Params) -> tuple[Tensor, tuple[Tensor, Any]]:
            loss = task_loss(point, query)
            return loss, (loss, auxiliary(point, query))

        found, report = gradient(at_adapted, adapted)
        query_gradient, steps = found, total
    else:
        steps, _ = gradient(lambda theta: (task_loss(theta, support), ()), params)
        moves = {
            name: inner_steps * (inner_lr[name] if isinstance(inner_lr, dict) else inner_lr) * steps[name]
            for name in total
        }

        def along_move(theta: Params) -> tuple[Tensor, Params]:
            query_gradient, _ = gradient(lambda point: (task_loss(point, query), ()), theta)
            return torch.stack([(query_gradient[name] * moves[name]).sum() for name in moves]).sum(), query_gradient

        product, query_gradient = gradient(along_move, params)
        found = {name: query_gradient[name] - product[name] for name in params}
        report = (task_loss(adapted, query), auxiliary(adapted, query))
        steps = {name: inner_steps * steps[name] for name in total}
    rate_gradient = {name: -steps[name] * query_gradient[name] for name in total} if learn_rates else {}
    return (found, rate_gradient), report


def meta_gradient(
    problem: MetaProblem,
    *,
    tasks: TaskMap | None = None,
    learn_rates: bool = False,
    auxiliary: Auxiliary = nothing,
) -> MetaGradient:
    """Compute the mean meta-gradient over a problem's tasks; the problem's tensors are detached."""
    tasks = tasks or TaskMap(problem.task_chunk_size, problem.looped)
    params = {name: value.detach() for name, value in problem.params.items()}
    found = task_meta_gradients(
        problem, params, detached(problem.inner_lr), tasks, learn_rates=learn_rates, auxiliary=auxiliary
    )
    return averaged(found, learn_rates)


def task_meta_gradients(
    problem: MetaProblem,
    params: Params,
    rates: InnerRate,
    tasks: TaskMap,
    *,
    learn_rates: bool = False,
    auxiliary: Auxiliary = nothing,
) -> Any:
    """Return what ``task_meta_gradient`` does, of every task; ``problem``'s own parameters and rates are not read."""
    options: dict[str, Any] = {"inner_steps": problem.inner_steps, "order": problem.order, "learn_rates": learn_rates}

    def one(support: Any, query: Any) -> Any:
        return task_meta_gradient(problem.loss, params, rates, support, query, auxiliary=auxiliary, **options)

    def together(support: Any, query: Any) -> Any:
        count = task_count(support, "support")
        beside = SideBySide(params, rates, count)
        loss = beside.over(problem.loss)
        # A call of vmap takes 3 % of a small network's step.
        extra = (lambda *_: torch.zeros(count)) if auxiliary is nothing else beside.over(auxiliary)
        if problem.order == "exact" and sequential_queries.is_worthwhile(params, query):
            return sequential_queries.exact_gradients(
                problem.loss,
                loss,
                beside.params,
                beside.rates,
                support,
                query,
                auxiliary=auxiliary,
                inner_steps=problem.inner_steps,
                learn_rates=learn_rates,
            )
        return task_meta_gradient(loss, beside.params, beside.rates, support, query, auxiliary=extra, **options)

    return tasks.apply(one, together, problem.support, problem.query)


def averaged(found: Any, learn_rates: bool) -> MetaGradient:
    """Take the mean over the tasks of what ``task_meta_gradients`` returned."""
    (gradients, rate_gradients), (losses, extra) = found
    return MetaGradient(
        {name: value.mean(0) for name, value in gradients.items()},
        {name: value.mean(0) for name, value in rate_gradients.items()} if learn_rates else None,
        losses,
        extra,
    )


class SideBySide:
    """Parameters and rates of several tasks, with a leading task dimension, and only the forward pass vmapped.

    The tasks' losses share no parameters, so the gradient of their sum holds each task's own. Autograd differentiates
    torch's native operations, which is right for norm layers at second order, and a third faster than
    ``vmap(grad(...))``.
    """

    def __init__(self, params: Params, rates: InnerRate, count: int) -> None:
        self.params = {name: value.expand(count, *value.shape) for name, value in params.items()}
        self.rates = rates
        if isinstance(rates, dict):
            # A rate gets its parameter's dimensions, so that the task dimension comes first.
            self.rates = {name: rate.expand(self.params[name].shape) for name, rate in rates.items()}

    @staticmethod
    def over(function: Callable[..., Any]) -> Callable[..., Any]:
        """Vmap a function of one task's parameters and data."""
        return torch.func.vmap(function, (0, 0), randomness="different")


class AttachGradient(torch.autograd.Function):
    """A loss whose backward is a gradient that is already known.

    Lightning's automatic optimisation (precision, accumulation, clipping, DDP) then works also for the orders whose
    meta-gradient is not the gradient of a loss.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        scale = outputs[0]
        return None, None, *(scale.to(gradient.dtype) * gradient for gradient in ctx.gradients)
