"""The outer rate's limit ``beta_c`` for the optimizer as it runs: simplified criterion, and exact Jacobian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.linalg.krylov_basis import Basis
from lightning_maml_guard.linalg.lanczos import Matvec, Watched
from lightning_maml_guard.linalg.layout import Layout, Params
from lightning_maml_guard.linalg.operators import FiniteDifference, Jacobian, Operator, scaled, simplified
from lightning_maml_guard.optim.linearized_step import LinearizedStep
from lightning_maml_guard.stability.estimators import Spectrum
from lightning_maml_guard.stability.hvp import HESSIAN, Operators
from lightning_maml_guard.stability.krylov_stopping import (
    Krylov,
    RateToJudge,
    check_symmetry,
    run_arnoldi,
    run_lanczos,
    top_eigenvalue,
)
from lightning_maml_guard.stability.objective import MamlObjective
from lightning_maml_guard.theory.complex_ritz import complex_limit, complex_ritz
from lightning_maml_guard.theory.critical_rates import CriticalRates
from lightning_maml_guard.theory.multiplier import Interval
from lightning_maml_guard.theory.ritz import rates_from_lanczos, ritz_pairs, ritz_values


@dataclass(frozen=True)
class MetaRateLimit:
    """Largest stable outer rate.

    Attributes:
        beta_c: The rate; ``nan`` when no statement can be made, ``inf`` when there is no finite limit.
        interval: Where it lies.
        direction: Unit vector along which it binds, in the scaled coordinates, on the device.
        lowest_direction: Unit vector of the smallest real part, where that is below 0 by more than the residuals
            explain.
        by_task: Curvature of each task of this process along ``direction``, where the run has told them apart.
    """

    beta_c: float
    interval: Interval
    direction: Tensor | None = None
    lowest_direction: Tensor | None = None
    by_task: Tensor | None = None


@dataclass(frozen=True)
class MetaRateLimits:
    """``beta_c`` at the configured inner rate and at the safe one, and the safe inner rate."""

    configured: MetaRateLimit
    at_safe_alpha: float
    safe_alpha: float


# The factor to which the limit has to be known if the rate is far below it: larger than the inner rate's, because a
# product with the update's Jacobian costs as much as five with the Hessian.
_KNOWN_WITHIN = 4.0

UNKNOWN = MetaRateLimit(math.nan, (math.nan, math.nan))


def simplified_limit(
    hessian: Operator,
    spectrum: Spectrum,
    step: LinearizedStep,
    like: Tensor,
    *,
    alpha: float,
    rates: Params | None,
    inner_steps: int,
    collapsed: bool,
    blocks: int | None,
    krylov: Krylov,
) -> MetaRateLimit:
    """Compute ``beta_c`` of the simplified update: stable iff ``beta * lambda_max(D (H - HAH + W)) < c``.

    With plain SGD and one inner rate the spectrum of ``H`` already answers; otherwise a second Lanczos run on the
    scaled operator does. ``collapsed``: the inner rate exceeds its own limit, so that no outer rate is stable.
    """
    if step.note:
        return UNKNOWN
    known: CriticalRates = spectrum.rates(alpha, inner_steps)
    if step.scale is None and rates is None and isinstance(step.coupled, float):
        if collapsed:
            return MetaRateLimit(0.0, known.beta_c_interval)
        low, high = known.curvature_interval
        low_end = 0.0 if known.beta_c_interval[0] == 0 else step.rates(high + step.coupled)[1]
        critical = step.rates(known.curvature + step.coupled)[0]
        return MetaRateLimit(critical, (low_end, step.rates(low + step.coupled)[2]))
    if collapsed:
        return MetaRateLimit(0.0, (0.0, 0.0))
    layout = hessian.layout
    flat_rates: Tensor | float = inner_steps * (alpha if rates is None else layout.flatten(rates).to(like))
    operator = _as_stepped(simplified(hessian, flat_rates), step, layout, like)
    top = top_eigenvalue(operator, layout.rows, like, blocks, krylov=krylov, space=layout.space)
    return _from_top(*top, step)


def exact_limit(
    jacobian: Operator,
    symmetric: bool,
    step: LinearizedStep,
    like: Tensor,
    *,
    krylov: Krylov,
    noise: float,
    value: Watched,
    rate: float = math.nan,
    by_task: bool = False,
) -> MetaRateLimit:
    """Compute ``beta_c`` of the update as configured, from the Jacobian ``J`` of its meta-gradient.

    Lanczos where ``J`` is symmetric, else Arnoldi. The limit is ``inf`` where no direction has positive curvature.
    Unless ``tol`` asks for more, a Lanczos run ends once it is certain on which side of its limit the ``rate`` is.
    ``by_task``: find each task's curvature along the direction that binds, too, if that costs nothing.
    """
    layout = jacobian.layout
    if not symmetric:
        operator = _as_stepped(jacobian, step, layout, like)
        return _nonsymmetric(operator, layout, step, like, krylov, noise, value)
    by_task_products = None
    if by_task and isinstance(jacobian, Jacobian) and jacobian.tells_tasks_apart:
        by_task_products = _TaskProducts(
            jacobian, 1.0 if step.scale is None else layout.flatten(step.scale).to(like).sqrt()
        )
    operator = _as_stepped(by_task_products or jacobian, step, layout, like)
    rate_to_judge = RateToJudge(rate, step.rates, _KNOWN_WITHIN, math.inf, noise)
    after = None if by_task_products is None else by_task_products.project
    given: dict[str, Any] = {"value": value, "space": layout.space, "rate_to_judge": rate_to_judge, "after": after}
    run = run_lanczos(operator, layout.rows, like, None, krylov=krylov, **given)
    check_symmetry(run, noise, differences=isinstance(jacobian, FiniteDifference))
    (single,) = run.runs
    error = noise + run.rounding
    top = rates_from_lanczos(*single, 0.0, rounding=error, resolution=krylov.tol, size=layout.rows)
    limit = _from_top(top.lambda_max, top.lambda_max_interval, step)
    (values, residuals), vectors = ritz_values(*single), ritz_pairs(*single)[1]
    negative = values[0] + residuals[0] < -(krylov.tol + run.rounding) * abs(values).max()
    return MetaRateLimit(
        limit.beta_c,
        limit.interval,
        _combine(run.basis, vectors[:, -1], layout),
        _combine(run.basis, vectors[:, 0], layout) if negative else None,
        None if by_task_products is None else by_task_products.along(vectors[:, -1]),
    )


class _TaskProducts:
    """Multiplies with the Jacobian, and keeps each task's Jacobian ``J_t`` projected on the Krylov space.

    Attributes:
        jacobian: The mean of the tasks' Jacobians, each of them symmetric.
        root: ``D^(1/2)``, by which the operator is scaled on both sides.
    """

    def __init__(self, jacobian: Jacobian, root: Tensor | float) -> None:
        self.jacobian, self.root = jacobian, root
        self._rows: Tensor | None = None
        self._projected: list[Tensor] = []

    def __call__(self, vector: Tensor) -> Tensor:
        product, self._rows = self.jacobian.by_task(vector)
        return product

    def project(self, basis: Basis) -> None:
        """Keep ``V^T J_t v`` of the last vector ``v`` of a basis ``V``, shape ``(tasks, m)``."""
        assert self._rows is not None
        self._rows *= self.root
        self._projected.append(basis.products(self._rows))
        self._rows = None

    def along(self, weights: np.ndarray) -> Tensor:
        """Return ``y . J_t y`` by task, for ``y`` the sum of the basis vectors with these weights."""
        each = torch.as_tensor(weights).to(self._projected[0])
        # Only the upper triangle is kept: the projected Jacobians are symmetric.
        found = [
            each[last] * (2 * (row[:, :last] @ each[:last]) + row[:, last] * each[last])
            for last, row in enumerate(self._projected[: len(each)])
        ]
        return torch.stack(found).sum(0)


def _nonsymmetric(
    operator: Matvec, layout: Layout, step: LinearizedStep, like: Tensor, krylov: Krylov, noise: float, value: Watched
) -> MetaRateLimit:
    size, space = layout.rows, layout.space
    run = run_arnoldi(operator, size, like, step, krylov=krylov, noise=noise, value=value, space=space)
    ritz = complex_ritz(run.hessenberg, run.residual, noise, run.spill, size)
    limit = complex_limit(ritz, step.responses, tol=krylov.tol, decay=step.decoupled)
    lowest = int(ritz.values.real.argmin())
    negative = ritz.values[lowest].real + ritz.bounds[lowest] < -krylov.tol * ritz.radius
    return MetaRateLimit(
        limit.rate,
        limit.interval,
        None if limit.index is None else _combine(run.basis, ritz.vectors[:, limit.index].real, layout),
        _combine(run.basis, ritz.vectors[:, lowest].real, layout) if negative else None,
    )


def _as_stepped(matvec: Matvec, step: LinearizedStep, layout: Layout, like: Tensor) -> Matvec:
    """Scale an operator by the optimizer's preconditioner and weight decay."""
    if step.scale is None and step.coupled == 0.0:
        return matvec
    scale = like.new_ones(layout.size) if step.scale is None else layout.flatten(step.scale).to(like)
    shift: Tensor | float = step.coupled if isinstance(step.coupled, float) else layout.flatten(step.coupled).to(like)
    return scaled(matvec, scale, shift)


