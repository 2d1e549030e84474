"""Lanczos and Arnoldi on the device: algorithms that take a matvec and nothing else.

Full reorthogonalisation keeps the basis orthonormal, so that the Rayleigh-Ritz identities the theory uses
hold to rounding (Golub and Van Loan, "Matrix Computations", section 10.3). The coefficients stay on the
device and come to the host once every few steps.

A basis in bfloat16 is rounded, so that ``A V = V T + r e_m^T + F`` and ``V^T V = I + D`` with ``F`` and ``D`` that are
not 0. Both are measured on the way: a column of ``F`` is what rounding took from a vector times the norm it had
(``|r_j| * |v - v_rounded|``) and the coefficients that ``T`` has no place for, an entry of ``D`` the product of two
basis vectors. An eigenvalue of ``T`` then holds to ``|r| |y_m| + (1 + 2|D|) |F| + |D| |r| + |D|^2 |A|`` instead of
``|r| |y_m|``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.curvature.basis import Basis

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
        basis: Orthonormal Lanczos vectors.
        matvecs: Products used.
        converged: Whether ``stop`` was met (or the Krylov space is exhausted) within ``max_iter`` steps.
        asymmetry: Largest ``|v_i.(A v_j) - v_j.(A v_i)|`` over the products, relative to the spectral radius seen:
            rounding for one symmetric matrix, more if the operator is not symmetric or changes between products.
        rounding: What a basis in bfloat16 adds to every residual bound, relative to the spectral radius seen; else 0.
    """

    runs: list[Tridiagonal]
    basis: Basis
    matvecs: int
    converged: bool
    asymmetry: float
    rounding: float


class ArnoldiRun(NamedTuple):
    """What :func:`arnoldi` found.

    Attributes:
        hessenberg: Projection ``V^T A V``, shape ``(m, m)``, on the host.
        residual: Norm of what the last product left outside the space.
        basis: Orthonormal vectors; as many as ``hessenberg`` has rows count.
        matvecs: Products used.
        spill: What a basis in bfloat16 adds to the residual of every Ritz vector; else 0.
    """

    hessenberg: np.ndarray
    residual: float
    basis: Basis
    matvecs: int
    spill: float


