"""Critical learning rates of MAML from the eigenvalues of a task loss's Hessian.

Source: Takagi, Nagano, Yoshida, Okada, "On the conditions of MAML convergence" (the *poster*).
Near a minimum the meta update multiplies the error along the i-th eigenvector of the Hessian ``H`` by
``1 - beta * f(lambda_i)``. The *multiplier* ``f`` depends on how the meta-gradient is taken:

=============  ==================================  =====================================
order          f(lambda)                           largest inner rate alpha_c
=============  ==================================  =====================================
simplified     lambda * (1 - K*alpha*lambda)       1 / (K * lambda_max)   (the poster: K = 1)
first          lambda * (1 - alpha*lambda)^K       1 / lambda_max for odd K, else 2 / lambda_max
exact          lambda * (1 - alpha*lambda)^(2K)    2 / lambda_max (the inner loop's own limit)
=============  ==================================  =====================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

ORDERS = ("exact", "first", "simplified")

Interval = tuple[float, float]


@dataclass(frozen=True)
class CriticalRates:
    """The largest rates at which a meta update converges near a minimum, with their intervals.

    Attributes:
        alpha: The inner rate the meta rate's limit was computed for.
        alpha_c: Largest convergent inner rate; ``inf`` when no eigenvalue is positive.
        beta_c: Largest convergent meta rate of plain SGD at ``alpha``; ``inf`` when there is no finite
            limit, ``0`` when no positive meta rate converges (``alpha`` turned a multiplier negative).
        lambda_max: Largest eigenvalue of the Hessian.
        lambda_min: Smallest eigenvalue seen; negative ones are unstable at every rate and enter no formula.
        curvature: Largest multiplier ``max_i f(lambda_i)``, so that ``beta_c = 2 / curvature``.
        lambda_max_interval: Where ``lambda_max`` lies, from the residual bounds.
        alpha_c_interval: Where ``alpha_c`` lies.
        beta_c_interval: Where ``beta_c`` lies.
        curvature_interval: Where ``curvature`` lies.
        certificate: A lower bound on ``beta_c`` that holds for *any* spectrum in ``[0, lambda_max]``.
        negative: How many of the eigenvalues (or Ritz values) seen are negative.
    """

    alpha: float
    alpha_c: float
    beta_c: float
    lambda_max: float
    lambda_min: float
    curvature: float
    lambda_max_interval: Interval
    alpha_c_interval: Interval
    beta_c_interval: Interval
    curvature_interval: Interval
    certificate: float
    negative: int


@dataclass(frozen=True)
class _Multiplier:
    """``f(lambda) = lambda * (1 - rate*lambda)^power`` and what follows from its shape."""

    rate: float
    power: int
    inner_limit: float  # alpha_c = inner_limit / lambda_max

    def __call__(self, eigenvalue: float) -> float:
        with np.errstate(over="ignore"):
            return float(eigenvalue * np.float64(1.0 - self.rate * eigenvalue) ** self.power)

    def range_over(self, low: float, high: float) -> Interval:
        """Smallest and largest value on ``[low, high]``: at the ends or where the derivative is 0."""
        points = [low, high]
        if self.rate > 0:
            stationary = (1.0 / self.rate, 1.0 / (self.rate * (1 + self.power)))
            points += [point for point in stationary if low < point < high]
        values = [self(point) for point in points]
        return min(values), max(values)


def _multiplier(alpha: float, order: str, inner_steps: int) -> _Multiplier:
    if order == "simplified":
        return _Multiplier(alpha * inner_steps, 1, 1.0 / inner_steps)
    if order == "first":
        return _Multiplier(alpha, inner_steps, 1.0 if inner_steps % 2 else 2.0)
    return _Multiplier(alpha, 2 * inner_steps, 2.0)


def critical_rates(
    eigenvalues: Any,
    alpha: float,
    *,
    order: str = "simplified",
    inner_steps: int = 1,
    residuals: Any = 0.0,
) -> CriticalRates:
    """Compute the critical inner and meta rate from a spectrum.

    For the poster's simplified MAML ``alpha_c = 1/lambda_max`` and
    ``beta_c = min_i 2/(lambda_i - alpha*lambda_i^2)``, the minimum taken over the *whole* spectrum: once
    ``alpha > 1/(2*lambda_max)`` an interior eigenvalue binds. The other orders use their own multiplier
    (see the module's table); for ``K`` simplified steps the poster's expansion to first order in
    ``alpha`` gives ``K*alpha`` in place of ``alpha``.

    Args:
        eigenvalues: Eigenvalues of the Hessian at (or near) a minimum: any real array-like, flattened.
        alpha: Inner rate, at least 0.
        order: How the meta-gradient is taken: ``"simplified"``, ``"first"`` or ``"exact"``.
        inner_steps: Number ``K`` of inner steps, at least 1.
        residuals: Residual bound of each eigenvalue (a scalar or one a value): the true eigenvalue lies
            within it. They become the intervals.

    Returns:
        The critical rates, their intervals and what they rest on.

    Raises:
        ValueError: If the spectrum is empty or not finite, if the rate is negative or not finite, or if
            the order or the number of steps is unknown.

    Example:
        >>> rates = critical_rates([0.3, 1.0, 2.0, 4.0], alpha=0.1)
        >>> rates.alpha_c, round(rates.beta_c, 4)
        (0.25, 0.8333)
    """
    check_rate(alpha)
    check_order(order, inner_steps)
    values = np.asarray(_to_numpy(eigenvalues), dtype=np.float64).reshape(-1)
    bounds = np.abs(np.asarray(_to_numpy(residuals), dtype=np.float64))
    if values.size == 0:
        raise ValueError("Expected argument `eigenvalues` to hold at least one eigenvalue but it is empty.")
    if not np.isfinite(values).all() or not np.isfinite(bounds).all():
        raise ValueError(
            f"Expected arguments `eigenvalues` and `residuals` to be finite but got {values} and {bounds}: "
            "the curvature was not measured, so no rate follows from it."
        )
    if bounds.size not in {1, values.size}:
        raise ValueError(
            f"Expected argument `residuals` to be one number or {values.size} numbers (one an eigenvalue) "
            f"but got {bounds.size}."
        )
    bounds = np.broadcast_to(bounds.reshape(-1), values.shape)
    f = _multiplier(alpha, order, inner_steps)
    top = int(values.argmax())
    lambda_max = float(values[top])
    lambda_interval = (float((values - bounds).max()), float((values + bounds).max()))
    ranges = [
        f.range_over(max(value - bound, 0.0), value + bound)
        for value, bound in zip(values, bounds, strict=True)
        if value + bound > 0
    ]
    return _assemble(
        f,
        alpha,
        lambda_max=lambda_max,
        lambda_min=float(values.min()),
        lambda_interval=lambda_interval,
        curvature=max((f(value) for value in values if value > 0), default=0.0),
        curvature_interval=(
            max((low for low, _ in ranges), default=0.0),
            max((high for _, high in ranges), default=0.0),
        ),
        negative=int((values < 0).sum()),
    )


def ritz_values(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Compute Ritz values and their residual bounds from a Lanczos run.

    Args:
        diagonal: The ``m`` diagonal entries of the tridiagonal matrix ``T``.
        off_diagonal: The ``m`` norms after each step: ``m - 1`` off-diagonal entries and the last residual
            ``b``.

    Returns:
        The Ritz values in ascending order and the bounds ``b * |last component of the eigenvector|``.

    Raises:
        ValueError: If the two do not have the same length of at least 1.
    """
    tridiagonal = _tridiagonal(diagonal, off_diagonal)
    values, vectors = np.linalg.eigh(tridiagonal)
    return values, abs(float(off_diagonal[-1])) * np.abs(vectors[-1])


def rates_from_lanczos(
    diagonal: Sequence[float],
    off_diagonal: Sequence[float],
    alpha: float,
    *,
    inner_steps: int = 1,
    rounding: float = 0.0,
) -> CriticalRates:
    """Compute the poster's critical rates from one Lanczos run on ``H``.

    With basis ``V``, tridiagonal ``T`` and last residual ``b``,
    ``V^T (H - alpha*H^2) V = T - alpha*(T^2 + b^2 e_m e_m^T)`` exactly, so the top eigenvalue of the right
    side is the Rayleigh-Ritz value of ``H - alpha*H^2`` at no further Hessian-vector product.

    Args:
        diagonal: Diagonal of ``T``, length ``m``.
        off_diagonal: Off-diagonal of ``T`` followed by the last residual ``b``, length ``m``.
        alpha: Inner rate, at least 0.
        inner_steps: Number ``K`` of simplified inner steps; ``alpha`` becomes ``K*alpha``.
        rounding: Relative rounding error of a product, added to every residual bound.

    Returns:
        The critical rates of simplified MAML, with intervals from the residual bounds.

    Raises:
        ValueError: If the rate is negative or not finite, or if the run is empty or not finite.
    """
    check_rate(alpha)
    check_order("simplified", inner_steps)
    values, residuals = ritz_values(diagonal, off_diagonal)
    f = _multiplier(alpha, "simplified", inner_steps)
    tridiagonal = _tridiagonal(diagonal, off_diagonal)
    last = float(off_diagonal[-1])
    projected = tridiagonal - f.rate * (tridiagonal @ tridiagonal)
    projected[-1, -1] -= f.rate * last**2
    curvatures, vectors = np.linalg.eigh(projected)
    curvature, vector = float(curvatures[-1]), vectors[:, -1]
    radius = float(max(abs(values[0]), abs(values[-1])) + last)
    noise = rounding * radius
    residual = float(residuals[-1]) + noise
    # (H - a*H^2) V y = V P y + r, |r| <= b|y_m| + a*b*(|(T y)_m| + |H| |y_m|): H leaves the Krylov space
    # through the last basis vector alone.
    leak = last * (abs(vector[-1]) + f.rate * (abs(tridiagonal[-1] @ vector) + radius * abs(vector[-1])))
    leak = float(leak) + noise * (1 + f.rate * radius)
    return _assemble(
        f,
        alpha,
        lambda_max=float(values[-1]),
        lambda_min=float(values[0]),
        lambda_interval=(float(values[-1]) - noise, float(values[-1]) + residual),
        curvature=max(curvature, 0.0),
        curvature_interval=(max(curvature - noise * (1 + f.rate * radius), 0.0), max(curvature + leak, 0.0)),
        negative=int((values < -residuals - noise).sum()),
    )


def rates_from_top(
    lambda_max: float, lambda_min: float, residual: float, alpha: float, *, inner_steps: int = 1
) -> CriticalRates:
    """Compute the poster's critical rates when only the top of the spectrum is known (power iteration).

    Any eigenvalue in ``[0, lambda_max]`` may bind, so ``beta_c`` is the certificate: ``2/f(lambda_max)`` if
    ``alpha <= 1/(2*lambda_max)``, else ``8*alpha``.

    Args:
        lambda_max: Largest eigenvalue.
        lambda_min: Smallest eigenvalue seen.
        residual: An eigenvalue lies this close to ``lambda_max``.
        alpha: Inner rate, at least 0.
        inner_steps: Number ``K`` of simplified inner steps; ``alpha`` becomes ``K*alpha``.

    Returns:
        The critical rates of simplified MAML; the true ``beta_c`` is at least the one given.

    Raises:
        ValueError: If a number is not finite or the rate is negative.
    """
    at_top = critical_rates([lambda_max], alpha, inner_steps=inner_steps, residuals=residual)
    f = _multiplier(alpha, "simplified", inner_steps)
    return _assemble(
        f,
        alpha,
        lambda_max=lambda_max,
        lambda_min=lambda_min,
        lambda_interval=at_top.lambda_max_interval,
        curvature=f.range_over(0.0, max(lambda_max, 0.0))[1],
        curvature_interval=(at_top.curvature_interval[0], f.range_over(0.0, max(lambda_max + residual, 0.0))[1]),
        negative=int(lambda_min < 0),
    )


def worst_of(rates: Sequence[CriticalRates]) -> CriticalRates:
    """Combine the limits of several tasks: the lowest ``alpha_c`` and the lowest ``beta_c``.

    Args:
        rates: One a task, at the same ``alpha``.

    Returns:
        The limits that hold for all of them.
    """
    sharpest = max(rates, key=lambda each: each.lambda_max)
    steepest = max(rates, key=lambda each: each.curvature)
    zero = any(each.beta_c == 0 for each in rates)
    return replace(
        sharpest,
        lambda_min=min(each.lambda_min for each in rates),
        curvature=steepest.curvature,
        curvature_interval=steepest.curvature_interval,
        beta_c=0.0 if zero else steepest.beta_c,
        beta_c_interval=(min(each.beta_c_interval[0] for each in rates), min(each.beta_c_interval[1] for each in rates)),
        certificate=min(each.certificate for each in rates),
        negative=max(each.negative for each in rates),
    )


def _assemble(
    f: _Multiplier,
    alpha: float,
    *,
    lambda_max: float,
    lambda_min: float,
    lambda_interval: Interval,
    curvature: float,
    curvature_interval: Interval,
    negative: int,
) -> CriticalRates:
    alpha_c = _ratio(f.inner_limit, lambda_max)
    low, high = lambda_interval
    # 2/f(lambda_max) left of the parabola's top, 8*alpha (2 over the top itself) right of it.
    certificate = _ratio(2.0, f.range_over(0.0, max(high, 0.0))[1])
    # On the boundary itself the multiplier of lambda_max is 0 up to rounding: not yet negative.
    unstable = f.power % 2 == 1 and alpha > alpha_c * (1 + 1e-12)
    possibly_unstable = f.power % 2 == 1 and alpha > _ratio(f.inner_limit, high) * (1 + 1e-12)
    upper_curvature = max(min(curvature_interval[1], f.range_over(0.0, max(high, 0.0))[1]), curvature)
    beta_c_low = 0.0 if possibly_unstable else _ratio(2.0, upper_curvature)
    certainly_unstable = f.power % 2 == 1 and alpha > _ratio(f.inner_limit, low) * (1 + 1e-12)
    return CriticalRates(
        alpha=alpha,
        alpha_c=alpha_c,
        beta_c=0.0 if unstable else _ratio(2.0, curvature),
        lambda_max=lambda_max,
        lambda_min=lambda_min,
        curvature=curvature,
        lambda_max_interval=lambda_interval,
        alpha_c_interval=(_ratio(f.inner_limit, high), _ratio(f.inner_limit, low)),
        beta_c_interval=(beta_c_low, 0.0 if certainly_unstable else _ratio(2.0, curvature_interval[0])),
        curvature_interval=(curvature_interval[0], upper_curvature),
        certificate=0.0 if possibly_unstable else certificate,
        negative=negative,
    )


def _ratio(numerator: float, denominator: float) -> float:
    """The rate ``numerator/denominator``, or ``inf`` (no finite limit) when nothing positive curves."""
    if denominator <= 0:
        return math.inf
    with np.errstate(over="ignore"):
        return float(np.float64(numerator) / np.float64(denominator))


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


def _to_numpy(values: Any) -> Any:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else values


def check_rate(alpha: float, name: str = "alpha") -> None:
    """Refuse a learning rate that is not a finite number of at least 0.

    Args:
        alpha: The rate.
        name: What the message calls it.

    Raises:
        ValueError: If the rate is negative, ``nan``, infinite or not a number.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float, np.floating)):
        raise ValueError(f"Expected argument `{name}` to be a number of at least 0 but got {alpha!r}.")
    if not math.isfinite(alpha) or alpha < 0:
        raise ValueError(f"Expected argument `{name}` to be a finite number of at least 0 but got {alpha!r}.")


def check_order(order: str, inner_steps: int) -> None:
    """Refuse an unknown order or number of inner steps.

    Args:
        order: How the meta-gradient is taken.
        inner_steps: Number of inner steps.

    Raises:
        ValueError: If either is not allowed.
    """
    if order not in ORDERS:
        raise ValueError(f"Expected argument `order` to be one of {ORDERS} but got {order!r}.")
    if isinstance(inner_steps, bool) or not isinstance(inner_steps, int) or inner_steps < 1:
        raise ValueError(f"Expected argument `inner_steps` to be an integer of at least 1 but got {inner_steps!r}.")
