"""Krylov runs as a measurement makes them: how far they go, and when they stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.linalg.arnoldi import ArnoldiRun, arnoldi
from lightning_maml_guard.linalg.lanczos import LanczosRun, Matvec, Tridiagonal, Watched, lanczos
from lightning_maml_guard.linalg.layout import WHOLE, Space
from lightning_maml_guard.optim.linearized_step import LinearizedStep
from lightning_maml_guard.theory.complex_ritz import arnoldi_resolved
from lightning_maml_guard.theory.multiplier import Interval
from lightning_maml_guard.theory.ritz import lanczos_resolved, rates_from_lanczos

# A float product carries rounding of this many units in the last place, relative to the spectral radius.
_ROUNDING_ULPS = 16
# Products that disagree by more than this share of the spectral radius are not those of one matrix.
_SYMMETRY = 1e-2


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
    enough: Callable[[Tridiagonal], bool] | None = None,
    space: Space = WHOLE,
) -> LanczosRun:
    """Run Lanczos until the top (and, for ``alpha > 0``, ``beta_c``) is known to a relative residual, or enough is."""
    start = space.start((size,) if blocks is None else (blocks, size), like)

    def resolved(runs: Sequence[Tridiagonal]) -> bool:
        known = partial(lanczos_resolved, alpha=alpha, tol=krylov.tol, size=size)
        return all(known(*run) or (enough is not None and enough(run)) for run in runs)

    return lanczos(matvec, start, max_iter=krylov.max_iter, stop=resolved, basis=krylov.basis, value=value, space=space)


class ChangingOperatorError(ArithmeticError):
    """Products that belong to no one symmetric matrix: nothing follows from them."""


def check_symmetry(run: LanczosRun, noise: float) -> None:
    """Raise a ChangingOperatorError if a run's products are not those of one symmetric matrix."""
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
    """Run Arnoldi until the meta rate's limit is known to a relative accuracy."""

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
