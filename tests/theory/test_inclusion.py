"""Where eigenvalues that a Krylov run has not found may lie."""

import math

import numpy as np
import pytest

from lightning_maml_guard.theory.inclusion import (
    distance_to_hidden,
    hidden_radii,
    inclusion_level,
    largest_hidden,
    outermost,
)
from lightning_maml_guard.theory.ritz import lanczos_resolved, rates_from_lanczos


def arnoldi_by_hand(matrix, steps, seed):
    """Projection and norms of a plain Arnoldi run with classical Gram-Schmidt, twice."""
    vector = np.random.default_rng(seed).standard_normal(len(matrix))
    basis, norms = [vector / np.linalg.norm(vector)], []
    for _ in range(steps):
        rest = matrix @ basis[-1]
        for _ in range(2):
            rest = rest - np.array(basis).T @ (np.array(basis) @ rest)
        norms.append(np.linalg.norm(rest))
        basis.append(rest / norms[-1])
    kept = np.array(basis[:-1])
    return np.linalg.eigvals(kept @ matrix @ kept.T), np.array(norms)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 8, 15])
def test_every_eigenvalue_lies_in_the_region_but_for_one_in_twenty(symmetric, steps):
    missed = total = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        matrix = rng.standard_normal((25, 25)) * 0.8 ** np.arange(25)
        matrix = matrix + matrix.T if symmetric else matrix
        values, norms = arnoldi_by_hand(matrix, steps, seed)
        true = np.linalg.eigvals(matrix)
        level = inclusion_level(norms, 25)
        missed += int((np.abs(true[:, None] - values).prod(1) > math.exp(level)).sum())
        total += len(true)
        if symmetric:
            assert largest_hidden(values.real, level) >= values.real.max()
    assert missed <= 0.05 * total


def test_the_region_of_one_ritz_value_is_a_disc():
    value, level = np.array([2.0 + 0j]), math.log(0.5)
    assert hidden_radii(value, level) == pytest.approx([0.5])
    assert largest_hidden(value.real, level) == pytest.approx(2.5)
    angles = np.array([0.0, math.asin(0.25) - 0.03, math.asin(0.25) + 0.02, math.pi / 2])
    far = outermost(value, level, angles, 0.1)
    assert far[0] == pytest.approx(2.5) and 1.9 < far[1] < 2.5 and (far[2:] == 0).all()


def test_ritz_values_far_apart_have_islands_and_close_ones_share_one():
    level = math.log(1e-3)
    assert hidden_radii(np.array([0.0, 10.0]), level) == pytest.approx([1e-4, 1e-4])
    assert hidden_radii(np.array([0.0, 1e-6]), level) == pytest.approx([1e-3**0.5] * 2)
    far = outermost(np.array([1.0, 10.0]), level, np.array([0.0]), 0.1)
    assert far == pytest.approx([10 + 1e-3 / 9], rel=1e-6)


def test_an_exhausted_space_hides_nothing():
    assert inclusion_level([1.0, 0.0], 10) == -math.inf
    assert largest_hidden(np.array([1.0, 3.0]), -math.inf) == 3.0
    assert (hidden_radii(np.array([1.0, 3.0]), -math.inf) == 0).all()
    assert (outermost(np.array([1.0, 3.0]), -math.inf, np.array([0.0]), 0.1) == 0).all()


def lanczos_by_hand(matrix, steps, seed=0):
    """Diagonal and norms of a plain Lanczos run with full reorthogonalisation."""
    vector = np.random.default_rng(seed).standard_normal(len(matrix))
    basis, main, off = [vector / np.linalg.norm(vector)], [], []
    for _ in range(steps):
        rest = matrix @ basis[-1]
        main.append(basis[-1] @ rest)
        for _ in range(2):
            rest = rest - np.array(basis).T @ (np.array(basis) @ rest)
        off.append(np.linalg.norm(rest))
        basis.append(rest / off[-1])
    return main, off


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_lanczos_run_of_few_steps_is_widened_and_no_other(alpha):
    values = 1 / np.arange(1, 81) ** 0.5
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((80, 80)))[0]
    matrix = basis @ np.diag(values) @ basis.T
    curvature = (values - alpha * values**2).max()
    for steps in (1, 2, 3, 4, 5, 20):
        run = lanczos_by_hand(matrix, steps)
        plain = rates_from_lanczos(*run, alpha, resolution=1e-2)
        found = rates_from_lanczos(*run, alpha, resolution=1e-2, size=80)
        if steps == 20:
            assert found == plain
            continue
        assert max(1, plain.lambda_max_interval[1]) < found.lambda_max_interval[1]
        assert found.beta_c_interval[0] < 2 / curvature and found.beta_c_interval[1] == plain.beta_c_interval[1]
        assert found.lambda_max == plain.lambda_max and found.beta_c == plain.beta_c


def test_a_top_that_a_few_steps_resolve_is_not_widened():
    matrix = np.diag([100.0, *np.linspace(0, 1e-3, 79)])
    run = lanczos_by_hand(matrix, 3)
    assert rates_from_lanczos(*run, 0.0, resolution=1e-2, size=80) == rates_from_lanczos(*run, 0.0, resolution=1e-2)


@pytest.mark.parametrize("size", [None, 19])
def test_a_run_stops_only_where_the_start_cannot_have_missed_the_top(size):
    # A start with little of the top looks resolved on the eigenvalue below it.
    matrix, missed = np.diag([*np.zeros(15), 2.5, 4.7, 51.4, 54.6]), 0
    for seed in range(300):
        for steps in range(2, 9):
            run = lanczos_by_hand(matrix, steps, seed)
            if lanczos_resolved(*run, 0.0, 1e-2, size=size) or run[1][-1] < 1e-9:
                break
        found = rates_from_lanczos(*run, 0.0, rounding=1e-14, resolution=1e-2, size=size)
        missed += not found.lambda_max_interval[0] <= 54.6 <= found.lambda_max_interval[1]
    assert missed == 0 if size else missed >= 1


@pytest.mark.parametrize("size", [None, 37])
def test_beta_c_holds_what_a_run_may_have_missed_inside_the_spectrum(size):
    # At alpha = .29 the eigenvalue .6 binds, and 2.97 is found long before it.
    alpha, values = 0.29, np.array([*np.linspace(-0.6, -0.1, 10), *np.zeros(14), *np.linspace(0.02, 0.6, 12), 2.97])
    truth, missed = 2 / (values - alpha * values**2).max(), 0
    for seed in range(200):
        for steps in range(3, 12):
            run = lanczos_by_hand(np.diag(values), steps, seed)
            if lanczos_resolved(*run, alpha, 1e-2, size=size):
                break
        low, high = rates_from_lanczos(*run, alpha, rounding=1e-14, resolution=1e-2, size=size).beta_c_interval
        missed += not low <= truth <= high
    assert missed == 0 if size else missed >= 1


def test_the_distance_to_what_the_region_allows():
    values, level = np.array([0.0, 10.0]), math.log(9.0)
    assert distance_to_hidden(values, level, 1.0) == 0.0 and distance_to_hidden(values, level, -0.5) == 0.0
    assert distance_to_hidden(values, level, 2.0) == pytest.approx(1.0)
    assert distance_to_hidden(values, level, 8.5) == pytest.approx(0.5)
    assert distance_to_hidden(values, level, 12.0) == pytest.approx(2 - (34**0.5 - 5))
    assert distance_to_hidden(values, -math.inf, 3.0) == pytest.approx(3.0)
