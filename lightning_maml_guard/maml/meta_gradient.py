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
from torch.utils._pytree import tree_map

from lightning_maml_guard.maml import sequential_queries
from lightning_maml_guard.maml.inner_loop import (
    InnerRate,
    InnerUpdate,
    Params,
    StepRate,
    TaskLoss,
    adapt_with_sum,
    adapted_loss,
    gradient,
)
from lightning_maml_guard.maml.inner_updates import beside
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.sharding.meta_gradient import ShardedMaml
from lightning_maml_guard.utils.shards import any_split, split_like
from lightning_maml_guard.utils.task_map import TaskMap, each_task, task_count

Auxiliary = Callable[[Params, Any], Any]


class MetaGradient(NamedTuple):
    """Meta-gradient of a batch of tasks.

    Attributes:
        gradients: Mean over the tasks of ``G(theta)``, by parameter.
        rate_gradients: The same for learned inner rates, by parameter (None without); one such dict per step, in a
            tuple, where each step has its own.
        losses: Query loss of each task after adaptation, shape ``(tasks,)``.
        auxiliary: What the ``auxiliary`` function returned, with a leading task dimension.
    """

    gradients: Params
    rate_gradients: Params | tuple[Params, ...] | None
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
    update: InnerUpdate = None,
) -> tuple[tuple[Params, Any], tuple[Tensor, Any]]:
    """Compute one task's meta-gradient ``G(theta)``.

    ==========  ==============================================================================
    exact       ``d/dtheta L_Q(theta_K(theta))``, through the inner loop
    first       ``grad L_Q`` at ``theta_K`` (FOMAML)
    simplified  ``g_Q - K*alpha*H_Q g_S``; Takagi et al.'s ``g - alpha*H g`` if support = query
    ==========  ==============================================================================

    Written without ``detach``: the derivative of each towards ``theta`` is the Jacobian that decides stability. For
    ``first`` and ``simplified`` the inner rates' gradient is the first-order ``-sum_k g_k * G``. Rates of each step
    have the sum of them in place of ``K*alpha``.

    ``learn_rates`` also differentiates towards ``inner_lr``, which must be a dict (or one per step) then. Returns
    ``((gradient, rate gradient), (query loss after adaptation, auxiliary))``; the rate gradient is an empty dict unless
    asked for.
    """
    if order == "exact":

        def objective(theta: Params, rates: InnerRate) -> tuple[Tensor, tuple[Tensor, Any]]:
            loss, adapted = adapted_loss(task_loss, theta, rates, support, query, inner_steps, update)
            return loss, (loss, auxiliary(adapted, query))

        if learn_rates:
            return gradient(lambda point: objective(*point), (params, cast(Any, inner_lr)))
        found, report = gradient(lambda theta: objective(theta, inner_lr), params)
        return (found, {}), report

    adapted, totals = adapt_with_sum(task_loss, params, support, inner_lr, inner_steps, update)
    if order == "first":

        def at_adapted(point: Params) -> tuple[Tensor, tuple[Tensor, Any]]:
            loss = task_loss(point, query)
            return loss, (loss, auxiliary(point, query))

        found, report = gradient(at_adapted, adapted)
        query_gradient, steps = found, totals
    else:
        at_start, _ = gradient(lambda theta: (task_loss(theta, support), ()), params)
        # One rate counts for all steps, or each of several for its own.
        counts = _steps_of_rates(len(totals), inner_steps)
        rates = inner_lr if isinstance(inner_lr, tuple) else (inner_lr,)
        moves = {name: _summed(counts, rates, name) * at_start[name] for name in totals[0]}

        def along_move(theta: Params) -> tuple[Tensor, Params]:
            query_gradient, _ = gradient(lambda point: (task_loss(point, query), ()), theta)
            return torch.stack([(query_gradient[name] * moves[name]).sum() for name in moves]).sum(), query_gradient

        product, query_gradient = gradient(along_move, params)
        found = {name: query_gradient[name] - product[name] for name in params}
        report = (task_loss(adapted, query), auxiliary(adapted, query))
        steps = tuple({name: count * at_start[name] for name in totals[0]} for count in counts)
    if not learn_rates:
        return (found, {}), report
    rate_gradients = tuple({name: -each[name] * query_gradient[name] for name in each} for each in steps)
    return (found, rate_gradients if isinstance(inner_lr, tuple) else rate_gradients[0]), report


def _steps_of_rates(rates: int, inner_steps: int) -> list[int]:
    """How many of the steps each rate moves: the last one all that remain."""
    counts = [1 if index < inner_steps else 0 for index in range(rates - 1)]
    return [*counts, inner_steps - sum(counts)]


def _summed(counts: list[int], rates: tuple[StepRate, ...], name: str) -> Any:
    """The rates of one parameter, summed over the steps."""
    each = [count * (rate[name] if isinstance(rate, dict) else rate) for count, rate in zip(counts, rates, strict=True)]
    return sum(each[1:], each[0])


