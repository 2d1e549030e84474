"""Arnoldi on the device, for matrices that need not be symmetric."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.linalg.krylov_basis import Basis
from lightning_maml_guard.linalg.lanczos import (
    Matvec,
    NonFiniteProductError,
    Watched,
    check_value,
    non_finite,
    steps_of,
    unit,
)
from lightning_maml_guard.linalg.layout import WHOLE, Space


class ArnoldiRun(NamedTuple):
    """Result of :func:`arnoldi`.

    Attributes:
        hessenberg: Projection ``V^T A V``, shape ``(m, m)``, on the host.
        residual: Norm of what the last product left outside the space.
        basis: Orthonormal vectors, one for each row of ``hessenberg``.
        matvecs: Number of matrix-vector products.
        spill: What a basis in bfloat16 adds to the residual of every Ritz vector; else 0.
    """

    hessenberg: np.ndarray
    residual: float
    basis: Basis
    matvecs: int
    spill: float


def arnoldi(
    matvec: Matvec,
    start: Tensor,
    *,
    max_iter: int,
    stop: Callable[[np.ndarray, float], bool] | None = None,
    basis: str = "device",
    value: Watched | None = None,
    space: Space = WHOLE,
) -> ArnoldiRun:
    """Run Arnoldi from a start vector of shape ``(n,)``.

    After ``m`` steps ``A V = V H + r e_m^T`` with ``V^T V = I`` (Saad, "Numerical Methods for Large Eigenvalue
    Problems", section 6.2). ``stop`` is called with ``H`` and the residual's norm; the other arguments are those of
    :func:`~lightning_maml_guard.linalg.lanczos.lanczos`.
    """
    rows = start.shape[-1] if space.rows is None else space.rows
    steps, sync_every = steps_of(rows, start, max_iter)
    kept = Basis(steps, start, basis, space)
    # The last three rows: what rounding took from each vector, the overlaps, and the watched value.
    hessenberg = start.new_zeros((steps + 4, steps))
    if value is not None:
        hessenberg[-1] = value[1]
    vector = start / space.norm(start)
    norm = start.new_zeros(())
    found, residual, spill = np.zeros((0, 0)), 0.0, 0.0
    eps = torch.finfo(start.dtype).eps
    for step in range(steps):
        vector, lost = kept.append(vector)
        rest = kept.without(matvec(vector))
        hessenberg[-3, step], hessenberg[-2, step] = lost * norm, rest.overlap
        norm, vector = unit(rest.vector, space)
        hessenberg[: step + 1, step] = rest.coefficients
        hessenberg[step + 1, step] = norm
        del rest  # in bfloat16 the basis keeps another copy
        if (step + 1) % sync_every == 0 or step + 1 == steps:
            host = hessenberg[:, : step + 1].double().cpu().numpy()
            if value is not None:
                check_value(value[0], float(host[-1, 0]))
            if not np.isfinite(host).all():
                raise NonFiniteProductError(non_finite(int((~np.isfinite(host)).any(0).argmax()) + 1))
            square = host[: step + 2]
            below = np.diagonal(square, -1)
            ends = np.flatnonzero(below <= 32 * eps * np.abs(square).max())
            length = int(ends[0]) + 1 if ends.size else step + 1
            done = bool(ends.size) or length == rows
            found, residual = square[:length, :length], 0.0 if done else float(below[length - 1])
            gap = 2**0.5 * float(np.linalg.norm(host[-2, :length]))
            gone = float(below[length - 1]) if done and not kept.exact else 0.0
            spill = (1 + 2 * gap) * float(np.linalg.norm(host[-3, :length])) + gap * residual + gone
            if done or (stop is not None and stop(found, residual)):
                break
    kept.length = len(found)
    return ArnoldiRun(found, residual, kept, step + 1, spill)
