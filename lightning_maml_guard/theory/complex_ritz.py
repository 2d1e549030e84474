"""Critical outer rates where the Jacobian of the update is not symmetric: complex Ritz values.

First-order and simplified MAML over many tasks follow the gradient of no loss, so ``J`` has complex eigenvalues ``mu``;
the update ``theta - beta*G`` contracts iff ``beta < 2 Re(mu)/|mu|^2`` for all of them.
"""

from __future__ import annotations

import cmath
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_maml_guard.theory.inclusion import hidden_radii, inclusion_level, outermost
from lightning_maml_guard.theory.linear_response import Response
from lightning_maml_guard.theory.multiplier import Interval
from lightning_maml_guard.theory.ritz import STOP_FRACTION

# Directions in which eigenvalues that were not found are looked for: pairs close to the imaginary axis bind first.
_ANGLES = np.radians([*range(0, 88, 2), 88, 89, 89.5, 89.8, 89.95, 90])
# Largest imaginary part of an eigenvalue that was not found, in units of the skewness of what is beside the found ones
# in the projection. That is a sample: the skewness of all that is beside them bounds it (Bendixson). In 328 runs on
# problems of benchmarks.coverage it was at most 1.2 after ten steps. Fewer directions than `_SAMPLE` tell nothing.
_SKEWNESS, _SAMPLE = 1.5, 3


@dataclass(frozen=True)
class ComplexRitz:
    """Ritz values of an Arnoldi run.

    Attributes:
        values: In descending order of their modulus, shape ``(m,)``.
        bounds: Largest distance of the eigenvalue from each, to first order: the residual times the condition number
            ``|x| |y| / |y.x|`` of its right and left eigenvectors (Saad, section 3.3), shape ``(m,)``.
        vectors: Right eigenvectors of the projection, in columns, shape ``(m, m)``.
        projection: ``V^T A V``, shape ``(m, m)``.
        level: Where the eigenvalues that were not found may lie; see ``theory.inclusion``.
    """

    values: np.ndarray
    bounds: np.ndarray
    vectors: np.ndarray
    projection: np.ndarray
    level: float

    @property
    def radius(self) -> float:
        """Largest modulus."""
        return float(abs(self.values[0]))

    def skewness_beside(self, known: np.ndarray) -> float:
        """Norm of the skew-symmetric part of the projection without the space of some of the Ritz vectors."""
        vectors = self.vectors[:, known]
        basis, sizes, _ = np.linalg.svd(np.concatenate([vectors.real, vectors.imag], axis=1))
        beside = basis[:, int((sizes > 1e-9).sum()) :]
        if beside.shape[1] < _SAMPLE:
            return math.inf
        rest = beside.T @ self.projection @ beside
        return float(np.linalg.norm((rest - rest.T) / 2, 2))


