"""Estimators of a Hessian's spectrum, interchangeable behind one function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard._checks import shown
from lightning_maml_guard.curvature.lanczos import (
    ArnoldiRun,
    LanczosRun,
    Matvec,
    Tridiagonal,
    arnoldi,
    lanczos,
    start_vector,
)
from lightning_maml_guard.curvature.layout import Params
from lightning_maml_guard.curvature.operators import Operator
from lightning_maml_guard.curvature.pyhessian import PowerIteration, largest_eigenvalue
from lightning_maml_guard.guard.outer import OuterStep
from lightning_maml_guard.theory.multiplier import Interval
from lightning_maml_guard.theory.nonsymmetric import complex_limit, complex_ritz
from lightning_maml_guard.theory.rates import CriticalRates, critical_rates, worst_of
from lightning_maml_guard.theory.ritz import rates_from_lanczos, rates_from_top, ritz_values

Estimator = str | Callable[[Matvec, Tensor], Sequence[float]]

# A float product carries rounding of this many units in the last place, relative to the spectral radius.
_ROUNDING_ULPS = 16
# Products that disagree by more than this share of the spectral radius are not those of one matrix.
_SYMMETRY = 1e-2
# A run stops at this fraction of the residual asked for: of 1000 random spectra none then misses its interval.
_SHARPER = 16


@dataclass(frozen=True)
class Spectrum:
    """What is known of a Hessian's spectrum, as plain numbers.

    Attributes:
        runs: Lanczos runs, one a block of the operator.
        power: What power iteration found, instead.
        values: Eigenvalues as a user's estimator gave them, instead.
        rounding: Relative rounding error of a product.
        matvecs: Products used.
        resolution: Relative width in which a cluster may hide its true top.
    """

    runs: tuple[Tridiagonal, ...] = ()
    power: PowerIteration | None = None
    values: tuple[float, ...] = ()
    rounding: float = 0.0
    matvecs: int = 0
    resolution: float = 0.0

    def rates(self, alpha: float, inner_steps: int = 1) -> CriticalRates:
        """Compute the poster's critical rates.

        Args:
            alpha: Inner rate.
            inner_steps: Number of simplified inner steps.

        Returns:
            The critical rates; over several blocks, those that hold for all.
        """
        if self.power is not None:
            top = self.power
            return rates_from_top(top.lambda_max, top.lambda_min, top.residual, alpha, inner_steps=inner_steps)
        if self.values:
            return critical_rates(self.values, alpha, inner_steps=inner_steps)
        return worst_of(
            [
                rates_from_lanczos(
                    *run, alpha, inner_steps=inner_steps, rounding=self.rounding, resolution=self.resolution
                )
                for run in self.runs
            ]
        )


def merged(spectra: Sequence[Spectrum]) -> Spectrum:
    """Put the Lanczos runs of several ranks' blocks together.

    Args:
        spectra: One spectrum a rank.

    Returns:
        The spectrum of all blocks.
    """
    return Spectrum(
        runs=tuple(run for spectrum in spectra for run in spectrum.runs),
        rounding=max(spectrum.rounding for spectrum in spectra),
        matvecs=max(spectrum.matvecs for spectrum in spectra),
        resolution=spectra[0].resolution,
    )


def check_estimator(estimator: Any) -> None:
    """Refuse an estimator that is not known.

    Args:
        estimator: ``"lanczos"``, ``"pyhessian"`` or a callable.

    Raises:
        ValueError: If it is none of these.
    """
    if not callable(estimator) and not (isinstance(estimator, str) and estimator in {"lanczos", "pyhessian"}):
        raise ValueError(
            "Expected argument `estimator` to be 'lanczos', 'pyhessian' or a callable (matvec, start vector) -> "
            f"eigenvalues but got {shown(estimator)}. Pass one of the two words, or a function."
        )


def hessian_spectrum(
    hessian: Operator,
    loss: Callable[[Params], Tensor],
    params: Params,
    *,
    estimator: Estimator,
    blocks: int | None,
    alpha: float,
    max_iter: int,
    tol: float,
    noise: float,
) -> Spectrum:
    """Estimate the spectrum of a Hessian.

    Args:
        hessian: The operator.
        loss: The function it is the Hessian of.
        params: Where, by name.
        estimator: ``"lanczos"``, ``"pyhessian"``, or ``(matvec, start vector) -> eigenvalues``.
        blocks: Number of blocks of a block-diagonal operator; None for a single matrix.
        alpha: Inner rate, which decides when ``beta_c`` is known well enough.
        max_iter: Products at most.
        tol: Relative residual at which to stop.
        noise: Relative rounding error of a product.

    Returns:
        The spectrum.

    Raises:
        ValueError: If the estimator can't treat several blocks, or returns nothing.
    """
    like = next(iter(params.values()))
    if estimator == "lanczos":
        run = run_lanczos(hessian, hessian.layout.size, like, blocks, max_iter=max_iter, tol=tol, alpha=alpha)
        check_symmetry(run, noise)
        return Spectrum(runs=tuple(run.runs), rounding=max(noise, run.asymmetry), matvecs=run.matvecs, resolution=tol)
    if blocks is not None:
        raise ValueError("tasks='worst' needs estimator='lanczos': the others treat one Hessian at a time.")
    if estimator == "pyhessian":
        power = largest_eigenvalue(loss, params, max_iter=max_iter, tol=tol)
        return Spectrum(power=power, matvecs=power.matvecs)
    assert callable(estimator)
    before = hessian.matvecs
    values = estimator(hessian, start_vector((hessian.layout.size,), like))
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected argument `estimator` to return a sequence of eigenvalues but got {shown(values)}. Return a list "
            "or a one-dimensional tensor of numbers."
        ) from error
    if not found:
        raise ValueError(
            f"The estimator {estimator!r} returned no eigenvalue; expected at least one. Return the largest it found."
        )
    return Spectrum(values=found, matvecs=hessian.matvecs - before)


def top_eigenvalue(
    matvec: Matvec, size: int, like: Tensor, blocks: int | None, *, max_iter: int, tol: float
) -> tuple[float, Interval]:
    """Find the largest eigenvalue of a symmetric operator, over all of its blocks.

    Args:
        matvec: The operator.
        size: Length of a vector.
        like: Tensor whose dtype and device the vectors take.
        blocks: Number of blocks; None for a single matrix.
        max_iter: Products at most.
        tol: Relative residual at which to stop.

    Returns:
        The eigenvalue and its interval.
    """
    run = run_lanczos(matvec, size, like, blocks, max_iter=max_iter, tol=tol)
    tops = [rates_from_lanczos(*each, 0.0, rounding=rounding(like), resolution=tol) for each in run.runs]
    top = max(tops, key=lambda each: each.lambda_max)
    return top.lambda_max, top.lambda_max_interval


def run_lanczos(
    matvec: Matvec,
    size: int,
    like: Tensor,
    blocks: int | None,
    *,
    max_iter: int,
    tol: float,
    alpha: float = 0.0,
) -> LanczosRun:
    """Run Lanczos until the top (and, for ``alpha > 0``, ``beta_c``) is known to a relative residual.

    Args:
        matvec: The operator.
        size: Length of a vector.
        like: Tensor whose dtype and device the vectors take.
        blocks: Number of blocks; None for a single matrix.
        max_iter: Products at most.
        tol: Relative residual at which to stop.
        alpha: Inner rate.

    Returns:
        The run.
    """
    start = start_vector((size,) if blocks is None else (blocks, size), like)

    def tight(runs: Sequence[Tridiagonal]) -> bool:
        # At `tol` itself the run may still sit on an eigenvalue below the top.
        return all(_tight(run, alpha, tol / _SHARPER) for run in runs)

    return lanczos(matvec, start, max_iter=max_iter, stop=tight)


def _tight(run: Tridiagonal, alpha: float, tol: float) -> bool:
    values, residuals = ritz_values(*run)
    if residuals[-1] > tol * max(abs(values[0]), abs(values[-1])):
        return False
    # Beyond alpha_c no meta rate is stable, however sharply the rest is known.
    if alpha * float(values[-1]) > 1 or alpha == 0:
        return True
    low, high = rates_from_lanczos(*run, alpha).curvature_interval
    return high - low <= tol * max(high, abs(float(values[-1])) * tol)


class ChangingOperatorError(ArithmeticError):
    """Products that belong to no one symmetric matrix: nothing follows from them."""


def check_symmetry(run: LanczosRun, noise: float) -> None:
    """Refuse a Lanczos run whose products are not those of one symmetric matrix.

    Args:
        run: The run.
        noise: Relative rounding error of a product.

    Raises:
        ChangingOperatorError: If they disagree by much more than rounding.
    """
    allowed = max(_SYMMETRY, 50 * noise)
    if run.asymmetry > allowed:
        raise ChangingOperatorError(
            f"The curvature products do not belong to one symmetric matrix (they disagree by {run.asymmetry:.1e} of "
            f"the largest eigenvalue; up to {allowed:.0e} is rounding). Likely causes: (a) the loss changes between "
            "products, as with random numbers that do not come from torch's generator or checkpointing without "
            "preserve_rng_state; (b) a layer's second derivative is wrong. Make the loss a function of its "
            "arguments, or freeze that layer's parameters."
        )


def run_arnoldi(
    matvec: Matvec, size: int, like: Tensor, step: OuterStep, *, max_iter: int, tol: float, noise: float
) -> ArnoldiRun:
    """Run Arnoldi until the meta rate's limit is known to a relative accuracy.

    Args:
        matvec: The operator.
        size: Length of a vector.
        like: Tensor whose dtype and device the vectors take.
        step: The optimizer.
        max_iter: Products at most.
        tol: Relative accuracy at which to stop.
        noise: Relative rounding error of a product.

    Returns:
        The run.
    """

    def tight(hessenberg: np.ndarray, residual: float) -> bool:
        ritz = complex_ritz(hessenberg, residual, noise)
        if ritz.bounds[0] > tol * ritz.radius:
            return False
        low, high = complex_limit(ritz, step.responses[:1], tol=tol, decay=step.decoupled).interval
        return high == math.inf or high - low <= 4 * tol * high

    return arnoldi(matvec, start_vector((size,), like), max_iter=max_iter, stop=tight)


def rounding(like: Tensor) -> float:
    """Estimate the relative rounding error of a product.

    Args:
        like: Tensor of the dtype the product is computed in.

    Returns:
        The error relative to the spectral radius.
    """
    return _ROUNDING_ULPS * torch.finfo(like.dtype).eps
