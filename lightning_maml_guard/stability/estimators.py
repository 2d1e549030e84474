"""Estimators of a Hessian's spectrum, interchangeable through a registry: one function each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from lightning_maml_guard.linalg.lanczos import Matvec, Tridiagonal, Watched, check_finite, start_vector
from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.linalg.operators import FiniteDifference, Operator
from lightning_maml_guard.linalg.pyhessian import PowerIteration, largest_eigenvalue
from lightning_maml_guard.stability.krylov_stopping import Krylov, RateToJudge, check_symmetry, run_lanczos
from lightning_maml_guard.theory.critical_rates import CriticalRates, critical_rates, worst_of
from lightning_maml_guard.theory.ritz import rates_from_lanczos, rates_from_top
from lightning_maml_guard.utils.checks import shown

Estimator = str | Callable[[Matvec, Tensor], Sequence[float]]


@dataclass(frozen=True)
class Spectrum:
    """What is known of a Hessian's spectrum, as plain numbers.

    Attributes:
        runs: Lanczos runs, one per block of the operator.
        power: What power iteration found, instead.
        values: Eigenvalues as a user's estimator returned them, instead.
        rounding: Relative rounding error of a product.
        matvecs: Products used.
        resolution: Relative width in which a cluster may hide its true top.
        size: Number of rows of a block; None where it is not known.
    """

    runs: tuple[Tridiagonal, ...] = ()
    power: PowerIteration | None = None
    values: tuple[float, ...] = ()
    rounding: float = 0.0
    matvecs: int = 0
    resolution: float = 0.0
    size: int | None = None

    def rates(self, alpha: float, inner_steps: int = 1) -> CriticalRates:
        """Compute the simplified criterion's critical rates; over several blocks, those that hold for all."""
        if self.power is not None:
            top = self.power
            return rates_from_top(top.lambda_max, top.lambda_min, top.residual, alpha, inner_steps=inner_steps)
        if self.values:
            return critical_rates(self.values, alpha, inner_steps=inner_steps)
        return worst_of(
            [
                rates_from_lanczos(
                    *run,
                    alpha,
                    inner_steps=inner_steps,
                    rounding=self.rounding,
                    resolution=self.resolution,
                    size=self.size,
                )
                for run in self.runs
            ]
        )


def merged(spectra: Sequence[Spectrum]) -> Spectrum:
    """Join the Lanczos runs of several ranks' blocks."""
    return Spectrum(
        runs=tuple(run for spectrum in spectra for run in spectrum.runs),
        rounding=max(spectrum.rounding for spectrum in spectra),
        matvecs=max(spectrum.matvecs for spectrum in spectra),
        resolution=spectra[0].resolution,
        size=spectra[0].size,
    )


@dataclass(frozen=True)
class HessianRequest:
    """A Hessian whose spectrum is wanted.

    Attributes:
        hessian: The operator.
        loss: The function it is the Hessian of.
        params: Where, by name.
        blocks: Number of blocks of a block-diagonal operator; None for a single matrix.
        alpha: Inner rate, which decides when ``beta_c`` is known well enough.
        krylov: How far a run goes.
        noise: Relative rounding error of a product.
        value: The loss there, and what it is called: it has to be finite.
        rate_to_judge: The rate that ``lambda_max`` is to judge, if it is wanted for nothing else.
    """

    hessian: Operator
    loss: Callable[[Params], Tensor]
    params: Params
    blocks: int | None
    alpha: float
    krylov: Krylov
    noise: float
    value: Watched
    rate_to_judge: RateToJudge | None = None


def _lanczos(wanted: HessianRequest) -> Spectrum:
    like = next(iter(wanted.params.values()))
    run = run_lanczos(
        wanted.hessian,
        wanted.hessian.layout.rows,
        like,
        wanted.blocks,
        krylov=wanted.krylov,
        alpha=wanted.alpha,
        value=wanted.value,
        rate_to_judge=wanted.rate_to_judge,
        space=wanted.hessian.layout.space,
    )
    check_symmetry(run, wanted.noise, differences=isinstance(wanted.hessian, FiniteDifference))
    rounding = max(wanted.noise, run.asymmetry) + run.rounding
    return Spectrum(
        runs=tuple(run.runs),
        rounding=rounding,
        matvecs=run.matvecs,
        resolution=wanted.krylov.tol,
        size=wanted.hessian.layout.rows,
    )


def _pyhessian(wanted: HessianRequest) -> Spectrum:
    check_finite(wanted.value)
    power = largest_eigenvalue(wanted.loss, wanted.params, max_iter=wanted.krylov.max_iter, tol=wanted.krylov.tol)
    return Spectrum(power=power, matvecs=power.matvecs)


@dataclass(frozen=True)
class RegisteredEstimator:
    """An estimator.

    Attributes:
        estimate: The function.
        per_task: Whether it treats one block per task.
        counts_itself: Whether its products are not seen by the operator it is given.
        package: The package that it needs and others do not.
    """

    estimate: Callable[[HessianRequest], Spectrum]
    per_task: bool = False
    counts_itself: bool = False
    package: str | None = None


# A new estimator is a function from a request to a Spectrum, and a row here.
ESTIMATORS: dict[str, RegisteredEstimator] = {
    "lanczos": RegisteredEstimator(_lanczos, per_task=True),
    # On copies of its own, so that the operator does not see its products.
    "pyhessian": RegisteredEstimator(_pyhessian, counts_itself=True, package="pyhessian"),
}


def estimate_spectrum(estimator: Estimator, wanted: HessianRequest) -> Spectrum:
    """Estimate the spectrum of a Hessian, by a registered estimator or a user's function."""
    if isinstance(estimator, str):
        return ESTIMATORS[estimator].estimate(wanted)
    check_finite(wanted.value)
    before = wanted.hessian.matvecs
    like = next(iter(wanted.params.values()))
    values = estimator(wanted.hessian, start_vector((wanted.hessian.layout.size,), like))
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
    return Spectrum(values=found, matvecs=wanted.hessian.matvecs - before)


def estimates_per_task(estimator: Estimator) -> bool:
    """Return True if an estimator treats one block per task, as ``tasks="worst"`` needs."""
    return isinstance(estimator, str) and ESTIMATORS[estimator].per_task


def counts_itself(estimator: Estimator) -> bool:
    """Return True if an estimator's products are not seen by the operator it is given."""
    return isinstance(estimator, str) and ESTIMATORS[estimator].counts_itself


def check_estimator(estimator: Any) -> None:
    """Raise a ValueError if an estimator is neither registered nor callable, an ImportError without its package."""
    if not callable(estimator) and not (isinstance(estimator, str) and estimator in ESTIMATORS):
        known = ", ".join(repr(name) for name in ESTIMATORS)
        raise ValueError(
            f"Expected argument `estimator` to be {known} or a callable (matvec, start vector) -> eigenvalues but got "
            f"{shown(estimator)}. Pass one of these words, or a function."
        )
    package = ESTIMATORS[estimator].package if isinstance(estimator, str) else None
    if package and find_spec(package) is None:
        raise ModuleNotFoundError(
            f"Argument `estimator` = {estimator!r} needs the package {package}, which is not installed. Run "
            f"pip install {package}, or leave `estimator` out: the default needs no other package."
        )
