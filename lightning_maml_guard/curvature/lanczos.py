"""Lanczos on the device: an algorithm that takes a matvec and nothing else.

Full reorthogonalisation keeps the basis orthonormal, so that the Rayleigh-Ritz identities the theory uses
hold to rounding (Golub and Van Loan, "Matrix Computations", section 10.3). The coefficients stay on the
device and come to the host once every few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
    """

    runs: list[Tridiagonal]
    basis: Tensor
    matvecs: int
    converged: bool


def lanczos(
    matvec: Callable[[Tensor], Tensor],
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
    size = start.shape[-1]
    if size == 0 or max_iter < 1 or sync_every < 1:
        raise ValueError(
            "Expected a start vector with at least one entry and `max_iter`, `sync_every` of at least 1 but got "
            f"shape {tuple(start.shape)}, max_iter={max_iter!r}, sync_every={sync_every!r}."
        )
    steps = min(max_iter, size)
    batch = start.shape[:-1]
    tiny = torch.finfo(start.dtype).tiny
    basis = start.new_zeros((steps, *start.shape))
    vector = start / torch.linalg.vector_norm(start, dim=-1, keepdim=True)
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    runs: list[Tridiagonal] = []
    converged = False
    for step in range(steps):
        basis[step] = vector
        product = matvec(vector)
        diagonal.append((vector * product).sum(-1))
        known = basis[: step + 1]
        # Twice is enough (Kahan, Parlett): the second pass removes what rounding left of the first.
        for _ in range(2):
            product = product - ((known * product).sum(-1, keepdim=True) * known).sum(0)
        norm = torch.linalg.vector_norm(product, dim=-1)
        off_diagonal.append(norm)
        vector = product / norm.clamp(min=tiny).unsqueeze(-1)
        if (step + 1) % sync_every == 0 or step + 1 == steps:
            runs, exhausted = _to_host(diagonal, off_diagonal, batch, size)
            converged = exhausted or (stop is not None and stop(runs))
            if converged:
                break
    return LanczosRun(runs, basis[: len(diagonal)], len(diagonal), converged)


def _to_host(
    diagonal: list[Tensor], off_diagonal: list[Tensor], batch: torch.Size, size: int
) -> tuple[list[Tridiagonal], bool]:
    """Bring the coefficients to the host in one transfer, each run cut where its space is exhausted."""
    pair = torch.stack([torch.stack(diagonal), torch.stack(off_diagonal)]).double().reshape(2, len(diagonal), -1)
    host = pair.cpu()
    if not bool(torch.isfinite(host).all()):
        step = int((~torch.isfinite(host)).any(-1).any(0).nonzero()[0]) + 1
        raise NonFiniteProductError(
            f"Hessian-vector product {step} is not finite: the loss, its gradient or its second derivative "
            "is nan or inf at these parameters and this batch."
        )
    eps = torch.finfo(diagonal[0].dtype).eps
    runs, exhausted = [], True
    for column in range(host.shape[-1]):
        main, off = host[0, :, column], host[1, :, column]
        scale = max(float(main.abs().max()), float(off.abs().max()))
        ends = (off <= 32 * eps * scale).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else len(main)
        done = bool(ends) or length == size
        exhausted = exhausted and done
        residuals = off[:length].tolist()
        if done:
            residuals[-1] = 0.0
        runs.append(Tridiagonal(tuple(main[:length].tolist()), tuple(residuals)))
    return runs, exhausted


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
