"""Where eigenvalues that a Krylov run has not found may still lie, if its start vector was random.

A residual says that *an* eigenvalue is near a Ritz value, not that there is none elsewhere. After ``m`` steps with
norms ``b_1 .. b_m`` the characteristic polynomial ``p`` of the projection has ``|p(A) v_1| = b_1 * .. * b_m``. For an
eigenvalue ``mu`` with left eigenvector ``w`` of length 1, ``w.p(A) v_1 = p(mu) w.v_1``. Of a start that is uniform on
the sphere, ``|w.v_1|`` is below ``delta/sqrt(n)`` with a probability of at most ``delta``, and else

    |p(mu)| <= b_1 * .. * b_m * sqrt(n) / delta,

a region around the Ritz values that is a few points where they have converged, and empty in between (van Dorsselaer,
Hochstenbach and van der Vorst, "Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with the
Lanczos method", SIAM J. Matrix Anal. Appl. 22, 2001; the argument needs no symmetry). Levels are logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Probability with which a start vector may have missed an eigenvector.
_MISSED = 0.05
# The same where one number, the largest eigenvalue, is to hold in all runs but one of some thousand: a run that ends as
# soon as this bound allows has no other.
RARE = 0.0005
# So many distances are multiplied before a logarithm is taken: few enough not to underflow.
_FACTORS = 8


def inclusion_level(norms: Sequence[float] | np.ndarray, size: int, missed: float = _MISSED) -> float:
    """Logarithm of the largest ``|p(mu)|`` that a run with these norms allows; ``-inf`` if its space is exhausted."""
    with np.errstate(divide="ignore"):
        return float(np.log(np.abs(norms)).sum()) + math.log(math.sqrt(size) / missed)


def largest_hidden(values: np.ndarray, level: float) -> float:
    """Largest real number that the region around real Ritz values allows as an eigenvalue."""
    top = float(values.max())
    if level == -math.inf:
        return top
    low, high = 0.0, math.exp(min(level / len(values), 700.0)) + float(np.ptp(values))
    below = (top - values).tolist()  # plain numbers: a check asks after every product, and arrays of few cost more
    for _ in range(30):
        middle = (low + high) / 2
        allowed = middle == 0 or sum(math.log(distance + middle) for distance in below) <= level
        low, high = (middle, high) if allowed else (low, middle)
    return top + high


def distance_to_hidden(values: np.ndarray, level: float, point: float) -> float:
    """Distance from ``point`` to the nearest real number that the region around real Ritz values allows."""
    if _allows(values, level, point):
        return 0.0
    distance = math.inf
    for side in (values[values > point], values[values < point]):
        if not side.size:
            continue
        # The logarithm of the polynomial is concave between Ritz values: on the way to the next it falls to the level
        # once.
        reach = float(side[np.abs(side - point).argmin()]) - point
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if _allows(values, level, point + middle * reach) else (middle, high)
        distance = min(distance, low * abs(reach))
    return distance


def _allows(values: np.ndarray, level: float, point: float) -> bool:
    with np.errstate(divide="ignore"):
        return bool(np.log(np.abs(point - values)).sum() <= level)


def hidden_radii(values: np.ndarray, level: float) -> np.ndarray:
    """How far from each Ritz value the region reaches, where it is an island; shape ``(m,)``."""
    gaps = np.sort(np.abs(values[:, None] - values), axis=1)
    with np.errstate(divide="ignore"):
        logs = np.log(gaps[:, 1:])
    # The s nearest are at the distance r itself: r^s times the distances of the others is the level.
    rest = np.concatenate([np.cumsum(logs[:, ::-1], axis=1)[:, ::-1], np.zeros((len(values), 1))], axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        radii = np.exp((level - rest) / np.arange(1, len(values) + 1))
    return np.nan_to_num(radii, nan=np.inf).min(axis=1)


def outermost(values: np.ndarray, level: float, angles: np.ndarray, least: float) -> np.ndarray:
    """Largest modulus of at least ``least`` that the region allows in each direction; 0 where there is none."""
    if level == -math.inf:
        return np.zeros(len(angles))
    directions = np.exp(1j * angles)
    farthest = 1.01 * (float(np.abs(values).max()) + math.exp(min(level / len(values), 700.0)))

    def inside(moduli: np.ndarray) -> np.ndarray:
        points, found = moduli / farthest * directions, np.zeros(moduli.shape)
        with np.errstate(divide="ignore"):
            for start in range(0, len(values), _FACTORS):
                factors = np.ones(moduli.shape)
                for value in values[start : start + _FACTORS] / farthest:
                    factors *= np.abs(points - value)
                found += np.log(factors)
        return found <= level - len(values) * math.log(farthest)

    coarse = np.geomspace(least, farthest, 1 + max(int(math.log(farthest / least) / 0.03), 1))
    # The Ritz values themselves, so that no island around one lies between two steps.
    steps = np.unique(np.concatenate([coarse, np.clip(np.abs(values), least, farthest)]))
    allowed = inside(np.broadcast_to(steps[:, None], (len(steps), len(angles))))
    last = len(steps) - 1 - allowed[::-1].argmax(axis=0)
    low, high = steps[last], steps[np.minimum(last + 1, len(steps) - 1)]
    for _ in range(20):
        middle = (low + high) / 2
        reached = inside(middle)
        low, high = np.where(reached, middle, low), np.where(reached, high, middle)
    return np.where(allowed.any(axis=0), high, 0.0)
