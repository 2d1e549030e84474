"""Critical learning rates of MAML from the eigenvalues of a task loss's Hessian.

Source: Takagi, Nagano, Yoshida, Okada, "On the conditions of MAML convergence". Near a minimum simplified MAML
converges only if ``alpha <= alpha_c = 1/lambda_max`` and ``beta < beta_c = min_i 2/(lambda_i - alpha*lambda_i^2)``.
``theory.multiplier`` has the other orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_maml_guard.theory.multiplier import (
    Interval,
    Multiplier,
    check_order,
    check_rate,
    multiplier,
    rate_limit,
)
from lightning_maml_guard.utils.checks import shown


@dataclass(frozen=True)
class CriticalRates:
    """The largest rates at which a meta update converges near a minimum, with their intervals.

    Attributes:
        alpha: The inner rate for which the limit of the outer rate was computed.
        alpha_c: Largest convergent inner rate; ``inf`` if no eigenvalue is positive.
        beta_c: Largest convergent outer rate of plain SGD at ``alpha``; ``inf`` if there is no finite limit, ``0`` if
            no positive outer rate converges (``alpha`` makes a multiplier negative).
        lambda_max: Largest eigenvalue of the Hessian.
        lambda_min: Smallest eigenvalue seen. Negative eigenvalues are unstable at every rate and enter no formula.
        curvature: Largest multiplier ``max_i f(lambda_i)``, so that ``beta_c = 2 / curvature``.
        lambda_max_interval: Interval of ``lambda_max``, from the residual bounds.
        alpha_c_interval: Interval of ``alpha_c``.
        beta_c_interval: Interval of ``beta_c``.
        curvature_interval: Interval of ``curvature``.
        certificate: A lower bound on ``beta_c`` that holds for *any* spectrum in ``[0, lambda_max]``.
        negative: Number of negative eigenvalues (or Ritz values) seen.
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


