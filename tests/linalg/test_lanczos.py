import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_maml_guard.linalg.lanczos import NonFiniteProductError, lanczos, start_vector
from lightning_maml_guard.theory.ritz import ritz_values


def matrix_of(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    return torch.from_numpy(q @ np.diag(eigenvalues) @ q.T)


def run(matrix, max_iter, **keywords):
    return lanczos(lambda v: v @ matrix, start_vector((len(matrix),), matrix), max_iter=max_iter, **keywords)


def test_the_recurrence_and_the_orthonormal_basis():
    matrix = matrix_of(np.linspace(-3, 5, 60))
    result = run(matrix, 12)
    main, off = (torch.tensor(part, dtype=torch.float64) for part in result.runs[0])
    t = torch.diag(main) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
    v = result.basis.dense().T
    rest = matrix @ v - v @ t.double()
    torch.testing.assert_close(v.T @ v, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(rest[:, :-1], torch.zeros_like(rest[:, :-1]), rtol=0, atol=1e-12)
    assert rest[:, -1].norm().item() == pytest.approx(float(off[-1]), rel=1e-10)
    assert result.matvecs == 12


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 40), st.integers(0, 10**6), st.sampled_from(["spread", "indefinite", "clustered", "pair"]))
def test_ritz_values_lie_within_their_bounds_and_have_the_right_sign(n, seed, kind):
    rng = np.random.default_rng(seed)
    values = {
        "spread": rng.uniform(0, 10, n),
        "indefinite": rng.standard_normal(n) * 3,
        "clustered": np.r_[rng.uniform(0, 1, n - 1), 5.0] + 1e-6 * rng.standard_normal(n),
        "pair": np.resize([2.0, -2.0], n) + 1e-3 * rng.standard_normal(n),
    }[kind]
    result = run(matrix_of(values, seed), 20)
    ritz, bounds = ritz_values(*result.runs[0])
    slack = 1e-10 * np.abs(values).max()
    assert all(np.abs(values - r).min() <= b + slack for r, b in zip(ritz, bounds, strict=True))
    assert ritz[-1] <= values.max() + slack
    if result.matvecs >= n or result.converged:
        assert ritz[-1] == pytest.approx(values.max(), abs=slack + 1e-8)


def test_the_right_sign_where_power_iteration_gets_it_wrong():
    values = np.r_[np.linspace(-3, 2, 50)]
    ritz, bounds = ritz_values(*run(matrix_of(values), 30).runs[0])
    assert ritz[-1] == pytest.approx(2.0, rel=1e-2) and bounds[-1] < 0.3
    reference = scipy.sparse.linalg.eigsh(matrix_of(values).numpy(), k=1, which="LA")[0][0]
    assert ritz[-1] == pytest.approx(reference, rel=1e-2)


def test_an_exhausted_krylov_space_ends_the_run_with_residual_zero():
    result = run(matrix_of([4.0] * 7 + [1.0] * 5), 12)
    assert result.converged
    assert len(result.runs[0].diagonal) == 2
    assert result.runs[0].off_diagonal[-1] == 0.0
    np.testing.assert_allclose(ritz_values(*result.runs[0])[0], [1.0, 4.0], rtol=1e-12)


def test_the_zero_matrix_has_the_ritz_value_zero():
    result = run(torch.zeros(5, 5, dtype=torch.float64), 5)
    assert result.runs[0].diagonal == (0.0,) and result.converged


@pytest.mark.parametrize("exponent", [-17, -20, -23, -30, -33, -36])
def test_a_nearly_dead_matrix_is_measured_and_leaves_its_batch_alone(exponent):
    # In float32 the squares of what is left of its products are 0, and their norm with them.
    generator = torch.Generator().manual_seed(0)
    full, low = torch.randn(200, 200, generator=generator), torch.randn(200, 3, generator=generator)
    both = torch.stack([full + full.T, 10.0**exponent * low @ low.T])
    start = torch.randn(200, generator=generator).expand(2, -1)
    found = lanczos(lambda vectors: torch.einsum("bij,bj->bi", both, vectors), start, max_iter=20)
    alone = lanczos(lambda vector: both[0] @ vector, start[0], max_iter=20)
    assert ritz_values(*found.runs[0])[0][-1] == pytest.approx(ritz_values(*alone.runs[0])[0][-1], rel=1e-4)
    lambda_max = float(torch.linalg.eigvalsh(both[1].double())[-1])
    assert ritz_values(*found.runs[1])[0][-1] == pytest.approx(lambda_max, rel=1e-3)


def test_a_batch_equals_its_matrices_one_by_one():
    matrices = torch.stack([matrix_of(np.linspace(0, k, 15), seed=k) for k in (1, 2, 3)])
    start = start_vector((3, 15), matrices)
    batch = lanczos(lambda v: torch.einsum("bij,bj->bi", matrices, v), start, max_iter=6)
    for k in range(3):
        alone = lanczos(lambda v, k=k: matrices[k] @ v, start[k], max_iter=6)
        np.testing.assert_allclose(batch.runs[k].diagonal, alone.runs[0].diagonal, rtol=1e-9)
        np.testing.assert_allclose(batch.runs[k].off_diagonal, alone.runs[0].off_diagonal, rtol=1e-9)


def test_stop_is_asked_every_few_steps_only(monkeypatch):
    monkeypatch.setattr("lightning_maml_guard.linalg.lanczos._SYNC_ON_HOST", 3)
    asked = []
    result = run(
        matrix_of(np.linspace(0, 1, 50)),
        20,
        stop=lambda runs: asked.append(len(runs[0].diagonal)) or len(asked) == 3,
    )
    assert asked == [3, 6, 9]
    assert result.matvecs == 9 and result.converged


def test_a_product_that_is_not_finite_is_named():
    with pytest.raises(NonFiniteProductError, match="product 3 is not finite"):
        count = iter(range(100))
        lanczos(
            lambda v: v * (float("nan") if next(count) == 2 else torch.arange(10.0)),
            torch.ones(10),
            max_iter=8,
        )


@pytest.mark.parametrize(("n", "max_iter"), [(0, 3), (3, 0)])
def test_bad_sizes_are_refused(n, max_iter):
    with pytest.raises(ValueError, match="at least"):
        lanczos(lambda v: v, torch.ones(n), max_iter=max_iter)


def test_the_start_vector_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first = start_vector((2, 3), torch.zeros(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, start_vector((2, 3), torch.zeros(1))) and first.dtype == torch.float32
