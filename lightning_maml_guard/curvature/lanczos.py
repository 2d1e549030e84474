"""Lanczos and Arnoldi on the device: algorithms that take a matvec and nothing else.

Full reorthogonalisation keeps the basis orthonormal, so that the Rayleigh-Ritz identities the theory uses
hold to rounding (Golub and Van Loan, "Matrix Computations", section 10.3). The coefficients stay on the
device and come to the host once every few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]


class NonFiniteProductError(ArithmeticError):
    """A matrix-vector product held ``nan`` or ``inf``: the curvature cannot be measured here."""


class Tridiagonal(NamedTuple):
    """One Lanczos run as plain numbers.

    Attributes:
        diagonal: Diagonal of ``T``, length ``m``.
        off_diagonal: Off-diagonal of ``T``, then the norm of the last residual, length ``m``.
    """

    diagonal: tuple[float, ...]
    off_diagonal: tuple[float, ...]


class LanczosRun(NamedTuple):
    """What :func:`lanczos` found.

    Attributes:
        runs: One tridiagonal a matrix of the batch (one in all for a single matrix).
        basis: Orthonormal Lanczos vectors, shape ``(m, *batch, n)``, on the device.
        matvecs: Products used.
        converged: Whether ``stop`` was met (or the Krylov space is exhausted) within ``max_iter`` steps.
        asymmetry: Largest ``|v_i.(A v_j) - v_j.(A v_i)|`` over the products, relative to the spectral radius seen:
            rounding for one symmetric matrix, more if the operator is not symmetric or changes between products.
    """

    runs: list[Tridiagonal]
    basis: Tensor
    matvecs: int
    converged: bool
    asymmetry: float


class ArnoldiRun(NamedTuple):
    """What :func:`arnoldi` found.

    Attributes:
        hessenberg: Projection ``V^T A V``, shape ``(m, m)``, on the host.
        residual: Norm of what the last product left outside the space.
        basis: Orthonormal vectors, shape ``(m, n)``, on the device.
        matvecs: Products used.
    """

    hessenberg: np.ndarray
    residual: float
    basis: Tensor
    matvecs: int


def lanczos(
    matvec: Matvec,
    start: Tensor,
    *,
    max_iter: int,
    stop: Callable[[Sequence[Tridiagonal]], bool] | None = None,
    sync_every: int = 4,
) -> LanczosRun:
    """Run Lanczos on a symmetric matrix, or on a batch of them at once.

    After ``m`` steps ``A V = V T + r e_m^T`` with ``V^T V = I``; in exact arithmetic every eigenvalue
    ``theta`` of ``T`` with eigenvector ``y`` has an eigenvalue of ``A`` within ``|r| * |y_m|``.

    Args:
        matvec: Product with the matrix: ``(*batch, n) -> (*batch, n)``.
        start: Start vector(s), shape ``(*batch, n)``, not zero. The same on every rank.
        max_iter: Steps at most; also bounded by ``n``.
        stop: Asked every ``sync_every`` steps with the tridiagonals so far; True ends the run.
        sync_every: Steps between two transfers to the host.

    Returns:
        The run. A Krylov space that is exhausted early (an invariant subspace) ends it, with residual 0.

    Raises:
        ValueError: If there is nothing to iterate on.
        NonFiniteProductError: If a product is not finite.
    """
    steps = _steps(start, max_iter, sync_every)
    size = start.shape[-1]
    basis = start.new_zeros((steps, *start.shape))
    vector = start / torch.linalg.vector_norm(start, dim=-1, keepdim=True)
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    strays: list[Tensor] = []
    runs: list[Tridiagonal] = []
    converged, asymmetry = False, 0.0
    for step in range(steps):
        basis[step] = vector
        coefficients, norm, vector = _expand(matvec, basis[: step + 1])
        # In a symmetric matrix's row only the diagonal and its neighbour, the last norm, differ from 0.
        stray = coefficients[:-1].clone()
        if step:
            stray[-1] -= off_diagonal[-1]
        strays.append(stray.abs().amax(0) if step else torch.zeros_like(norm))
        diagonal.append(coefficients[-1])
        off_diagonal.append(norm)
        if (step + 1) % sync_every == 0 or step + 1 == steps:
            runs, exhausted, asymmetry = _to_host(diagonal, off_diagonal, strays, size)
            converged = exhausted or (stop is not None and stop(runs))
            if converged:
                break
    return LanczosRun(runs, basis[: len(diagonal)], len(diagonal), converged, asymmetry)


def arnoldi(
    matvec: Matvec,
    start: Tensor,
    *,
    max_iter: int,
    stop: Callable[[np.ndarray, float], bool] | None = None,
    sync_every: int = 4,
) -> ArnoldiRun:
    """Run Arnoldi on a matrix that need not be symmetric.

    After ``m`` steps ``A V = V H + r e_m^T`` with ``V^T V = I`` (Saad, "Numerical Methods for Large Eigenvalue
    Problems", section 6.2).

    Args:
        matvec: Product with the matrix: ``(n,) -> (n,)``.
        start: Start vector, shape ``(n,)``, not zero.
        max_iter: Steps at most; also bounded by ``n``.
        stop: Asked every ``sync_every`` steps with ``H`` and the residual's norm; True ends the run.
        sync_every: Steps between two transfers to the host.

    Returns:
        The run.

    Raises:
        ValueError: If there is nothing to iterate on.
        NonFiniteProductError: If a product is not finite.
    """
    steps = _steps(start, max_iter, sync_every)
    basis = start.new_zeros((steps, *start.shape))
    hessenberg = start.new_zeros((steps + 1, steps))
    vector = start / torch.linalg.vector_norm(start)
    found, residual = np.zeros((0, 0)), 0.0
    eps = torch.finfo(start.dtype).eps
    for step in range(steps):
        basis[step] = vector
        coefficients, norm, vector = _expand(matvec, basis[: step + 1])
        hessenberg[: step + 1, step] = coefficients
        hessenberg[step + 1, step] = norm
        if (step + 1) % sync_every == 0 or step + 1 == steps:
            host = hessenberg[: step + 2, : step + 1].double().cpu().numpy()
            if not np.isfinite(host).all():
                raise NonFiniteProductError(_non_finite(int((~np.isfinite(host)).any(0).argmax()) + 1))
            below = np.diagonal(host, -1)
            ends = np.flatnonzero(below <= 32 * eps * np.abs(host).max())
            length = int(ends[0]) + 1 if ends.size else step + 1
            done = bool(ends.size) or length == start.shape[-1]
            found, residual = host[:length, :length], 0.0 if done else float(below[length - 1])
            if done or (stop is not None and stop(found, residual)):
                break
    return ArnoldiRun(found, residual, basis[: len(found)], step + 1)


def _steps(start: Tensor, max_iter: int, sync_every: int) -> int:
    if start.shape[-1] == 0 or max_iter < 1 or sync_every < 1:
        raise ValueError(
            "Expected a start vector with at least one entry and `max_iter`, `sync_every` of at least 1 but got "
            f"shape {tuple(start.shape)}, max_iter={max_iter!r}, sync_every={sync_every!r}."
        )
    return min(max_iter, start.shape[-1])


def _expand(matvec: Matvec, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply the last basis vector; return the product's coefficients, and the norm and direction of its rest."""
    product = matvec(known[-1])
    coefficients = (known * product).sum(-1)
    product = product - (coefficients.unsqueeze(-1) * known).sum(0)
    # Twice is enough (Kahan, Parlett): the second pass removes what rounding left of the first.
    product = product - ((known * product).sum(-1, keepdim=True) * known).sum(0)
    norm = torch.linalg.vector_norm(product, dim=-1)
    # The squares of a rest as small as a dead network's underflow: divided by that norm it would be of any length.
    tiny = torch.finfo(norm.dtype).tiny
    small = norm < tiny**0.5
    largest = product.abs().amax(-1, keepdim=True).clamp(min=tiny)
    length = torch.linalg.vector_norm(product / largest, dim=-1)
    exactly = product / largest / length.clamp(min=tiny).unsqueeze(-1)
    direction = torch.where(small.unsqueeze(-1), exactly, product / norm.clamp(min=tiny**0.5).unsqueeze(-1))
    return coefficients, torch.where(small, largest.squeeze(-1) * length, norm), direction


def _to_host(
    diagonal: list[Tensor], off_diagonal: list[Tensor], strays: list[Tensor], size: int
) -> tuple[list[Tridiagonal], bool, float]:
    """Bring the coefficients to the host in one transfer, each run cut where its space is exhausted."""
    parts = torch.stack([torch.stack(diagonal), torch.stack(off_diagonal), torch.stack(strays)])
    host = parts.double().reshape(3, len(diagonal), -1).cpu()
    if not bool(torch.isfinite(host).all()):
        raise NonFiniteProductError(_non_finite(int((~torch.isfinite(host)).any(-1).any(0).nonzero()[0]) + 1))
    eps = torch.finfo(diagonal[0].dtype).eps
    runs, exhausted, asymmetry = [], True, 0.0
    for column in range(host.shape[-1]):
        main, off, stray = host[0, :, column], host[1, :, column], host[2, :, column]
        scale = max(float(main.abs().max()), float(off.abs().max()))
        ends = (off <= 32 * eps * scale).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else len(main)
        done = bool(ends) or length == size
        exhausted = exhausted and done
        residuals = off[:length].tolist()
        if done:
            residuals[-1] = 0.0
        runs.append(Tridiagonal(tuple(main[:length].tolist()), tuple(residuals)))
        if scale:
            asymmetry = max(asymmetry, float(stray[:length].max()) / scale)
    return runs, exhausted, asymmetry


def _non_finite(step: int) -> str:
    return (
        f"Hessian-vector product {step} is not finite: the loss, its gradient or its second derivative "
        "is nan or inf at these parameters and this batch."
    )


def start_vector(shape: Sequence[int], like: Tensor, seed: int = 0) -> Tensor:
    """Draw the start vector of a run, without touching any global random state.

    Args:
        shape: Its shape, ``(*batch, n)``.
        like: Tensor whose dtype and device it takes.
        seed: Seed; the vector is drawn on the CPU, so it is the same on every device and rank.

    Returns:
        A standard normal vector.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(like)
