"""Lanczos on the device.

Full reorthogonalisation keeps the basis orthonormal, so that the Rayleigh-Ritz identities of the theory hold to
rounding (Golub and Van Loan, "Matrix Computations", section 10.3). The coefficients stay on the device and come to the
host once every few steps.

A basis in bfloat16 is rounded, so that ``A V = V T + r e_m^T + F`` and ``V^T V = I + D`` with ``F`` and ``D`` that are
not 0. Both are measured: a column of ``F`` is what rounding took from a vector times the norm it had
(``|r_j| * |v - v_rounded|``) plus the coefficients that ``T`` has no place for; an entry of ``D`` is the product of two
basis vectors. An eigenvalue of ``T`` then holds to ``|r| |y_m| + (1 + 2|D|) |F| + |D| |r| + |D|^2 |A|`` instead of
``|r| |y_m|``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.linalg.krylov_basis import Basis
from lightning_maml_guard.linalg.layout import WHOLE, Space

Matvec = Callable[[Tensor], Tensor]
# The name of a scalar and the scalar; it comes to the host with the coefficients and must be finite.
Watched = tuple[str, Tensor]
# On a CPU transfers cost nothing, and calling `stop` more often saves products.
_SYNC_ON_HOST, _SYNC_ON_DEVICE = 1, 4


class NonFiniteProductError(ArithmeticError):
    """A loss or a matrix-vector product is ``nan`` or ``inf``: the curvature cannot be measured here."""


def check_finite(value: Watched) -> None:
    """Raise a NonFiniteProductError if a scalar that no run watches is not finite."""
    check_value(value[0], float(value[1]))


class Tridiagonal(NamedTuple):
    """One Lanczos run as plain numbers.

    Attributes:
        diagonal: Diagonal of ``T``, length ``m``.
        off_diagonal: Off-diagonal of ``T``, then the norm of the last residual, length ``m``.
    """

    diagonal: tuple[float, ...]
    off_diagonal: tuple[float, ...]


class LanczosRun(NamedTuple):
    """Result of :func:`lanczos`.

    Attributes:
        runs: One tridiagonal per matrix of the batch (one in all for a single matrix).
        basis: Orthonormal Lanczos vectors.
        matvecs: Number of matrix-vector products.
        converged: True if ``stop`` was met, or the Krylov space exhausted, within ``max_iter`` steps.
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


def lanczos(
    matvec: Matvec,
    start: Tensor,
    *,
    max_iter: int,
    stop: Callable[[Sequence[Tridiagonal]], bool] | None = None,
    basis: str = "device",
    value: Watched | None = None,
    space: Space = WHOLE,
    after: Callable[[Basis], None] | None = None,
) -> LanczosRun:
    """Run Lanczos from start vectors of shape ``(*batch, n)`` on a symmetric matrix, or on a batch of them at once.

    After ``m`` steps ``A V = V T + r e_m^T`` with ``V^T V = I``; in exact arithmetic every eigenvalue ``theta`` of
    ``T`` with eigenvector ``y`` has an eigenvalue of ``A`` within ``|r| * |y_m|``. A Krylov space that is exhausted
    early (an invariant subspace) ends the run with residual 0.

    The start must be the same on every rank. ``stop`` is called with the tridiagonals so far, every few steps on a
    device, and ends the run with True. ``basis`` is a kind of :class:`~lightning_maml_guard.linalg.krylov_basis.Basis`.
    Raises a NonFiniteProductError if a product, or the watched ``value``, is not finite. In a ``space`` that is split
    over processes ``start`` and the products are the entries that lie here. ``after`` is called after each product,
    with the vectors so far.
    """
    rows = start.shape[-1] if space.rows is None else space.rows
    steps, sync_every = steps_of(rows, start, max_iter)
    kept = Basis(steps, start, basis, space)
    vector = start / space.norm(start)
    norm = start.new_zeros(start.shape[:-1])
    watched = [] if value is None else [value[1].to(norm.dtype).expand(norm.shape)]
    columns: list[Tensor] = []
    found = _Found([], False, 0.0, 0.0)
    converged = False
    for step in range(steps):
        vector, lost = kept.append(vector)
        product = matvec(vector)
        # A mode that the product needs would be asked about every operation here: half of their time.
        with torch._C.DisableTorchFunction():
            if after is not None:
                after(kept)
            rest = kept.without(product)
            # For a symmetric matrix all coefficients but the last two, the diagonal and the last norm, are 0.
            stray = rest.coefficients[:-1].clone()
            if step:
                stray[-1] -= norm
            column = [rest.coefficients[-1], stray.abs().amax(0) if step else torch.zeros_like(norm)]
            if not kept.exact:
                column += [lost * norm, torch.linalg.vector_norm(stray, dim=0), rest.overlap]
            norm, vector = unit(rest.vector, space)
            del rest, product  # in bfloat16 the basis keeps another copy
            columns.append(torch.stack([*column, *watched, norm]))
        if (step + 1) % sync_every == 0 or step + 1 == steps:
            with torch._C.DisableTorchFunction():
                found = _to_host(columns, rows, exact=kept.exact, value=value)
            converged = found.exhausted or (stop is not None and stop(found.runs))
            if converged:
                break
    return LanczosRun(found.runs, kept, len(columns), converged, found.asymmetry, found.rounding)


