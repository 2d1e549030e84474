"""Critical meta rates where the Jacobian of the update is not symmetric: complex Ritz values.

First-order and simplified MAML over many tasks follow the gradient of no loss, so ``J`` has complex eigenvalues ``mu``;
the update ``theta - beta*G`` contracts iff ``beta < 2 Re(mu)/|mu|^2`` for all of them.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_maml_guard.theory.linear_response import Response
from lightning_maml_guard.theory.multiplier import Interval


@dataclass(frozen=True)
class ComplexRitz:
    """Ritz values of an Arnoldi run.

    Attributes:
        values: In descending order of their modulus, shape ``(m,)``.
        bounds: Largest distance of the eigenvalue from each, to first order: the residual times the condition number
            ``|x| |y| / |y.x|`` of its right and left eigenvectors (Saad, section 3.3), shape ``(m,)``.
        vectors: Right eigenvectors of the projection, in columns, shape ``(m, m)``.
    """

    values: np.ndarray
    bounds: np.ndarray
    vectors: np.ndarray

    @property
    def radius(self) -> float:
        """Largest modulus."""
        return float(abs(self.values[0]))


def complex_ritz(hessenberg: np.ndarray, residual: float, rounding: float = 0.0, spill: float = 0.0) -> ComplexRitz:
    """Compute the Ritz values of ``V^T A V`` and their bounds.

    ``residual`` is the norm of what the last matrix-vector product left outside the space, ``rounding`` the relative
    rounding error of a product, ``spill`` what rounding the basis adds to every residual.
    """
    matrix = np.asarray(hessenberg, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"Expected argument `hessenberg` to be a square matrix but got shape {matrix.shape}.")
    if not np.isfinite(matrix).all() or not math.isfinite(residual):
        raise ValueError("Expected a finite Arnoldi run but it holds nan or inf: the curvature was not measured.")
    values, right = np.linalg.eig(matrix)
    order = np.argsort(-np.abs(values))
    values, right = values[order], right[:, order]
    # Rows of the inverse are the left eigenvectors, scaled to y.x = 1. A defective projection has none: no bound.
    condition = (
        np.linalg.norm(np.linalg.inv(right), axis=1)
        if np.linalg.cond(right) < 1 / np.finfo(np.float64).eps
        else np.full(len(values), np.inf)
    )
    noise = rounding * float(np.abs(values).max()) + spill
    distances = residual * np.abs(right[-1]) + noise
    with np.errstate(invalid="ignore"):
        bounds = np.where(distances > 0, condition * distances, 0.0)
    return ComplexRitz(values, bounds, right)


@dataclass(frozen=True)
class ComplexLimit:
    """Largest stable rate, its interval, and the index of the Ritz value that binds; without one ``inf`` and None."""

    rate: float
    interval: Interval
    index: int | None


def complex_limit(ritz: ComplexRitz, responses: Sequence[Response], *, tol: float, decay: float = 0.0) -> ComplexLimit:
    """Compute the largest stable meta rate, ``min_mu 2 Re(mu)/|mu|^2`` for SGD.

    Ritz values that are not known to ``tol`` times the spectral radius, or are smaller than that, are ignored. So are
    those with ``Re(mu) <= 0``, which are unstable at every rate. ``responses`` are the optimizer's linear responses,
    the final one first; the limit lies between theirs. The interval is ``(0, inf)`` until the eigenvalue largest in
    modulus is known.
    """
    floor = tol * ritz.radius
    known = [
        index
        for index, (value, bound) in enumerate(zip(ritz.values, ritz.bounds, strict=True))
        if bound <= floor < abs(value) and value.real > 0
    ]
    rates = {index: responses[0].largest_rate(complex(ritz.values[index]), decay) for index in known}
    if not rates:
        resolved = bool(ritz.bounds[0] <= floor)
        return ComplexLimit(math.inf, (math.inf if resolved else 0.0, math.inf), None)
    index = min(rates, key=lambda each: rates[each])
    ends = [_ends(ritz, each, responses, decay) for each in known]
    low, high = min(end[0] for end in ends), min(end[1] for end in ends)
    leading_known = bool(ritz.bounds[0] <= floor)
    return ComplexLimit(rates[index], (low if leading_known else 0.0, high), index)


def _ends(ritz: ComplexRitz, index: int, responses: Sequence[Response], decay: float) -> Interval:
    """Smallest and largest limit over the disc in which the eigenvalue lies."""
    value, bound = complex(ritz.values[index]), float(ritz.bounds[index])
    modulus, angle = abs(value), abs(cmath.phase(value))
    if bound >= modulus:
        return 0.0, math.inf
    others = np.abs(np.delete(ritz.values, index) - value)
    # A simple real eigenvalue of a real matrix stays real under a small perturbation.
    turn = 0.0 if value.imag == 0 and not (others <= 2 * bound).any() else math.asin(bound / modulus)
    if angle + turn >= math.pi / 2:
        low = 0.0
    else:
        low = min(each.largest_rate(cmath.rect(modulus + bound, angle + turn), decay) for each in responses)
    gentle = cmath.rect(modulus - bound, max(angle - turn, 0.0))
    return low, max(each.largest_rate(gentle, decay) for each in responses)


def arnoldi_resolved(
    hessenberg: np.ndarray,
    residual: float,
    responses: Sequence[Response],
    *,
    tol: float,
    rounding: float = 0.0,
    decay: float = 0.0,
    needs_finite_limit: bool = True,
) -> bool:
    """Return True if an Arnoldi run knows its leading eigenvalue and the largest stable rate to ``tol``."""
    ritz = complex_ritz(hessenberg, residual, rounding)
    if ritz.bounds[0] > tol * ritz.radius:
        return False
    low, high = complex_limit(ritz, responses, tol=tol, decay=decay).interval
    if high == math.inf:
        return not needs_finite_limit
    return high - low <= 4 * tol * high
