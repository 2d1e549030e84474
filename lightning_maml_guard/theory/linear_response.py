"""How an optimizer responds to a linear gradient: which rates keep an eigendirection from growing.

Along an eigenvector with eigenvalue ``mu`` the gradient is ``g = mu * theta``. Every optimizer in
``optim.stability_limits`` then steps as

    v <- m*v + g,    theta <- (1 - beta*w)*theta - beta*(direct*g + buffered*v)

with momentum ``m`` and decoupled weight decay ``w``. The direction shrinks iff both roots of

    z^2 - ((1 - beta*w) + m - beta*mu*(direct + buffered))*z + m*(1 - beta*w) - beta*mu*direct*m

lie inside the unit circle (Schur and Cohn; here also for complex ``mu``, the eigenvalues of a Jacobian that is not
symmetric).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_GRID = 4096


@dataclass(frozen=True)
class Response:
    """Linear response of an optimizer.

    Attributes:
        momentum: ``m``, the share of the buffer that is kept.
        direct: Weight of the gradient itself in the step.
        buffered: Weight of the buffer, which includes the current gradient.
    """

    momentum: float = 0.0
    direct: float = 1.0
    buffered: float = 0.0

    @property
    def limit(self) -> float:
        """Stability limit ``c``: for real ``mu``, stable iff ``beta*mu < c`` (beyond it a root crosses ``z = -1``)."""
        return 2 * (1 + self.momentum) / (self.direct * (1 + self.momentum) + self.buffered)

    def largest_rate(self, eigenvalue: complex, decay: float = 0.0) -> float:
        """Compute the largest stable rate along one eigendirection with decoupled weight decay ``w``.

        Real eigenvalues: ``2 / (w + 2*mu/c)``. Complex ones: ``2 Re(mu)/|mu|^2`` without momentum, else by bisection of
        the Schur-Cohn condition. ``inf`` without a finite limit; 0 if a complex pair is unstable at every rate.
        """
        real, imaginary = float(eigenvalue.real), abs(float(eigenvalue.imag))
        if imaginary == 0:
            slope = decay + 2 * max(real, 0.0) / self.limit
            return 2 / slope if slope > 0 else math.inf
        if self.momentum == 0 and decay == 0:
            return max(2 * real / abs(eigenvalue) ** 2 / (self.direct + self.buffered), 0.0)
        highest = 4 * self.largest_rate(complex(abs(eigenvalue)), decay)
        grid = highest * np.geomspace(1e-8, 1.0, _GRID)
        outside = ~self._contracts(grid, complex(real, imaginary), decay)
        first = int(outside.argmax())
        if not outside.any() or first == 0:
            return 0.0 if first == 0 and outside.any() else highest
        low, high = grid[first - 1], grid[first]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (
                (middle, high)
                if self._contracts(np.array([middle]), complex(real, imaginary), decay)[0]
                else (low, middle)
            )
        return float(low)

    def _contracts(self, rate: np.ndarray, eigenvalue: complex, decay: float) -> np.ndarray:
        kept = 1 - rate * decay
        pull = rate * eigenvalue
        total = kept + self.momentum - pull * (self.direct + self.buffered)
        product = self.momentum * (kept - pull * self.direct)
        return np.abs(total - product * total.conj()) < 1 - np.abs(product) ** 2

    def contraction(self, z: float, steps: int) -> float:
        """Compute what is left of an error of 1 after some steps at ``z = beta*mu``, the buffer being 0 at first."""
        error, buffer = 1.0, 0.0
        for _ in range(steps):
            buffer = self.momentum * buffer + error
            error -= z * (self.direct * error + self.buffered * buffer)
        return error

    def mean_square_rate(self, mean: float, variance: float) -> float:
        """Compute the largest rate at which the mean square shrinks if the curvature is redrawn at every step.

        With its mean ``a`` and variance ``V``: ``2a/(a^2 + V)`` without momentum and ``2/(a/(1+m) + V/(a(1-m)))`` with
        heavy-ball momentum (per unit of gain); in general by bisection of the spectral radius of the second moments'
        recursion. 0 if the mean is not positive.
        """
        if mean <= 0:
            return 0.0
        if variance == 0:
            return self.largest_rate(complex(mean))
        if self.direct == 0 or self.momentum == 0:
            gain = self.direct + self.buffered
            slope = mean / (1 + self.momentum) + variance / (mean * (1 - self.momentum))
            return 2 / slope / gain
        low, high = 0.0, self.largest_rate(complex(mean))
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._second_moment(middle, mean, variance) < 1 else (low, middle)
        return low

    def _second_moment(self, rate: float, mean: float, variance: float) -> float:
        """Spectral radius of the recursion of ``E[s s^T]``, ``s = (theta, v)``."""

        def transition(curvature: float) -> np.ndarray:
            added = rate * (self.direct + self.buffered) * curvature
            return np.array([[1 - added, -rate * self.buffered * self.momentum], [curvature, self.momentum]])

        average, part = transition(mean), transition(1.0) - transition(0.0)
        moments = np.kron(average, average) + variance * np.kron(part, part)
        return float(np.abs(np.linalg.eigvals(moments)).max())