def steps_of(rows: int, start: Tensor, max_iter: int) -> tuple[int, int]:
    """Return the number of steps and of steps between two transfers; raise a ValueError if there are none."""
    if rows == 0 or max_iter < 1:
        raise ValueError(
            "Expected a start vector with at least one entry and `max_iter` of at least 1 but got "
            f"shape {tuple(start.shape)}, max_iter={max_iter!r}."
        )
    return min(max_iter, rows), _SYNC_ON_HOST if start.device.type == "cpu" else _SYNC_ON_DEVICE


def unit(rest: Tensor, space: Space = WHOLE) -> tuple[Tensor, Tensor]:
    """Split vectors, which are overwritten, into their norms and their directions; 0 where the norm is 0."""
    norm = space.norm(rest)
    # The squares of tiny entries, as of a network with dead units, underflow; such a norm would give any length.
    tiny = torch.finfo(norm.dtype).tiny
    largest = space.largest(_largest(rest)).clamp(min=tiny)
    divisor = torch.where(norm < tiny**0.5, largest, torch.ones_like(norm))
    rest /= divisor
    length = space.norm(rest)
    rest /= length.clamp(min=tiny**0.5)
    return (divisor * length).squeeze(-1), rest


def _largest(rest: Tensor) -> Tensor:
    """The largest entries in size; 0 where there is no entry."""
    if not rest.shape[-1]:
        return rest.new_zeros((*rest.shape[:-1], 1))
    return torch.linalg.vector_norm(rest, ord=torch.inf, dim=-1, keepdim=True)


class _Found(NamedTuple):
    runs: list[Tridiagonal]
    exhausted: bool
    asymmetry: float
    rounding: float


def _to_host(columns: list[Tensor], size: int, *, exact: bool, value: Watched | None) -> _Found:
    """Bring the coefficients to the host in one transfer, and cut each run where its space is exhausted."""
    eps = torch.finfo(columns[0].dtype).eps
    host = torch.stack(columns, 1).double().reshape(len(columns[0]), len(columns), -1).cpu().numpy()
    if value is not None:
        check_value(value[0], float(host[-2, 0, 0]))
    if not np.isfinite(host).all():
        raise NonFiniteProductError(non_finite(int((~np.isfinite(host)).any(-1).any(0).argmax()) + 1))
    runs, exhausted, asymmetry, rounding = [], True, 0.0, 0.0
    for column in range(host.shape[-1]):
        main, off, stray = host[0, :, column], host[-1, :, column], host[1, :, column]
        scale = max(float(np.abs(main).max()), float(np.abs(off).max()))
        ends = np.flatnonzero(off <= 32 * eps * scale).tolist()
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
            lost, spread, overlap = np.linalg.norm(host[2:5, :length, column], axis=-1).tolist()
            gap = 2**0.5 * overlap
            spill = (1 + 2 * gap) * (lost + spread) + (last if done else gap * last)
            rounding = max(rounding, spill / scale + gap**2)
    return _Found(runs, exhausted, asymmetry, rounding)


def check_value(name: str, value: float) -> None:
    """Raise a NonFiniteProductError if a number is not finite."""
    if not math.isfinite(value):
        raise NonFiniteProductError(f"{name} is {value} at these parameters and this batch.")


def non_finite(step: int) -> str:
    return (
        f"Hessian-vector product {step} is not finite: the loss, its gradient or its second derivative "
        "is nan or inf at these parameters and this batch."
    )


def start_vector(shape: Sequence[int], like: Tensor, seed: int = 0) -> Tensor:
    """Draw standard normal start vectors, as :meth:`Space.start` does, that lie here as a whole."""
    return WHOLE.start(shape, like, seed)
