import numpy as np
import pytest
import torch

from lightning_maml_guard.linalg.pyhessian import largest_eigenvalue
from tests.linalg.test_lanczos import matrix_of


def quadratic(values, dtype=torch.float64):
    matrix = matrix_of(np.array(values)).to(dtype)
    return (lambda p: 0.5 * p["w"] @ matrix @ p["w"] + p["w"].sum()), {
        "w": torch.ones(len(values), dtype=dtype),
        "unused": torch.ones(2, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dominant_positive_eigenvalue(dtype):
    loss, params = quadratic([0.1, 0.5, 1.0, 4.0], dtype)
    found = largest_eigenvalue(loss, params, max_iter=200, tol=1e-6)
    assert found.lambda_max == pytest.approx(4.0, rel=1e-3)
    assert abs(found.lambda_max - 4.0) <= found.residual + 1e-3
    assert torch.get_default_dtype() == torch.float32


def test_the_right_sign_when_a_negative_eigenvalue_dominates():
    loss, params = quadratic([-3.0, -1.0, 0.5, 2.0])
    found = largest_eigenvalue(loss, params, max_iter=500, tol=1e-8)
    assert found.lambda_max == pytest.approx(2.0, rel=1e-3)
    assert found.lambda_min == pytest.approx(-3.0, rel=1e-3)


def test_the_params_are_left_alone_and_products_are_counted():
    loss, params = quadratic([0.1, 4.0])
    before = {name: value.clone() for name, value in params.items()}
    found = largest_eigenvalue(loss, params, max_iter=3, tol=1e-12)
    assert found.matvecs == 3 + 1
    assert all(
        torch.equal(params[n], before[n]) and params[n].grad is None and not params[n].requires_grad for n in params
    )