def complex_ritz(
    hessenberg: np.ndarray, residual: float, rounding: float = 0.0, spill: float = 0.0, size: int | None = None
) -> ComplexRitz:
    """Compute the Ritz values of ``V^T A V`` and their bounds.

    ``residual`` is the norm of what the last matrix-vector product left outside the space, ``rounding`` the relative
    rounding error of a product, ``spill`` what rounding the basis adds to every residual, ``size`` that of ``A`` (None:
    of the space).
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
    norms = np.append(np.diagonal(matrix, -1), residual)
    level = inclusion_level(norms + noise, size or len(values)) if residual > 0 else -math.inf
    return ComplexRitz(values, bounds, right, matrix, level)


@dataclass(frozen=True)
class ComplexLimit:
    """Largest stable rate, its interval, and the index of the Ritz value that binds; without one ``inf`` and None."""

    rate: float
    interval: Interval
    index: int | None


def complex_limit(ritz: ComplexRitz, responses: Sequence[Response], *, tol: float, decay: float = 0.0) -> ComplexLimit:
    """Compute the largest stable outer rate, ``min_mu 2 Re(mu)/|mu|^2`` for SGD.

    Ritz values that are not known to ``tol`` times the spectral radius, or are smaller than that, are ignored. So are
    those with ``Re(mu) <= 0``, which are unstable at every rate. ``responses`` are the optimizer's linear responses,
    the final one first; the limit lies between theirs. The interval is ``(0, inf)`` until the eigenvalue largest in
    modulus is known. Its lower end holds for what the run has not found, too: as in a Lanczos run each eigenvalue may
    have a larger one within ``tol`` beside it, and others lie where ``theory.inclusion`` says. It is 0 while that
    leaves room for a pair close to the imaginary axis, which next to no rate suits.
    """
    limit = _visible_limit(ritz, responses, tol, decay)
    low, high = limit.interval
    return replace(limit, interval=(min(low, _hidden_limit(ritz, responses, tol, decay)), high))


def _visible_limit(ritz: ComplexRitz, responses: Sequence[Response], tol: float, decay: float) -> ComplexLimit:
    """The limit, and its interval, by the eigenvalues that the run has found."""
    floor = tol * ritz.radius
    usable = [
        index
        for index, (value, bound) in enumerate(zip(ritz.values, ritz.bounds, strict=True))
        if bound <= floor < abs(value)
    ]
    known = [index for index in usable if ritz.values[index].real > 0]
    rates = {index: responses[0].largest_rate(complex(ritz.values[index]), decay) for index in known}
    leading_known = bool(ritz.bounds[0] <= floor)
    if not rates:
        return ComplexLimit(math.inf, (math.inf if leading_known else 0.0, math.inf), None)
    index = min(rates, key=lambda each: rates[each])
    widening = 1 + (tol if ritz.level > -math.inf else 0.0)
    radii = hidden_radii(ritz.values, ritz.level)
    # Larger islands are seen by the directions that `_hidden_limit` tries.
    reach = np.where(radii <= floor, np.maximum(radii, ritz.bounds), ritz.bounds)
    low = min(_lower_end(ritz, each, float(reach[each]), responses, decay, widening) for each in usable)
    high = min(_upper_end(ritz, each, responses, decay, floor) for each in known)
    return ComplexLimit(rates[index], (low if leading_known else 0.0, high), index)


def _hidden_limit(ritz: ComplexRitz, responses: Sequence[Response], tol: float, decay: float) -> float:
    """Smallest limit of the eigenvalues that the run may not have found."""
    floor = tol * ritz.radius
    if ritz.level == -math.inf:
        return math.inf
    own = np.abs(np.angle(ritz.values[ritz.values.real > 0]))
    angles = np.unique(np.concatenate([_ANGLES, own]))
    farthest = outermost(ritz.values, ritz.level, angles, floor)
    upright = float(farthest[-1])
    if upright > 0:
        # What is not known is as skew as the part of the projection that is not: a sample of it.
        far = (ritz.bounds <= floor) & (np.abs(ritz.values) > 2 * upright)
        skewness = _SKEWNESS * ritz.skewness_beside(far)
        farthest = np.where(farthest * np.sin(angles) > skewness, skewness / np.maximum(np.sin(angles), 1e-6), farthest)
    reached = farthest >= floor
    found = zip(farthest[reached].tolist(), angles[reached].tolist(), strict=True)
    return min((_smallest(responses, *each, decay) for each in found), default=math.inf)


def _turn(ritz: ComplexRitz, index: int, reach: float) -> float:
    """Largest angle between a Ritz value and its eigenvalue."""
    value = complex(ritz.values[index])
    others = np.abs(np.delete(ritz.values, index) - value)
    # A simple real eigenvalue of a real matrix stays real under a small perturbation.
    if value.imag == 0 and not (others <= 2 * reach).any():
        return 0.0
    return math.asin(min(reach / abs(value), 1.0))


def _lower_end(
    ritz: ComplexRitz, index: int, reach: float, responses: Sequence[Response], decay: float, widening: float
) -> float:
    """Smallest limit of the eigenvalues within a distance of a Ritz value; ``inf`` if their real parts are negative."""
    value = complex(ritz.values[index])
    angle, turn = abs(cmath.phase(value)), _turn(ritz, index, reach)
    if angle - turn >= math.pi / 2:
        return math.inf
    if angle + turn >= math.pi / 2:
        return 0.0
    return _smallest(responses, (abs(value) + reach) * widening, angle + turn, decay)


def _upper_end(ritz: ComplexRitz, index: int, responses: Sequence[Response], decay: float, floor: float) -> float:
    """Largest limit over the disc in which the eigenvalue lies; ``inf`` if it may be one that limits no rate."""
    value, bound = complex(ritz.values[index]), float(ritz.bounds[index])
    modulus, angle, turn = abs(value), abs(cmath.phase(value)), _turn(ritz, index, bound)
    if modulus - bound < floor or angle + turn >= math.pi / 2:
        return math.inf
    gentle = cmath.rect(modulus - bound, max(angle - turn, 0.0))
    return max(each.largest_rate(gentle, decay) for each in responses)


def _smallest(responses: Sequence[Response], modulus: float, angle: float, decay: float) -> float:
    """Smallest limit over the responses of an eigenvalue in polar coordinates."""
    if math.cos(angle) <= 1e-12:
        return 0.0
    if decay > 0:
        return min(each.largest_rate(cmath.rect(modulus, angle), decay) for each in responses)
    # Without decay the limit is inverse to the modulus.
    return min(_at_unit(each, angle) for each in responses) / modulus


@functools.lru_cache(maxsize=4096)
def _at_unit(response: Response, angle: float) -> float:
    return response.largest_rate(cmath.rect(1.0, angle))


def arnoldi_resolved(
    hessenberg: np.ndarray,
    residual: float,
    responses: Sequence[Response],
    *,
    tol: float,
    rounding: float = 0.0,
    decay: float = 0.0,
    needs_finite_limit: bool = True,
    size: int | None = None,
) -> bool:
    """Return True if an Arnoldi run knows its leading eigenvalue and the largest stable rate to ``tol``."""
    ritz = complex_ritz(hessenberg, residual, rounding, size=size)
    if ritz.bounds[0] > tol * STOP_FRACTION * ritz.radius:
        return False
    low, high = _visible_limit(ritz, responses, tol, decay).interval
    if high < math.inf and high - low > 4 * tol * high:
        return False
    low = min(low, _hidden_limit(ritz, responses, tol, decay))
    if high == math.inf:
        return not needs_finite_limit
    return high - low <= 4 * tol * high
