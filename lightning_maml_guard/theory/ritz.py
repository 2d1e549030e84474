"""Critical rates from what Krylov methods know of a spectrum: its Ritz values, or its largest eigenvalue alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lightning_maml_guard.theory.critical_rates import CriticalRates, assemble, critical_rates
from lightning_maml_guard.theory.inclusion import (
    RARE,
    distance_to_hidden,
    inclusion_level,
    largest_hidden,
)
from lightning_maml_guard.theory.multiplier import check_order, check_rate, multiplier

# A run stops at this fraction of the residual asked for: at the residual itself it may still sit on an eigenvalue below
# the top. With 1/16, none of 1000 random spectra misses its interval.
STOP_FRACTION = 1 / 16


def ritz_values(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Compute a Lanczos run's Ritz values, ascending, and their residual bounds ``b * |last entry of the vector|``.

    ``off_diagonal`` holds the norms after each step: the off-diagonal entries of ``T``, then the last residual ``b``.
    """
    values, vectors = ritz_pairs(diagonal, off_diagonal)
    return values, abs(float(off_diagonal[-1])) * np.abs(vectors[-1])


def highest_allowed(
    diagonal: Sequence[float], off_diagonal: Sequence[float], size: int, *, rounding: float = 0.0
) -> float:
    """Return the largest eigenvalue that a Lanczos run from a random start allows, whatever it has resolved."""
    values, residuals = ritz_values(diagonal, off_diagonal)
    noise = rounding * float(np.abs(values).max() + off_diagonal[-1])
    hidden = largest_hidden(values, inclusion_level(np.asarray(off_diagonal) + noise, size, RARE))
    return max(hidden, float(values[-1] + residuals[-1])) + noise


