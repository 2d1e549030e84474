"""Stochastic Lanczos quadrature against matrices whose eigenvalues are known."""

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from lightning_maml_guard.linalg.density import spectral_density


def matrix(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))[0]
    return basis @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ basis.T


def test_moments_are_the_traces():
    """Full runs make the quadrature exact for each probe: only the probes' own scatter is left."""
    values = np.linspace(-1, 3, 30)
    a = matrix(values)
    found = spectral_density(lambda v: a @ v, 30, a, probes=60, steps=30)
    assert found.weights.sum() == pytest.approx(1.0)
    for power in (1, 2, 3):
        exact = (values**power).mean()
        assert (found.weights * found.nodes**power).sum() == pytest.approx(
            exact, abs=0.06 * (np.abs(values) ** power).max()
        )


def test_one_probes_quadrature_is_exact_for_low_moments():
    values = np.random.default_rng(0).normal(size=40)
    a = matrix(values)
    found = spectral_density(lambda v: a @ v, 40, a, probes=1, steps=5, seed=3)
    signs = (torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(3)) * 2 - 1).double()
    for power in range(10):  # m steps are exact up to degree 2m - 1
        exact = float(signs @ torch.linalg.matrix_power(a, power) @ signs) / 40
        assert (found.weights * found.nodes**power).sum() == pytest.approx(exact, rel=1e-9)


def test_shares_of_a_bulk_and_outliers():
    values = [0.0] * 90 + [1.0] * 8 + [10.0, 20.0]
    a = matrix(values)
    found = spectral_density(lambda v: a @ v, 100, a, probes=50, steps=20)
    assert found.weights[found.nodes <= 0.5].sum() == pytest.approx(0.9, abs=0.02)
    assert found.nodes.max() == pytest.approx(20.0)
    grid = np.linspace(-5, 25, 4000)
    curve = found.smooth(grid, 0.3)
    assert trapezoid(curve, grid) == pytest.approx(1.0, rel=1e-3) and grid[curve.argmax()] == pytest.approx(0, abs=0.05)


def test_what_is_not_allowed_is_said():
    a = torch.eye(3)
    with pytest.raises(ValueError, match="`size`, `probes` and `steps` to be at least 1 but got 3, 0, 60"):
        spectral_density(lambda v: a @ v, 3, a, probes=0)
    with pytest.raises(ValueError, match="`width` to be a number above 0 but got 0"):
        spectral_density(lambda v: a @ v, 3, a).smooth(np.zeros(1), 0)
