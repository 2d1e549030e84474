"""Losses and meta-gradients of many runs at once: ``vmap`` over runs, then over tasks, then the gradient.

``grad`` of a ``vmap`` is wrong for some layers, so ``vmap`` is outermost. Norm layers are computed from primitives, so
that they are right under every transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.maml.inner_loop import InnerRate, Params, adapted_loss
from lightning_maml_guard.maml.meta_gradient import task_meta_gradient
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.utils.checks import first_line
from lightning_maml_guard.utils.double_backward import PrimitiveNorms
from lightning_maml_guard.utils.task_map import TaskMap

RatesOf = Callable[[MetaProblem, Tensor], InnerRate]
# What the intermediate results of one step may take on a CPU; more gains nothing once the caches overflow.
_CPU_BYTES = 1e9


class GridError(ValueError):
    """The problem cannot be trained as one vmapped program; the message says why."""


def copies(params: Params, runs: int) -> Params:
    """Detached copies of the parameters for every run, each of shape ``(runs, ...)``."""
    return {name: value.detach().expand(runs, *value.shape).clone() for name, value in params.items()}


def inner_rates(problem: MetaProblem, alpha: Tensor) -> InnerRate:
    """The inner learning rate ``alpha`` of one run, for the parameters that ``problem.inner_lr`` names."""
    if problem.per_step:
        raise GridError(
            "A grid has one inner learning rate for all steps of a run, but the problem's `inner_lr` has one for each "
            "step. Give the problem one rate, as in inner_lr=0.1; the grid's `alphas` take its place."
        )
    return dict.fromkeys(problem.inner_lr, alpha) if isinstance(problem.inner_lr, dict) else alpha


def scaled_rates(problem: MetaProblem, alpha: Tensor) -> InnerRate:
    """The problem's own rates, scaled so that the largest is ``alpha``: they stay in proportion."""
    if problem.uniform:
        return alpha
    factor = alpha / problem.alpha if problem.alpha > 0 else 0 * alpha

    def scaled(rate: Any) -> Any:
        return {name: each * factor for name, each in rate.items()} if isinstance(rate, dict) else rate * factor

    rates = problem.rate_by_step()
    return tuple(map(scaled, rates)) if isinstance(rates, tuple) else scaled(rates)


def adapted_losses(
    problem: MetaProblem, params: Params, alphas: Tensor, *, randomness: str, rates_of: RatesOf = inner_rates
) -> Tensor:
    """Mean query loss after adaptation of every run, shape ``(runs,)``, differentiable in ``params``."""

    def run(theta: Params, alpha: Tensor) -> Tensor:
        rates = rates_of(problem, alpha)

        def one(support: Any, query: Any) -> Tensor:
            update = problem.inner_update
            return adapted_loss(problem.task_loss, theta, rates, support, query, problem.inner_steps, update)[0]

        return over_tasks(problem, one, randomness).mean()

    return torch.func.vmap(run, randomness=randomness)(params, alphas)


def grid_loss(problem: MetaProblem, params: Params, alphas: Tensor, rates_of: RatesOf = inner_rates) -> Tensor:
    """Mean query loss after adaptation of every run, shape ``(runs,)``, as training sees it."""
    with vectorized():
        return adapted_losses(problem, params, alphas, randomness="different", rates_of=rates_of)


def grid_gradient(
    problem: MetaProblem, params: Params, alphas: Tensor, rates_of: RatesOf = inner_rates
) -> tuple[Params, Tensor]:
    """Mean meta-gradient ``G`` of every run, and its mean query loss after adaptation, shape ``(runs,)``.

    All runs see the tasks of ``problem``, whose own parameters and inner learning rate are not read. Parameters and
    gradients have shape ``(runs, ...)``.
    """

    def run(theta: Params, alpha: Tensor) -> tuple[Params, Tensor]:
        rates = rates_of(problem, alpha)

        def one(support: Any, query: Any) -> tuple[Params, Tensor]:
            (gradient, _), (loss, _) = task_meta_gradient(
                problem.task_loss,
                theta,
                rates,
                support,
                query,
                inner_steps=problem.inner_steps,
                order=problem.order,
                update=problem.inner_update,
            )
            return gradient, loss

        gradients, losses = over_tasks(problem, one, "different")
        return {name: each.mean(0) for name, each in gradients.items()}, losses.mean()

    with vectorized():
        return torch.func.vmap(run, randomness="different")(params, alphas)


def runs_at_once(problem: MetaProblem, memory: float | None = None) -> int:
    """Runs that fit ``memory`` bytes (None: 1e9 on a CPU, half of a GPU's memory)."""
    device = next(iter(problem.params.values())).device
    if memory is None:
        memory = torch.cuda.get_device_properties(device).total_memory / 2 if device.type == "cuda" else _CPU_BYTES
    return max(1, int(memory / max(bytes_per_run(problem), 1)))


def bytes_per_run(problem: MetaProblem) -> int:
    """Upper bound on the memory of one run's step: the sum of all its intermediate results."""
    alpha = next(iter(problem.params.values())).detach().new_zeros(1)
    with _CountBytes() as count:
        grid_gradient(problem, copies(problem.params, 1), alpha, scaled_rates)
    return count.total


def over_tasks(problem: MetaProblem, one: Any, randomness: str) -> Any:
    """Run a function of a task's support and query set over a problem's tasks, inside a vmap over runs."""
    if problem.listed:
        return TaskMap(looped=True)(one, problem.support, problem.query, in_dims=(0, 0))
    over = torch.func.vmap(one, randomness=randomness, chunk_size=problem.task_chunk_size)
    return over(problem.support, problem.query)


@contextmanager
def vectorized() -> Iterator[None]:
    """Norms from primitives and differentiable attention; raises a GridError if a task loss cannot be vmapped."""
    try:
        with PrimitiveNorms(), sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise GridError(
            "The task loss cannot be vmapped over the runs of a grid: write it without in-place state, item() and "
            f"branches on values. torch.func.vmap said: {first_line(error)}"
        ) from error


class _CountBytes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result