def _from_top(top: float, interval: Interval, step: LinearizedStep) -> MetaRateLimit:
    low, high = interval
    return MetaRateLimit(step.rates(top)[0], (step.rates(high)[1], step.rates(low)[2]))


def _combine(basis: Basis, weights: np.ndarray, layout: Layout) -> Tensor:
    vector = basis.combine(torch.as_tensor(np.ascontiguousarray(weights)))
    return vector / layout.space.norm(vector)


def is_inner_rate_at_fault(maml: MamlObjective, operators: Operators, step: LinearizedStep, direction: Tensor) -> bool:
    """Return True if a negative direction of the update comes from an inner rate beyond some task's limit.

    A direction along which the task losses themselves curve down is a saddle, and no rate's fault.
    """
    if maml.symmetric or maml.alpha == 0:
        return False
    direction = step.unscaled(direction)
    direction = direction / maml.space.norm(direction)
    operator, _ = operators.build(HESSIAN, maml.curvature(True))
    rows = direction.expand(maml.tasks, -1)
    curvatures = torch.cat(operators.ranks.gather(maml.space.total((rows * operator(rows)).sum(-1)).cpu()))
    operator.release()
    beyond = curvatures * maml.alpha > maml.inner_limit
    return bool(beyond.any()) and bool(curvatures.mean() > 0)


def mean_square_limit(
    along: Tensor,
    operators: Operators,
    step: LinearizedStep,
    direction: Tensor,
    tasks: int,
    change: Tensor | None,
) -> tuple[float, float]:
    """Find the limit for tasks drawn anew at every step, from their curvatures ``along`` the direction that binds.

    Returns the predicted change of the coming step, brought to the host in the same transfer, and the limit; ``tasks``
    counts those of all ranks.
    """
    # One transfer to the host for all of it.
    single = [
        direction.new_tensor(math.nan) if change is None else change,
        operators.objective.space.total(step.shift_along(direction)),
    ]
    predicted, shift, *own = torch.cat([torch.stack(single).double(), along.double()]).cpu().tolist()
    parts = operators.ranks.gather(own)
    each = torch.tensor([value for part in parts for value in part], dtype=torch.float64)
    if not bool(torch.isfinite(each).all()):
        return predicted, math.nan
    # The batch's curvature is the mean over its tasks, so its variance is a task's over their number.
    mean, variance = float(each.mean()) + shift, float(each.var()) / tasks
    return predicted, step.responses[0].mean_square_rate(mean, variance)
