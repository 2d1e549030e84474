"""Krylov runs as a measurement makes them: how far they go, and when they stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.linalg.arnoldi import ArnoldiRun, arnoldi
from lightning_maml_guard.linalg.krylov_basis import Basis
from lightning_maml_guard.linalg.lanczos import LanczosRun, Matvec, Tridiagonal, Watched, lanczos
from lightning_maml_guard.linalg.layout import WHOLE, Space
from lightning_maml_guard.optim.linearized_step import LinearizedStep
from lightning_maml_guard.theory.complex_ritz import arnoldi_resolved
from lightning_maml_guard.theory.multiplier import Interval
from lightning_maml_guard.theory.ritz import highest_allowed, lanczos_resolved, rates_from_lanczos, ritz_values

# A float product carries rounding of this many units in the last place, relative to the spectral radius.
_ROUNDING_ULPS = 16
# Products that disagree by more than this share of the spectral radius are not those of one matrix.
_ALLOWED_ASYMMETRY = 1e-2
# A run that judges a rate may end before ``tol`` is met if ``tol`` is at least this coarse.
_COARSE_TOL = 1e-2
# It ends once the rate is certainly this many times below its limit, or above it; or once it is certainly on one side,
# and the top eigenvalue is known to this factor and relative residual.
_FAR, _DECIDED_WITHIN, _DECIDED_RESIDUAL = 2.0, 1.1, 1e-2
# The same where the rate is far from its limit. The residual keeps the value itself, which is reported, to about 1 %.
_FAR_WITHIN, _FAR_RESIDUAL = 1.5, 2e-2


@dataclass(frozen=True)
class Krylov:
    """How far a Krylov run goes, and where its vectors are kept.

    Attributes:
        max_iter: Products at most.
        tol: Relative residual at which to stop.
        basis: ``"device"``, ``"cpu"`` or ``"bfloat16"``, see :class:`~lightning_maml_guard.linalg.krylov_basis.Basis`.
    """

    max_iter: int = 20
    tol: float = 1e-2
    basis: str = "device"


@dataclass(frozen=True)
class RateToJudge:
    """The rate that a run's top eigenvalue is to judge: the run may end once that is certain.

    Attributes:
        rate: The configured rate over the share of its limit that is allowed; ``nan`` if there is none to judge.
        limits: From a curvature to the rate's limit, and the smallest and the largest that it may be.
        within: The factor to which the top eigenvalue has to be known where the rate is far below its limit.
        residual: Its relative residual there.
        rounding: Relative rounding error of a product.
    """

    rate: float
    limits: Callable[[float], tuple[float, float, float]]
    within: float = _FAR_WITHIN
    residual: float = _FAR_RESIDUAL
    rounding: float = 0.0

    def settled(self, run: Tridiagonal, size: int) -> bool:
        """Return True if it is certain whether the rate is below its limit, and the limit is known well enough."""
        values, residuals = ritz_values(*run)
        top = float(values[-1])
        # None of the cases below holds with a larger residual: what the start may have missed need not be asked for.
        most = max(self.residual, _FAR_RESIDUAL, _DECIDED_RESIDUAL) * top
        if math.isnan(self.rate) or top <= 0 or top + residuals[-1] > self.within * top or residuals[-1] > most:
            return False
        high = highest_allowed(*run, size, rounding=self.rounding)
        least, largest = self.limits(high)[1], self.limits(top)[2]
        if least > _FAR * self.rate and high <= self.within * top and residuals[-1] <= self.residual * top:
            return True
        if self.rate > _FAR * largest and high <= _FAR_WITHIN * top and residuals[-1] <= _FAR_RESIDUAL * top:
            return True
        known = high <= _DECIDED_WITHIN * top and residuals[-1] <= _DECIDED_RESIDUAL * top
        return known and (self.rate < least or self.rate > largest)


def top_eigenvalue(
    matvec: Matvec, size: int, like: Tensor, blocks: int | None, *, krylov: Krylov, space: Space = WHOLE
) -> tuple[float, Interval]:
    """Find the largest eigenvalue of a symmetric operator, over all of its blocks, and its interval."""
    run = run_lanczos(matvec, size, like, blocks, krylov=krylov, space=space)
    error = rounding(like) + run.rounding
    tops = [rates_from_lanczos(*each, 0.0, rounding=error, resolution=krylov.tol, size=size) for each in run.runs]
    top = max(tops, key=lambda each: each.lambda_max)
    return top.lambda_max, top.lambda_max_interval


def run_lanczos(
    matvec: Matvec,
    size: int,
    like: Tensor,
    blocks: int | None,
    *,
    krylov: Krylov,
    alpha: float = 0.0,
    value: Watched | None = None,
    rate_to_judge: RateToJudge | None = None,
    space: Space = WHOLE,
    after: Callable[[Basis], None] | None = None,
) -> LanczosRun:
    """Run Lanczos until the top (and, for ``alpha > 0``, ``beta_c``) is known to a relative residual.

    If there is a rate to judge, and ``tol`` asks for no more, until the verdict is certain.
    """
    start = space.start((size,) if blocks is None else (blocks, size), like)
    # A small space is exhausted soon, and the bound on hidden eigenvalues needs an orthonormal basis.
    if krylov.tol < _COARSE_TOL or size <= krylov.max_iter or krylov.basis == "bfloat16":
        rate_to_judge = None

    def resolved(runs: Sequence[Tridiagonal]) -> bool:
        known = partial(lanczos_resolved, alpha=alpha, tol=krylov.tol, size=size)
        return all((rate_to_judge is not None and rate_to_judge.settled(run, size)) or known(*run) for run in runs)

    given: dict[str, Any] = {"basis": krylov.basis, "value": value, "space": space, "after": after}
    return lanczos(matvec, start, max_iter=krylov.max_iter, stop=resolved, **given)


class ChangingOperatorError(ArithmeticError):
    """Products that belong to no one symmetric matrix: nothing follows from them."""


def check_symmetry(run: LanczosRun, noise: float, *, differences: bool) -> None:
    """Raise a ChangingOperatorError if a run's products, maybe finite differences, are not of one symmetric matrix."""
    allowed = max(_ALLOWED_ASYMMETRY, 50 * noise)
    if run.asymmetry > allowed:
        why = (
            "Likely causes: (a) the loss changes between products, as with random numbers that do not come from "
            "torch's generator; (b) a layer's second derivative is wrong. Make the loss a function of its arguments, "
            "or freeze that layer's parameters."
        )
        if differences:
            why = (
                "They are finite differences of gradients. Where the loss holds values detached from the parameters "
                "(first-order MAML, a policy gradient), these belong to no function; kinks (ReLU, max-pool, a distance "
                "of 0) and random numbers of the loss's own make them coarse. No critical rate follows from them."
            )
        raise ChangingOperatorError(
            f"The curvature products do not belong to one symmetric matrix (they disagree by {run.asymmetry:.1e} of "
            f"the largest eigenvalue; up to {allowed:.0e} is rounding). {why}"
        )


def run_arnoldi(
    matvec: Matvec,
    size: int,
    like: Tensor,
    step: LinearizedStep,
    *,
    krylov: Krylov,
    noise: float,
    value: Watched | None = None,
    space: Space = WHOLE,
) -> ArnoldiRun:
    """Run Arnoldi until the outer rate's limit is known to a relative accuracy."""

    def resolved(hessenberg: np.ndarray, residual: float) -> bool:
        settled = step.responses[:1]
        return arnoldi_resolved(
            hessenberg, residual, settled, tol=krylov.tol, rounding=noise, decay=step.decoupled, size=size
        )

    start = space.start((size,), like)
    return arnoldi(matvec, start, max_iter=krylov.max_iter, stop=resolved, basis=krylov.basis, value=value, space=space)


def rounding(like: Tensor) -> float:
    """Estimate the rounding error of a product, relative to the spectral radius."""
    return _ROUNDING_ULPS * torch.finfo(like.dtype).eps
