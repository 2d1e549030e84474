"""Meta-gradients and losses of many runs at once: ``vmap`` over runs, then over tasks, then the gradient.

Source of the order of the transforms: ``maml.gradients``. Norm layers are computed from primitives, so that they are
right under every transform.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.maml.inner_loop import InnerRate, Params, adapt
from lightning_maml_guard.maml.meta_gradient import task_meta_gradient
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.utils.checks import first_line
from lightning_maml_guard.utils.double_backward import PrimitiveNorms


class GridError(ValueError):
    """The problem cannot be trained as one vmapped program; the message says why."""


@contextmanager
def vectorized() -> Iterator[None]:
    """Enter the conditions under which a grid trains: primitive norms, differentiable attention.

    Yields:
        Nothing.

    Raises:
        GridError: If a task loss cannot be vmapped over the runs.
        RuntimeError: Whatever else a task loss raises.
    """
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


def run_rates(problem: MetaProblem, alpha: Tensor) -> InnerRate:
    """Give a run its inner rate: for every parameter, or for those that ``problem.inner_lr`` names.

    Args:
        problem: The problem.
        alpha: The run's inner rate, a scalar tensor.

    Returns:
        What :func:`adapt` takes.
    """
    return dict.fromkeys(problem.inner_lr, alpha) if isinstance(problem.inner_lr, dict) else alpha


def grid_gradient(problem: MetaProblem, params: Params, alphas: Tensor) -> tuple[Params, Tensor]:
    """Compute the mean meta-gradient of every run on the same tasks.

    Args:
        problem: The tasks, the loss, ``K`` and the order; its params and rate are not read.
        params: Parameters of the runs, each of shape ``(runs, ...)``.
        alphas: Inner rate of each run, shape ``(runs,)``.

    Returns:
        ``G``, each of shape ``(runs, ...)``, and the mean query losses after adaptation, shape ``(runs,)``.
    """

    def run(theta: Params, alpha: Tensor) -> tuple[Params, Tensor]:
        rates = run_rates(problem, alpha)

        def one(support: Any, query: Any) -> tuple[Params, Tensor]:
            (gradient, _), (loss, _) = task_meta_gradient(
                problem.task_loss,
                theta,
                rates,
                support,
                query,
                inner_steps=problem.inner_steps,
                order=problem.order,
            )
            return gradient, loss

        gradients, losses = _over_tasks(problem, one)
        return {name: each.mean(0) for name, each in gradients.items()}, losses.mean()

    with vectorized():
        return torch.func.vmap(run, randomness="different")(params, alphas)


def grid_loss(problem: MetaProblem, params: Params, alphas: Tensor) -> Tensor:
    """Compute the mean query loss after adaptation of every run.

    Args:
        problem: The tasks, the loss and ``K``.
        params: Parameters of the runs, each of shape ``(runs, ...)``.
        alphas: Inner rate of each run, shape ``(runs,)``.

    Returns:
        Shape ``(runs,)``.
    """

    def run(theta: Params, alpha: Tensor) -> Tensor:
        rates = run_rates(problem, alpha)

        def one(support: Any, query: Any) -> Tensor:
            return problem.task_loss(adapt(problem.task_loss, theta, support, rates, problem.inner_steps), query)

        return _over_tasks(problem, one).mean()

    with vectorized():
        return torch.func.vmap(run, randomness="different")(params, alphas)


def _over_tasks(problem: MetaProblem, one: Any) -> Any:
    over = torch.func.vmap(one, randomness="different", chunk_size=problem.task_chunk_size)
    return over(problem.support, problem.query)


def copies(params: Params, runs: int) -> Params:
    """Start every run from the same parameters.

    Args:
        params: The parameters.
        runs: Number of runs.

    Returns:
        Detached copies, each of shape ``(runs, ...)``.
    """
    return {name: value.detach().expand(runs, *value.shape).clone() for name, value in params.items()}


def bytes_a_run(problem: MetaProblem) -> int:
    """Bound the memory that one run's step takes: the sum of all results computed on the way.

    Args:
        problem: The problem.

    Returns:
        Bytes; some of them are freed on the way, so the peak lies below.
    """
    few = replace(problem, inner_lr=problem.inner_lr)
    alpha = torch.zeros(1, dtype=next(iter(problem.params.values())).dtype).to(next(iter(problem.params.values())))
    with _Count() as count:
        grid_gradient(few, copies(problem.params, 1), alpha)
    return count.total


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result
