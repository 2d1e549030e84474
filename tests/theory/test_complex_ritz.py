import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_maml_guard.linalg.arnoldi import arnoldi
from lightning_maml_guard.linalg.lanczos import NonFiniteProductError, start_vector
from lightning_maml_guard.theory.complex_ritz import complex_limit, complex_ritz
from lightning_maml_guard.theory.linear_response import Response

SGD = (Response(),)


def random_matrix(seed, n, skew):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    noise = rng.standard_normal((n, n))
    return basis @ np.diag(np.concatenate([rng.uniform(0.1, 1, n - 3), [3.0, 4.0, 6.0]])) @ basis.T + skew * (
        noise - noise.T
    )


def run(matrix, max_iter):
    matrix = torch.as_tensor(matrix)
    return arnoldi(lambda v: matrix @ v, start_vector((len(matrix),), matrix), max_iter=max_iter)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_arnoldi_is_exact_on_a_full_space_and_keeps_its_identity(seed, n):
    matrix = np.random.default_rng(seed).standard_normal((n, n))
    found = run(matrix, n)
    basis = found.basis.dense().numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-10)
    np.testing.assert_allclose(basis @ matrix @ basis.T, found.hessenberg, atol=1e-9 * np.abs(matrix).max() * n)
    if len(basis) == n:
        assert found.residual == 0.0
        np.testing.assert_allclose(
            np.sort(np.abs(complex_ritz(found.hessenberg, 0.0).values)),
            np.sort(np.abs(np.linalg.eigvals(matrix))),
            rtol=1e-6,
        )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("skew", [0.0, 0.02, 0.1])
def test_the_limit_of_the_whole_spectrum_lies_in_the_interval(seed, skew):
    matrix = random_matrix(seed, 60, skew)
    true = [2 * mu.real / abs(mu) ** 2 for mu in np.linalg.eigvals(matrix) if mu.real > 0 and abs(mu) > 0.06]
    found = run(matrix, 40)
    limit = complex_limit(complex_ritz(found.hessenberg, found.residual), SGD, tol=1e-2)
    assert limit.interval[0] * (1 - 1e-9) <= min(true) <= limit.interval[1] * (1 + 1e-9)
    assert limit.rate == pytest.approx(min(true), rel=2e-2)


def test_a_rotation_decides_where_the_modulus_would_not():
    """mu = 1 +- 2i allows beta < .4, the larger real 3 allows beta < .667."""
    block = np.zeros((3, 3))
    block[0, 0], block[1:, 1:] = 3.0, [[1.0, 2.0], [-2.0, 1.0]]
    limit = complex_limit(complex_ritz(block, 0.0), SGD, tol=1e-2)
    assert limit.rate == pytest.approx(0.4)
    assert limit.interval == pytest.approx((0.4, 0.4))


def test_what_is_not_known_is_not_resolved():
    limit = complex_limit(complex_ritz(np.diag([1.0, 3.0]), 2.0), SGD, tol=1e-2)
    assert limit.interval == (0.0, 2.0)  # the eigenvalue 1 is known and allows no more than 2


def test_negative_directions_stay_out_and_leave_no_limit():
    limit = complex_limit(complex_ritz(np.diag([-1.0, -3.0]), 0.0), SGD, tol=1e-2)
    assert limit.rate == math.inf and limit.index is None


def test_a_defective_projection_bounds_nothing():
    ritz = complex_ritz(np.array([[1.0, 1.0], [0.0, 1.0]]), 0.1)
    assert np.isinf(ritz.bounds[np.abs(ritz.vectors[-1]) > 0]).all()


@pytest.mark.parametrize("matrix", [np.zeros((0, 0)), np.zeros((2, 3)), np.full((2, 2), np.nan)])
def test_a_run_that_is_none_is_refused(matrix):
    with pytest.raises(ValueError, match="Expected"):
        complex_ritz(matrix, 0.0)


def test_a_product_that_is_not_finite_is_named():
    with pytest.raises(NonFiniteProductError, match="product 1 is not finite"):
        arnoldi(lambda v: v * math.nan, torch.ones(4), max_iter=4)
    with pytest.raises(ValueError, match="max_iter=0"):
        arnoldi(lambda v: v, torch.ones(4), max_iter=0)
