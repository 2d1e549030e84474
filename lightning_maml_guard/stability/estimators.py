"""Estimators of a Hessian's spectrum, interchangeable behind one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_maml_guard.linalg.lanczos import Matvec, Tridiagonal, Watched, check_finite, start_vector
from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.linalg.operators import Operator
from lightning_maml_guard.linalg.pyhessian import PowerIteration, largest_eigenvalue
from lightning_maml_guard.stability.krylov_stopping import Krylov, check_symmetry, run_lanczos
from lightning_maml_guard.theory.critical_rates import CriticalRates, critical_rates, worst_of
from lightning_maml_guard.theory.ritz import rates_from_lanczos, rates_from_top
from lightning_maml_guard.utils.checks import shown

Estimator = str | Callable[[Matvec, Tensor], Sequence[float]]


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
    krylov: Krylov,
    noise: float,
    value: Watched,
) -> Spectrum:
    """Estimate the spectrum of a Hessian.

    Args:
        hessian: The operator.
        loss: The function it is the Hessian of.
        params: Where, by name.
        estimator: ``"lanczos"``, ``"pyhessian"``, or ``(matvec, start vector) -> eigenvalues``.
        blocks: Number of blocks of a block-diagonal operator; None for a single matrix.
        alpha: Inner rate, which decides when ``beta_c`` is known well enough.
        krylov: How far a run goes.
        noise: Relative rounding error of a product.
        value: The loss there, and what it is called.

    Returns:
        The spectrum.

    Raises:
        NonFiniteProductError: If the loss or a product is not finite.
        ValueError: If the estimator can't treat several blocks, or returns nothing.
    """
    like = next(iter(params.values()))
    if estimator == "lanczos":
        run = run_lanczos(hessian, hessian.layout.size, like, blocks, krylov=krylov, alpha=alpha, value=value)
        check_symmetry(run, noise)
        rounding = max(noise, run.asymmetry) + run.rounding
        return Spectrum(runs=tuple(run.runs), rounding=rounding, matvecs=run.matvecs, resolution=krylov.tol)
    check_finite(value)
    if blocks is not None:
        raise ValueError("tasks='worst' needs estimator='lanczos': the others treat one Hessian at a time.")
    if estimator == "pyhessian":
        power = largest_eigenvalue(loss, params, max_iter=krylov.max_iter, tol=krylov.tol)
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
