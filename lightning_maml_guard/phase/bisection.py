"""The largest convergent learning rates of full-batch trainings, found by training many rates at once and bisecting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.gradients import copies, grid_gradient
from lightning_maml_guard.phase.optimizers import MetaOptimizer, Params, meta_optimizer
from lightning_maml_guard.utils.checks import check_count

# A run whose meta-gradient has shrunk to this share of its start has converged; what follows is rounding.
_CONVERGED = 1e-10


def converges(
    problem: MetaProblem, alphas: Tensor, betas: Tensor, steps: int, optimizer: str | MetaOptimizer = "sgd"
) -> np.ndarray:
    """Train on the same tasks at every step; return True for the runs that converge, shape ``(runs,)``."""
    stepper = meta_optimizer(optimizer)
    params = copies(problem.params, len(alphas))
    state = stepper.init(params)
    norms: dict[int, Tensor] = {}
    # Traced once to plain operations, as the problem is the same at every step: a fifth of the time, bit for bit.
    gradient = make_fx(lambda theta: grid_gradient(problem, theta, alphas)[0])(params)
    gradient.graph.eliminate_dead_code()
    gradient.recompile()
    for step in range(steps):
        gradients = gradient(params)
        if step in {0, steps // 2, steps - 1}:
            norms[step] = _norm(gradients)
        params, state = stepper.step(params, gradients, state, betas, step)
    first, middle, last = (norms[step].cpu().numpy() for step in (0, steps // 2, steps - 1))
    # Near a rate's limit the one direction that decides grows or shrinks by less than a thousandth per step, long after
    # all others have vanished: so the end is compared with half-way.
    return np.isfinite(last) & ((last < middle) | (last <= _CONVERGED * first))


def critical_betas(
    problem: MetaProblem,
    alphas: Sequence[float],
    low: float,
    high: float,
    *,
    steps: int = 4000,
    relative: float = 1e-4,
    points: int = 16,
    optimizer: str | MetaOptimizer = "sgd",
) -> np.ndarray:
    """Find the largest convergent outer learning rate at each inner one.

    ``low`` is an outer rate that converges at each inner rate, ``high`` one that converges at none. Every round trains
    ``points`` outer rates between the two at once, until ``high / low <= 1 + relative``. Returned are the largest rate
    found to converge and the smallest found not to, shape ``(A, 2)``.
    """
    like = next(iter(problem.params.values()))
    columns = like.new_tensor(list(alphas))

    def converge(betas: np.ndarray) -> np.ndarray:
        each = torch.from_numpy(betas).to(like)
        by_run = columns.repeat_interleave(betas.shape[1])
        return converges(problem, by_run, each.reshape(-1), steps, optimizer).reshape(betas.shape)

    return _bisect(converge, len(columns), low, high, relative, points, "outer learning rate")


def critical_alpha(
    problem: MetaProblem,
    beta: float,
    low: float,
    high: float,
    *,
    steps: int = 4000,
    relative: float = 1e-4,
    points: int = 16,
    optimizer: str | MetaOptimizer = "sgd",
) -> tuple[float, float]:
    """Find the largest inner learning rate at which a small outer rate converges; see :func:`critical_betas`."""
    like = next(iter(problem.params.values()))

    def converge(alphas: np.ndarray) -> np.ndarray:
        each = torch.from_numpy(alphas).to(like).reshape(-1)
        return converges(problem, each, torch.full_like(each, beta), steps, optimizer).reshape(alphas.shape)

    ((inside, outside),) = _bisect(converge, 1, low, high, relative, points, "inner learning rate")
    return float(inside), float(outside)


def _bisect(
    converge: Callable[[np.ndarray], np.ndarray],
    columns: int,
    low: float,
    high: float,
    relative: float,
    points: int,
    rate: str,
) -> np.ndarray:
    check_count("points", points)
    if not 0 < low < high or not relative > 0:
        raise ValueError(
            f"Expected 0 < `low` < `high` and `relative` above 0 but got low={low!r}, high={high!r}, "
            f"relative={relative!r}."
        )
    bracket = np.tile([float(low), float(high)], (columns, 1))
    ends = converge(bracket)
    if not ends[:, 0].all():
        raise ValueError(f"The {rate} low={low:g} does not converge everywhere: give a lower one.")
    if ends[:, 1].any():
        raise ValueError(f"The {rate} high={high:g} still converges somewhere: give a higher one, or more `steps`.")
    while (bracket[:, 1] / bracket[:, 0]).max() > 1 + relative:
        inner = np.exp(np.linspace(np.log(bracket[:, 0]), np.log(bracket[:, 1]), points + 2, axis=1))
        found = converge(inner[:, 1:-1])
        # The first that fails ends the bracket.
        failed = np.concatenate([~found, np.ones((columns, 1), dtype=bool)], 1).argmax(1)
        bracket = np.stack([inner[np.arange(columns), failed], inner[np.arange(columns), failed + 1]], 1)
    return bracket


def _norm(gradients: Params) -> Tensor:
    squares = [each.flatten(1).square().sum(1) for each in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()