def critical_rates(
    eigenvalues: Any,
    alpha: float,
    *,
    order: str = "simplified",
    inner_steps: int = 1,
    residuals: Any = 0.0,
) -> CriticalRates:
    """Compute the critical inner and outer rate from a spectrum.

    For simplified MAML (Takagi et al.) ``alpha_c = 1/lambda_max`` and ``beta_c = min_i 2/(lambda_i -
    alpha*lambda_i^2)``. The minimum is taken over the *whole* spectrum: once ``alpha > 1/(2*lambda_max)``, an interior
    eigenvalue binds. The other orders have their own multiplier (see ``theory.multiplier``). For ``K`` simplified steps
    the expansion to first order in ``alpha`` gives ``K*alpha`` in place of ``alpha``.

    Args:
        eigenvalues: Eigenvalues of the Hessian at (or near) a minimum: any real array-like, flattened.
        alpha: Inner rate, at least 0.
        order: How the meta-gradient is taken: ``"simplified"``, ``"first"`` or ``"exact"``.
        inner_steps: Number ``K`` of inner steps, at least 1.
        residuals: Residual bound of each eigenvalue (one number, or one per eigenvalue): the true eigenvalue lies
            within it. The intervals follow from them.

    Returns:
        The critical rates and their intervals.

    Raises:
        ValueError: If the spectrum is empty or not finite, if the rate is negative or not finite, or if the order or
            the number of steps is unknown.

    Example:
        >>> from lightning_maml_guard import critical_rates
        >>> rates = critical_rates([0.3, 1.0, 2.0, 4.0], alpha=0.1)
        >>> rates.alpha_c, round(rates.beta_c, 4)
        (0.25, 0.8333)
    """
    check_rate(alpha)
    check_order(order, inner_steps)
    values = _real("eigenvalues", eigenvalues).reshape(-1)
    bounds = np.abs(_real("residuals", residuals))
    if values.size == 0:
        raise ValueError(
            "Expected argument `eigenvalues` to hold at least one eigenvalue but it is empty. Pass the Hessian's "
            "eigenvalues, such as numpy.linalg.eigvalsh(hessian)."
        )
    if not np.isfinite(values).all() or not np.isfinite(bounds).all():
        raise ValueError(
            f"Expected arguments `eigenvalues` and `residuals` to be finite but got {values} and {bounds}: "
            "the curvature was not measured, so no rate follows from it. Measure where the loss is finite."
        )
    if bounds.size not in {1, values.size}:
        raise ValueError(
            f"Expected argument `residuals` to be one number or {values.size} numbers (one per eigenvalue) "
            f"but got {bounds.size}. Pass one bound for all, or one per value."
        )
    bounds = np.broadcast_to(bounds.reshape(-1), values.shape)
    f = multiplier(alpha, order, inner_steps)
    top = int(values.argmax())
    lambda_max = float(values[top])
    lambda_interval = (float((values - bounds).max()), float((values + bounds).max()))
    ranges = [
        f.range_over(max(value - bound, 0.0), value + bound)
        for value, bound in zip(values, bounds, strict=True)
        if value + bound > 0
    ]
    return assemble(
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


def worst_of(rates: Sequence[CriticalRates]) -> CriticalRates:
    """Combine the limits of several tasks at the same ``alpha``: the lowest ``alpha_c`` and the lowest ``beta_c``.

    Args:
        rates: One per task.

    Returns:
        The limits that hold for all tasks.
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
        beta_c_interval=(
            min(each.beta_c_interval[0] for each in rates),
            min(each.beta_c_interval[1] for each in rates),
        ),
        certificate=min(each.certificate for each in rates),
        negative=max(each.negative for each in rates),
    )


def assemble(
    f: Multiplier,
    alpha: float,
    *,
    lambda_max: float,
    lambda_min: float,
    lambda_interval: Interval,
    curvature: float,
    curvature_interval: Interval,
    negative: int,
) -> CriticalRates:
    """Compute limits, intervals and certificate from the curvature.

    Args:
        f: The multiplier.
        alpha: Inner rate.
        lambda_max: Largest eigenvalue.
        lambda_min: Smallest eigenvalue seen.
        lambda_interval: Interval of ``lambda_max``.
        curvature: Largest multiplier found.
        curvature_interval: Interval of the largest multiplier.
        negative: Number of negative eigenvalues.

    Returns:
        The critical rates.
    """
    low, high = lambda_interval

    def beyond(top: float) -> bool:
        # alpha makes the multiplier of this eigenvalue negative, by more than rounding.
        return f.power % 2 == 1 and alpha > rate_limit(f.inner_limit, top) * (1 + 1e-12)

    # 2 over the peak is 2/f(lambda_max) left of the parabola's top and 8*alpha right of it.
    peak = f.range_over(0.0, max(high, 0.0))[1]
    upper_curvature = max(min(curvature_interval[1], peak), curvature)
    return CriticalRates(
        alpha=alpha,
        alpha_c=rate_limit(f.inner_limit, lambda_max),
        beta_c=0.0 if beyond(lambda_max) else rate_limit(2.0, curvature),
        lambda_max=lambda_max,
        lambda_min=lambda_min,
        curvature=curvature,
        lambda_max_interval=lambda_interval,
        alpha_c_interval=(rate_limit(f.inner_limit, high), rate_limit(f.inner_limit, low)),
        beta_c_interval=(
            0.0 if beyond(high) else rate_limit(2.0, upper_curvature),
            0.0 if beyond(low) else rate_limit(2.0, curvature_interval[0]),
        ),
        curvature_interval=(curvature_interval[0], upper_curvature),
        certificate=0.0 if beyond(high) else rate_limit(2.0, peak),
        negative=negative,
    )


def _real(name: str, values: Any) -> np.ndarray:
    given = values
    if hasattr(values, "detach"):
        if values.device.type == "meta":
            raise ValueError(
                f"Expected argument `{name}` to hold numbers but got {shown(given)}: a tensor on the meta device has "
                "no values. Move it to a real device and compute them there."
            )
        values = values.detach().cpu()
        values = (values if values.is_complex() else values.double()).numpy()
    message = (
        f"Expected argument `{name}` to hold real numbers (a Hessian is symmetric) but got {shown(given)}. Pass a "
        "list, an array or a tensor of them."
    )
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(message) from error
    if array.dtype.kind not in "biuf":
        raise ValueError(message)
    return array.astype(np.float64)