def meta_gradient(
    problem: MetaProblem,
    *,
    tasks: TaskMap | None = None,
    learn_rates: bool = False,
    auxiliary: Auxiliary = nothing,
) -> MetaGradient:
    """Compute the mean meta-gradient over a problem's tasks; the problem's tensors are detached."""
    if any_split(problem.params.values()):
        return _sharded(problem, auxiliary)
    tasks = tasks or TaskMap(problem.task_chunk_size, problem.looped)
    params = {name: value.detach() for name, value in problem.params.items()}
    return meta_gradient_at(
        problem, params, problem.rate_by_step(), tasks, learn_rates=learn_rates, auxiliary=auxiliary
    )


def meta_gradient_at(
    problem: MetaProblem,
    params: Params,
    rates: InnerRate,
    tasks: TaskMap,
    *,
    learn_rates: bool = False,
    auxiliary: Auxiliary = nothing,
) -> MetaGradient:
    """Compute the mean meta-gradient; ``problem``'s own parameters and rates are not read."""
    options: dict[str, Any] = {"inner_steps": problem.inner_steps, "order": problem.order, "learn_rates": learn_rates}
    update = problem.inner_update

    def one(support: Any, query: Any) -> Any:
        return task_meta_gradient(
            problem.loss, params, rates, support, query, auxiliary=auxiliary, update=update, **options
        )

    def together(support: Any, query: Any) -> Any:
        gradients, report = of_each(support, query)
        return tree_map(lambda value: value.sum(0), gradients), report

    def sharing(support: Any, query: Any) -> Any:
        def objective(theta: Params) -> tuple[Tensor, Any]:
            losses = problem.adapted_losses(theta, rates, support, query)
            return losses, (losses, torch.zeros(len(losses)))

        found, report = gradient(objective, params)
        return (found, {}), report

    def of_each(support: Any, query: Any) -> Any:
        count, loss = task_count(support, "support"), problem.side_by_side()
        side = SideBySide(params, rates, count)
        if problem.order == "exact" and sequential_queries.is_worthwhile(params, query):
            return sequential_queries.exact_gradients(
                problem.loss,
                loss,
                side.params,
                side.rates,
                support,
                query,
                auxiliary=auxiliary,
                update=beside(update),
                inner_steps=problem.inner_steps,
                learn_rates=learn_rates,
            )
        # A call of vmap takes 3 % of a small network's step.
        extra = (lambda *_: torch.zeros(count)) if auxiliary is nothing else side.over(auxiliary)
        return task_meta_gradient(
            loss, side.params, side.rates, support, query, auxiliary=extra, update=beside(update), **options
        )

    if problem.shares_weights and not learn_rates and auxiliary is nothing:
        # Also in place of a loop that the rule for large layers chose.
        tasks, together = TaskMap(tasks.chunk_size) if tasks.looped else tasks, sharing
    total, (losses, extra) = tasks.apply(one, together, problem.support, problem.query, added=True)
    gradients, rate_gradients = total
    # One call for all parameters, without the cost of a general tree.
    means = dict(zip(gradients, torch._foreach_div(list(gradients.values()), problem.tasks), strict=True))
    of_rates = tree_map(lambda value: value / problem.tasks, rate_gradients) if learn_rates else None
    return MetaGradient(means, of_rates, losses, extra)


def _sharded(problem: MetaProblem, auxiliary: Auxiliary) -> MetaGradient:
    """The same on sharded parameters, one task after another, by the module's own backward."""
    maml = ShardedMaml.of(problem)
    theta, tasks = maml.own.point(), list(zip(each_task(problem.support), each_task(problem.query), strict=True))
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    losses, extra = [], []
    for support, query in tasks:
        found = maml.of_task(theta, support, query)
        losses.append(found.loss)
        if auxiliary is not nothing:
            given = lambda params, query=query: auxiliary(params, query)  # noqa: E731
            extra.append(maml.own.call(given, found.adapted))
        for name, value in total.items():
            value += found.gradient[name] / len(tasks)
    gradients = {name: split_like(value, problem.params[name].detach()) for name, value in total.items()}
    return MetaGradient(gradients, None, torch.stack(losses), extra)


class SideBySide:
    """Parameters and rates of several tasks, with a leading task dimension, and only the forward pass vmapped.

    The tasks' losses share no parameters, so the gradient of their sum holds each task's own. Autograd differentiates
    torch's native operations, which is right for norm layers at second order, and a third faster than
    ``vmap(grad(...))``.
    """

    def __init__(self, params: Params, rates: InnerRate, count: int) -> None:
        self.params = {name: value.expand(count, *value.shape) for name, value in params.items()}
        self.rates: InnerRate = (
            tuple(self._expanded(each, count) for each in rates)
            if isinstance(rates, tuple)
            else self._expanded(rates, count)
        )

    def _expanded(self, rates: StepRate, count: int) -> StepRate:
        if not isinstance(rates, dict):
            return rates
        # A rate gets its parameter's dimensions, so that the task dimension comes first.
        wide = {name: rate if rate.dim() == self.params[name].dim() - 1 else None for name, rate in rates.items()}
        return {
            name: rates[name].expand(self.params[name].shape) if rate is None else rate.expand(count, *rate.shape)
            for name, rate in wide.items()
        }

    @staticmethod
    def over(function: Callable[..., Any]) -> Callable[..., Any]:
        """Vmap a function of one task's parameters and data."""
        return torch.func.vmap(function, (0, 0), randomness="different")
