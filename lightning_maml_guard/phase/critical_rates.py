"""Critical rates of many runs at once, each at its own parameters and its own inner rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.linalg.arnoldi import arnoldi
from lightning_maml_guard.linalg.lanczos import (
    LanczosRun,
    Matvec,
    NonFiniteProductError,
    Tridiagonal,
    lanczos,
    start_vector,
)
from lightning_maml_guard.linalg.layout import Layout
from lightning_maml_guard.linalg.operators import Field, Jacobian, gradient_of, scaled, simplified
from lightning_maml_guard.maml.inner_loop import Params, adapt
from lightning_maml_guard.maml.jacobian import is_symmetric, meta_field
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.gradients import run_rates
from lightning_maml_guard.phase.optimizers import MetaOptimizer, State
from lightning_maml_guard.theory.complex_ritz import arnoldi_resolved, complex_limit, complex_ritz
from lightning_maml_guard.theory.ritz import lanczos_resolved, rates_from_lanczos, ritz_values
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.task_map import TaskMap


class GridRates(NamedTuple):
    """Critical rates of each run; ``nan`` where there are none to tell.

    Attributes:
        alpha_c: The poster's, ``1/(K*lambda_max(H))``, shape ``(runs,)``.
        beta_c: The poster's at the run's inner rate, for the meta-optimizer as it runs, shape ``(runs,)``.
        exact_beta_c: From the Jacobian of the meta-update as configured, shape ``(runs,)``.
    """

    alpha_c: np.ndarray
    beta_c: np.ndarray
    exact_beta_c: np.ndarray


def grid_rates(
    problem: MetaProblem,
    params: Params,
    alphas: Tensor,
    optimizer: MetaOptimizer,
    state: State,
    taken: int,
    *,
    exact: bool = True,
    max_iter: int = 20,
    tol: float = 1e-2,
) -> GridRates:
    """Measure the critical rates of each run.

    One Lanczos run over a block-diagonal operator, one block a run, gives the poster's rates from the Hessian of the
    mean support loss, another the largest eigenvalue of the meta-update's Jacobian (Arnoldi, run by run, where it is
    not symmetric). A run whose products are not finite gets ``nan``. Before its first step Adam has no second moments,
    so its meta rates are ``nan`` as well.

    Args:
        problem: The tasks, the loss, ``K`` and the order.
        params: Parameters of the runs, each of shape ``(runs, ...)``.
        alphas: Inner rate of each run, shape ``(runs,)``.
        optimizer: The meta-optimizer.
        state: Its state.
        taken: Steps taken.
        exact: Whether to measure ``exact_beta_c`` too.
        max_iter: Products at most, of each of the two.
        tol: Relative residual at which to stop.

    Returns:
        The rates.
    """
    runs = len(alphas)
    unknown = np.full(runs, math.nan)
    limit = optimizer.response.limit
    ready = taken > 0 or not optimizer.preconditioned
    layout = Layout({name: value[0] for name, value in params.items()})
    divisor = optimizer.preconditioner(state, taken) if ready else None
    scale = None if divisor is None else 1 / layout.flatten(divisor, 1)

    def top(matvec: Matvec) -> np.ndarray:
        matvec, failed = _finite_rows(matvec if scale is None else scaled(matvec, scale), runs)
        return _where_finite([ritz_values(*each)[0][-1] for each in _lanczos(matvec).runs], failed)

    def _lanczos(matvec: Matvec) -> LanczosRun:
        def resolved(found: Sequence[Tridiagonal]) -> bool:
            return all(lanczos_resolved(*each, 0.0, tol, needs_positive_top=False) for each in found)

        # One start for all, so that what is measured of a run does not depend on its place in the chunk.
        start = start_vector((layout.size,), alphas).expand(runs, -1)
        return lanczos(matvec, start, max_iter=max_iter, stop=resolved)

    with double_backward():
        hessian = Jacobian(gradient_of(_mean_losses(problem)), params, layout)
        products, failed = _finite_rows(hessian, runs)
        each = [
            rates_from_lanczos(*run, float(alpha), inner_steps=problem.inner_steps)
            for run, alpha in zip(_lanczos(products).runs, alphas.tolist(), strict=True)
        ]
        alpha_c = _where_finite([found.alpha_c for found in each], failed)
        if not ready:
            return GridRates(alpha_c, unknown, unknown)
        if scale is None:
            beta_c = _where_finite([found.beta_c * limit / 2 for found in each], failed)
        else:
            by_entry = (problem.inner_steps * alphas).unsqueeze(-1)
            beta_c = _divided(limit, top(simplified(hessian, by_entry)))
            beta_c = np.where(alphas.cpu().numpy() > alpha_c, 0.0, beta_c)  # a multiplier is negative: none is stable
        if not exact:
            return GridRates(alpha_c, beta_c, unknown)
        if is_symmetric(problem):
            field = gradient_of(_adapted_losses(problem, alphas))
            return GridRates(alpha_c, beta_c, _divided(limit, top(Jacobian(field, params, layout))))
        exact_beta_c = [
            _by_arnoldi(problem, params, scale, index, float(alpha), optimizer, max_iter=max_iter, tol=tol)
            for index, alpha in enumerate(alphas.tolist())
        ]
        return GridRates(alpha_c, beta_c, np.array(exact_beta_c))


def _mean_losses(problem: MetaProblem) -> Callable[[Params], Tensor]:
    def run(theta: Params) -> Tensor:
        over = torch.func.vmap(problem.task_loss, (None, 0), randomness="same", chunk_size=problem.task_chunk_size)
        return over(theta, problem.support).mean()

    return lambda params: torch.func.vmap(run, randomness="same")(params)


def _adapted_losses(problem: MetaProblem, alphas: Tensor) -> Callable[[Params], Tensor]:
    def run(theta: Params, alpha: Tensor) -> Tensor:
        rates = run_rates(problem, alpha)

        def one(support: Any, query: Any) -> Tensor:
            return problem.task_loss(adapt(problem.task_loss, theta, support, rates, problem.inner_steps), query)

        over = torch.func.vmap(one, randomness="same", chunk_size=problem.task_chunk_size)
        return over(problem.support, problem.query).mean()

    return lambda params: torch.func.vmap(run, randomness="same")(params, alphas)


def _by_arnoldi(
    problem: MetaProblem,
    params: Params,
    scale: Tensor | None,
    index: int,
    alpha: float,
    optimizer: MetaOptimizer,
    *,
    max_iter: int,
    tol: float,
) -> float:
    names = problem.inner_lr
    like = next(iter(params.values()))
    rates = dict.fromkeys(names, like.new_tensor(alpha)) if isinstance(names, dict) else alpha
    field: Field = meta_field(replace(problem, inner_lr=rates), TaskMap(problem.task_chunk_size))
    jacobian = Jacobian(field, {name: value[index] for name, value in params.items()})
    # Its products are with the transpose, so the scaling comes from the right; the eigenvalues are the same.
    matvec: Matvec = jacobian if scale is None else lambda vector: jacobian(scale[index] * vector)

    def resolved(hessenberg: np.ndarray, residual: float) -> bool:
        return arnoldi_resolved(hessenberg, residual, (optimizer.response,), tol=tol, needs_finite_limit=False)

    start = start_vector((jacobian.layout.size,), like)
    try:
        found = arnoldi(matvec, start, max_iter=max_iter, stop=resolved)
    except NonFiniteProductError:  # what nan stands for in the result
        return math.nan
    return complex_limit(complex_ritz(found.hessenberg, found.residual), (optimizer.response,), tol=tol).rate


def _finite_rows(matvec: Matvec, runs: int) -> tuple[Matvec, list[Tensor]]:
    """Replace the products of runs that are not finite by 0, and say which runs those were."""
    failed: list[Tensor] = []

    def product(vector: Tensor) -> Tensor:
        found = matvec(vector)
        # A product whose own square overflows is as good as infinite: Lanczos takes its norm.
        largest = torch.finfo(found.dtype).max ** 0.5 / found.shape[-1]
        bad = ~(found.abs().amax(-1) < largest)
        failed[:] = [failed[0] | bad] if failed else [bad]
        return torch.where(failed[0].unsqueeze(-1), torch.zeros_like(found), found)

    return product, failed


def _where_finite(values: Sequence[float], failed: Sequence[Tensor]) -> np.ndarray:
    return np.where(failed[0].cpu().numpy(), math.nan, np.array(values, dtype=np.float64))


def _divided(limit: float, curvature: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(np.isnan(curvature), math.nan, limit / np.maximum(curvature, 0.0))