def ritz_pairs(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the Ritz values, ascending, and in columns their vectors in the coordinates of the Lanczos basis."""
    return _pairs(tuple(diagonal), tuple(off_diagonal))


@lru_cache(maxsize=4)  # whether a run may end takes several looks at the same one
def _pairs(diagonal: tuple[float, ...], off_diagonal: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(_tridiagonal(diagonal, off_diagonal))
    return values, vectors


def lanczos_resolved(
    diagonal: Sequence[float],
    off_diagonal: Sequence[float],
    alpha: float,
    tol: float,
    *,
    needs_positive_top: bool = True,
    size: int | None = None,
) -> bool:
    """Return True if a Lanczos run knows its top eigenvalue, and ``beta_c`` for ``alpha > 0``, to ``tol``.

    With the ``size`` of ``H``, no eigenvalue above the top by more than ``tol`` may have escaped the start vector.
    """
    width, tol = tol, tol * STOP_FRACTION
    values, residuals = ritz_values(diagonal, off_diagonal)
    # The few directions seen so far cannot show that no direction curves upwards.
    if needs_positive_top and values[-1] <= 0:
        return False
    if residuals[-1] > tol * max(abs(values[0]), abs(values[-1])):
        return False
    if size is not None and highest_allowed(diagonal, off_diagonal, size) > values[-1] + width * np.abs(values).max():
        return False
    # Beyond alpha_c no outer rate is stable, however well the rest is known.
    if alpha * float(values[-1]) > 1 or alpha == 0:
        return True
    low, high = rates_from_lanczos(diagonal, off_diagonal, alpha).curvature_interval
    return high - low <= tol * max(high, abs(float(values[-1])) * tol)


def rates_from_lanczos(
    diagonal: Sequence[float],
    off_diagonal: Sequence[float],
    alpha: float,
    *,
    inner_steps: int = 1,
    rounding: float = 0.0,
    resolution: float = 0.0,
    size: int | None = None,
) -> CriticalRates:
    """Compute the critical rates of simplified MAML (Takagi et al.) from one Lanczos run on ``H``.

    With basis ``V``, tridiagonal ``T`` and last residual ``b``, exactly ``V^T (H - alpha*H^2) V = T - alpha*(T^2 + b^2
    e_m e_m^T)``. The largest eigenvalue of the right side is the Rayleigh-Ritz value of ``H - alpha*H^2``, without a
    further Hessian-vector product. With ``K = inner_steps``, ``alpha`` becomes ``K*alpha``.

    ``rounding`` is the relative rounding error of a product, added to every residual bound. ``resolution`` is the
    relative width in which a cluster may hide its true top: a residual says that *an* eigenvalue is near, not that none
    lies above. It widens the intervals of a run that has not exhausted its space. With ``size``, that of ``H``, the
    intervals also hold what the start vector may have missed (``theory.inclusion``).
    """
    check_rate(alpha)
    check_order("simplified", inner_steps)
    values, residuals = ritz_values(diagonal, off_diagonal)
    f = multiplier(alpha, "simplified", inner_steps)
    tridiagonal = _tridiagonal(diagonal, off_diagonal)
    last = float(off_diagonal[-1])
    radius = float(max(abs(values[0]), abs(values[-1])) + last)
    noise = rounding * radius
    hidden = resolution * float(max(abs(values[0]), abs(values[-1]))) if last > 0 else 0.0
    residual = max(float(residuals[-1]), hidden) + noise
    level = -math.inf
    if size is not None and last > 0:
        level = inclusion_level(np.asarray(off_diagonal) + noise, size, RARE)
        residual = max(residual, largest_hidden(values, level) + noise - float(values[-1]))
    spectrum: dict[str, Any] = {
        "lambda_max": float(values[-1]),
        "lambda_min": float(values[0]),
        "lambda_interval": (float(values[-1]) - noise, float(values[-1]) + residual),
        "negative": int((values < -residuals - noise).sum()),
    }
    projected = tridiagonal.copy()
    if f.rate > 0:
        # Where the square overflows, the rate is beyond alpha_c by far, and nothing else is known.
        reach = max(radius, 1.0)
        if 4 * max(f.rate, 1.0) * reach * reach > sys.float_info.max:
            return assemble(f, alpha, **spectrum, curvature=0.0, curvature_interval=(0.0, math.inf))
        projected -= f.rate * (tridiagonal @ tridiagonal)
        projected[-1, -1] -= f.rate * last**2
    curvatures, vectors = np.linalg.eigh(projected)
    curvature, vector = float(curvatures[-1]), vectors[:, -1]
    # (H - a*H^2) V y = V P y + r, |r| <= b|y_m| + a*b*(|(T y)_m| + |H| |y_m|): H leaves the Krylov space
    # through the last basis vector alone.
    leak = last * (abs(vector[-1]) + f.rate * (abs(tridiagonal[-1] @ vector) + radius * abs(vector[-1])))
    hidden = resolution * abs(curvature) if last > 0 else 0.0
    # An error of `noise` in H enters H - a*H^2 once by itself and twice by the square.
    error = noise * (1 + 2 * f.rate * radius)
    highest = curvature + max(float(leak), hidden) + error
    if level > -math.inf:
        # An eigenvalue that the start vector missed may bind: the one nearest to the peak of the multiplier.
        peak = min(1 / (2 * f.rate) if f.rate > 0 else math.inf, float(values[-1]) + residual)
        highest = max(highest, f(peak - distance_to_hidden(values, level, peak)) + error)
    return assemble(
        f,
        alpha,
        **spectrum,
        curvature=max(curvature, 0.0),
        curvature_interval=(max(curvature - error, 0.0), max(highest, 0.0)),
    )


def rates_from_top(
    lambda_max: float, lambda_min: float, residual: float, alpha: float, *, inner_steps: int = 1
) -> CriticalRates:
    """Compute the critical rates of simplified MAML from ``lambda_max`` alone, as power iteration gives it.

    Any eigenvalue in ``[0, lambda_max]`` may bind, so ``beta_c`` is a lower bound: ``2/f(lambda_max)`` if
    ``alpha <= 1/(2*lambda_max)``, else ``8*alpha``.
    """
    at_top = critical_rates([lambda_max], alpha, inner_steps=inner_steps, residuals=residual)
    f = multiplier(alpha, "simplified", inner_steps)
    return assemble(
        f,
        alpha,
        lambda_max=lambda_max,
        lambda_min=lambda_min,
        lambda_interval=at_top.lambda_max_interval,
        curvature=f.range_over(0.0, max(lambda_max, 0.0))[1],
        curvature_interval=(
            at_top.curvature_interval[0],
            f.range_over(0.0, max(lambda_max + residual, 0.0))[1],
        ),
        negative=int(lambda_min < 0),
    )


def _tridiagonal(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> np.ndarray:
    main, off = np.asarray(diagonal, dtype=np.float64), np.asarray(off_diagonal, dtype=np.float64)
    if main.ndim != 1 or main.size == 0 or main.shape != off.shape:
        raise ValueError(
            "Expected arguments `diagonal` and `off_diagonal` to be two sequences of one length m >= 1 (the "
            f"last off-diagonal entry is the residual) but got shapes {main.shape} and {off.shape}."
        )
    if not (np.isfinite(main).all() and np.isfinite(off).all()):
        raise ValueError("Expected a finite Lanczos run but it holds nan or inf: the curvature was not measured.")
    return np.diag(main) + np.diag(off[:-1], 1) + np.diag(off[:-1], -1)