def lanczos(
    matvec: Matvec,
    start: Tensor,
    *,
    max_iter: int,
    stop: Callable[[Sequence[Tridiagonal]], bool] | None = None,
    sync_every: int = 4,
    basis: str = "device",
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
        basis: Where the vectors are kept, see :class:`~lightning_maml_guard.curvature.basis.Basis`.

    Returns:
        The run. A Krylov space that is exhausted early (an invariant subspace) ends it, with residual 0.

    Raises:
        ValueError: If there is nothing to iterate on.
        NonFiniteProductError: If a product is not finite.
    """
    steps = _steps(start, max_iter, sync_every)
    kept = Basis(steps, start, basis)
    vector = start / torch.linalg.vector_norm(start, dim=-1, keepdim=True)
    norm = torch.zeros_like(start[..., 0])
    columns: list[Tensor] = []
    found = _Found([], False, 0.0, 0.0)
    converged = False
    for step in range(steps):
        vector, lost = kept.append(vector)
        rest = kept.without(matvec(vector))
        # In a symmetric matrix's row only the diagonal and its neighbour, the last norm, differ from 0.
        stray = rest.coefficients[:-1].clone()
        if step:
            stray[-1] -= norm
        column = [rest.coefficients[-1], stray.abs().amax(0) if step else torch.zeros_like(norm)]
        if not kept.exact:
            column += [lost * norm, torch.linalg.vector_norm(stray, dim=0), rest.overlap]
        norm, vector = _unit(rest.vector)
        columns.append(torch.stack([*column, norm]))
        if (step + 1) % sync_every == 0 or step + 1 == steps:
            found = _to_host(columns, start.shape[-1], exact=kept.exact)
            converged = found.exhausted or (stop is not None and stop(found.runs))
            if converged:
                break
    return LanczosRun(found.runs, kept, len(columns), converged, found.asymmetry, found.rounding)


def arnoldi(
    matvec: Matvec,
    start: Tensor,
    *,
    max_iter: int,
    stop: Callable[[np.ndarray, float], bool] | None = None,
    sync_every: int = 4,
    basis: str = "device",
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
        basis: Where the vectors are kept, see :class:`~lightning_maml_guard.curvature.basis.Basis`.

    Returns:
        The run.

    Raises:
        ValueError: If there is nothing to iterate on.
        NonFiniteProductError: If a product is not finite.
    """
    steps = _steps(start, max_iter, sync_every)
    kept = Basis(steps, start, basis)
    hessenberg = start.new_zeros((steps + 3, steps))  # its last two rows are what rounding lost, and the overlaps
    vector = start / torch.linalg.vector_norm(start)
    norm = torch.zeros_like(start[0])
    found, residual, spill = np.zeros((0, 0)), 0.0, 0.0
    eps = torch.finfo(start.dtype).eps
    for step in range(steps):
        vector, lost = kept.append(vector)
        rest = kept.without(matvec(vector))
        hessenberg[-2, step], hessenberg[-1, step] = lost * norm, rest.overlap
        norm, vector = _unit(rest.vector)
        hessenberg[: step + 1, step] = rest.coefficients
        hessenberg[step + 1, step] = norm
        if (step + 1) % sync_every == 0 or step + 1 == steps:
            host = hessenberg[:, : step + 1].double().cpu().numpy()
            if not np.isfinite(host).all():
                raise NonFiniteProductError(_non_finite(int((~np.isfinite(host)).any(0).argmax()) + 1))
            square = host[: step + 2]
            below = np.diagonal(square, -1)
            ends = np.flatnonzero(below <= 32 * eps * np.abs(square).max())
            length = int(ends[0]) + 1 if ends.size else step + 1
            done = bool(ends.size) or length == start.shape[-1]
            found, residual = square[:length, :length], 0.0 if done else float(below[length - 1])
            gap = 2**0.5 * float(np.linalg.norm(host[-1, :length]))
            gone = float(below[length - 1]) if done and not kept.exact else 0.0
            spill = (1 + 2 * gap) * float(np.linalg.norm(host[-2, :length])) + gap * residual + gone
            if done or (stop is not None and stop(found, residual)):
                break
    kept.length = len(found)
    return ArnoldiRun(found, residual, kept, step + 1, spill)


def _steps(start: Tensor, max_iter: int, sync_every: int) -> int:
    if start.shape[-1] == 0 or max_iter < 1 or sync_every < 1:
        raise ValueError(
            "Expected a start vector with at least one entry and `max_iter`, `sync_every` of at least 1 but got "
            f"shape {tuple(start.shape)}, max_iter={max_iter!r}, sync_every={sync_every!r}."
        )
    return min(max_iter, start.shape[-1])


def _unit(rest: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and direction of a working copy, which is overwritten."""
    norm = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
    # The squares of a rest as small as a dead network's underflow: divided by that norm it would be of any length.
    tiny = torch.finfo(norm.dtype).tiny
    largest = torch.linalg.vector_norm(rest, ord=torch.inf, dim=-1, keepdim=True).clamp(min=tiny)
    divisor = torch.where(norm < tiny**0.5, largest, torch.ones_like(norm))
    rest /= divisor
    length = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
    rest /= length.clamp(min=tiny**0.5)
    return (divisor * length).squeeze(-1), rest


class _Found(NamedTuple):
    runs: list[Tridiagonal]
    exhausted: bool
    asymmetry: float
    rounding: float


def _to_host(columns: list[Tensor], size: int, *, exact: bool) -> _Found:
    """Bring the coefficients to the host in one transfer, each run cut where its space is exhausted."""
    eps = torch.finfo(columns[0].dtype).eps
    host = torch.stack(columns, 1).double().reshape(len(columns[0]), len(columns), -1).cpu()
    if not bool(torch.isfinite(host).all()):
        raise NonFiniteProductError(_non_finite(int((~torch.isfinite(host)).any(-1).any(0).nonzero()[0]) + 1))
    runs, exhausted, asymmetry, rounding = [], True, 0.0, 0.0
    for column in range(host.shape[-1]):
        main, off, stray = host[0, :, column], host[-1, :, column], host[1, :, column]
        scale = max(float(main.abs().max()), float(off.abs().max()))
        ends = (off <= 32 * eps * scale).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else len(main)
        done = bool(ends) or length == size
        exhausted = exhausted and done
        residuals = off[:length].tolist()
        last = residuals[-1]
        if done:
            residuals[-1] = 0.0
        runs.append(Tridiagonal(tuple(main[:length].tolist()), tuple(residuals)))
        if scale:
            asymmetry = max(asymmetry, float(stray[:length].max()) / scale)
        if scale and not exact:
            lost, spread, overlap = torch.linalg.vector_norm(host[2:-1, :length, column], dim=-1).tolist()
            gap = 2**0.5 * overlap
            spill = (1 + 2 * gap) * (lost + spread) + (last if done else gap * last)
            rounding = max(rounding, spill / scale + gap**2)
    return _Found(runs, exhausted, asymmetry, rounding)


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
