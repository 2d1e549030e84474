"""Density of a spectrum by stochastic Lanczos quadrature."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.linalg.lanczos import Matvec, lanczos


class SpectralDensity(NamedTuple):
    """The density of a spectrum as weighted points.

    Attributes:
        nodes: Ritz values of all probes, ascending, shape ``(m,)``.
        weights: Share of the eigenvalues that each node stands for, shape ``(m,)``; they sum to 1.
        size: Number of eigenvalues.
    """

    nodes: np.ndarray
    weights: np.ndarray
    size: int

    def smooth(self, at: np.ndarray, width: float) -> np.ndarray:
        """Evaluate the density as a sum of normal densities of standard deviation ``width``; its integral is 1."""
        if not width > 0:
            raise ValueError(f"Expected argument `width` to be a number above 0 but got {width!r}.")
        distance = (np.asarray(at)[:, None] - self.nodes) / width
        return (np.exp(-0.5 * distance**2) * self.weights).sum(1) / (width * (2 * np.pi) ** 0.5)


def spectral_density(
    matvec: Matvec, size: int, like: Tensor, *, probes: int = 8, steps: int = 60, seed: int = 0
) -> SpectralDensity:
    """Estimate the density of the eigenvalues of a symmetric matrix of ``size`` rows.

    Each probe ``v`` of independent signs starts a Lanczos run. Its Ritz values ``theta_k``, weighted by the squared
    first entries of their vectors, are Gauss quadrature nodes of ``v.f(A) v``, whose mean over probes is ``trace
    f(A)``. The error of a share falls with ``1/sqrt(probes * size)``. The vectors have the dtype and device of
    ``like``.

    Source: Ubaru, Chen, Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"; for networks
    Ghorbani, Krishnan, Xiao 2019.
    """
    if min(size, probes, steps) < 1:
        raise ValueError(f"Expected `size`, `probes` and `steps` to be at least 1 but got {size}, {probes}, {steps}.")
    generator = torch.Generator().manual_seed(seed)
    nodes, weights = [], []
    for _ in range(probes):
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        (run,) = lanczos(matvec, signs.to(like), max_iter=steps).runs
        off = np.array(run.off_diagonal[:-1])
        values, vectors = np.linalg.eigh(np.diag(run.diagonal) + np.diag(off, 1) + np.diag(off, -1))
        nodes.append(values)
        weights.append(vectors[0] ** 2 / probes)
    joined, shares = np.concatenate(nodes), np.concatenate(weights)
    order = joined.argsort()
    return SpectralDensity(joined[order], shares[order], size)
