"""Critical learning rates of many runs at once, each at its own parameters and its own inner learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.linalg.arnoldi import arnoldi
from lightning_maml_guard.linalg.lanczos import Matvec, NonFiniteProductError, Tridiagonal, lanczos, start_vector
from lightning_maml_guard.linalg.layout import Layout
from lightning_maml_guard.linalg.operators import Jacobian, gradient_of, scaled, simplified
from lightning_maml_guard.maml.inner_loop import Params
from lightning_maml_guard.maml.jacobian import is_symmetric, meta_field
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.gradients import adapted_losses, over_tasks
from lightning_maml_guard.phase.optimizers import MetaOptimizer, State
from lightning_maml_guard.theory.complex_ritz import arnoldi_resolved, complex_limit, complex_ritz
from lightning_maml_guard.theory.ritz import lanczos_resolved, rates_from_lanczos, ritz_values
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.task_map import TaskMap


class GridRates(NamedTuple):
    """Critical rates of each run; ``nan`` where they could not be measured.

    Attributes:
        alpha_c: By the simplified criterion, ``1/(K*lambda_max(H))``, shape ``(runs,)``.
        beta_c: By the simplified criterion at the run's inner learning rate, for its meta-optimizer, shape ``(runs,)``.
            Both are ``nan`` under an ``inner_update``: the criterion is about gradient descent.
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
    """Measure the critical rates of each run after ``taken`` steps.

    One Lanczos run over a block-diagonal operator, one block per run, gives the rates of the simplified criterion from
    the Hessian of the mean support loss. Another gives the largest eigenvalue of the meta-update's Jacobian; where that
    is not symmetric, Arnoldi does, run by run. A run whose matrix-vector products are not finite gets ``nan``. Before
    its first step Adam has no second moments, so its outer rates are ``nan`` as well.
    """
    runs = len(alphas)
    unknown = np.full(runs, math.nan)
    limit = optimizer.response.limit
    ready = taken > 0 or not optimizer.preconditioned
    layout = Layout({name: value[0] for name, value in params.items()})
    divisor = optimizer.preconditioner(state, taken) if ready else None
    scale = None if divisor is None else 1 / layout.flatten(divisor, 1)

    def run_lanczos(matvec: Matvec) -> tuple[Sequence[Tridiagonal], np.ndarray]:
        def resolved(found: Sequence[Tridiagonal]) -> bool:
            return all(lanczos_resolved(*each, 0.0, tol, needs_positive_top=False) for each in found)

        product, failed = _finite_rows(matvec)
        # One start vector for all runs: what is measured of a run must not depend on its place in the chunk.
        start = start_vector((layout.size,), alphas).expand(runs, -1)
        found = lanczos(product, start, max_iter=max_iter, stop=resolved)
        return found.runs, failed[0].cpu().numpy()

    def top_eigenvalues(matvec: Matvec) -> np.ndarray:
        found, failed = run_lanczos(matvec if scale is None else scaled(matvec, scale))
        return np.where(failed, math.nan, [ritz_values(*each)[0][-1] for each in found])

    with double_backward():
        hessian = Jacobian(gradient_of(_support_losses(problem)), params, layout)
        found, failed = run_lanczos(hessian)
        each = [
            rates_from_lanczos(*run, float(alpha), inner_steps=problem.inner_steps)
            for run, alpha in zip(found, alphas.tolist(), strict=True)
        ]
        alpha_c = np.where(failed, math.nan, [rates.alpha_c for rates in each])
        if not ready:
            return GridRates(alpha_c if problem.inner_update is None else unknown, unknown, unknown)
        if scale is None:
            beta_c = np.where(failed, math.nan, [rates.beta_c * limit / 2 for rates in each])
        else:
            by_entry = (problem.inner_steps * alphas).unsqueeze(-1)
            beta_c = _divided(limit, top_eigenvalues(simplified(hessian, by_entry)))
            # Beyond alpha_c a multiplier is negative: no outer rate is stable.
            beta_c = np.where(alphas.cpu().numpy() > alpha_c, 0.0, beta_c)
        if problem.inner_update is not None:
            alpha_c = beta_c = unknown
        if not exact:
            return GridRates(alpha_c, beta_c, unknown)
        if is_symmetric(problem):
            field = gradient_of(lambda theta: adapted_losses(problem, theta, alphas, randomness="same"))
            exact_beta_c = _divided(limit, top_eigenvalues(Jacobian(field, params, layout)))
        else:
            by_run = [
                _limit_by_arnoldi(problem, params, scale, run, alphas[run], optimizer, max_iter=max_iter, tol=tol)
                for run in range(runs)
            ]
            exact_beta_c = np.array(by_run)
        return GridRates(alpha_c, beta_c, exact_beta_c)


def _support_losses(problem: MetaProblem) -> Callable[[Params], Tensor]:
    def run(theta: Params) -> Tensor:
        return over_tasks(problem, lambda support, query: problem.task_loss(theta, support), "same").mean()

    return lambda params: torch.func.vmap(run, randomness="same")(params)


def _limit_by_arnoldi(
    problem: MetaProblem,
    params: Params,
    scale: Tensor | None,
    run: int,
    alpha: Tensor,
    optimizer: MetaOptimizer,
    *,
    max_iter: int,
    tol: float,
) -> float:
    """Largest stable outer rate of one run whose Jacobian is not symmetric."""
    like = next(iter(params.values()))
    names = problem.inner_lr
    rates = dict.fromkeys(names, alpha) if isinstance(names, dict) else float(alpha)
    update = problem.inner_update if alpha > 0 else None  # which a rate of 0 would not let move
    field = meta_field(replace(problem, inner_lr=rates, inner_update=update), TaskMap(problem.task_chunk_size))
    jacobian = Jacobian(field, {name: value[run] for name, value in params.items()})
    # Its products are with the transpose, so the scaling comes from the right; the eigenvalues are the same.
    matvec: Matvec = jacobian if scale is None else lambda vector: jacobian(scale[run] * vector)
    responses = (optimizer.response,)

    def resolved(hessenberg: np.ndarray, residual: float) -> bool:
        return arnoldi_resolved(
            hessenberg, residual, responses, tol=tol, needs_finite_limit=False, size=jacobian.layout.size
        )

    start = start_vector((jacobian.layout.size,), like)
    try:
        found = arnoldi(matvec, start, max_iter=max_iter, stop=resolved)
    except NonFiniteProductError:  # what nan stands for in the result
        return math.nan
    return complex_limit(complex_ritz(found.hessenberg, found.residual), responses, tol=tol).rate


def _finite_rows(matvec: Matvec) -> tuple[Matvec, list[Tensor]]:
    """Replace products that are not finite by 0; the list then holds which runs those were, shape ``(runs,)``."""
    failed: list[Tensor] = []

    def product(vector: Tensor) -> Tensor:
        found = matvec(vector)
        # A product whose own square overflows is as good as infinite: Lanczos takes its norm.
        largest = torch.finfo(found.dtype).max ** 0.5 / found.shape[-1]
        bad = ~(found.abs().amax(-1) < largest)
        failed[:] = [failed[0] | bad] if failed else [bad]
        return torch.where(failed[0].unsqueeze(-1), torch.zeros_like(found), found)

    return product, failed


def _divided(limit: float, curvature: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(np.isnan(curvature), math.nan, limit / np.maximum(curvature, 0.0))
