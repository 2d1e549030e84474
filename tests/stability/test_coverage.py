"""Measured limits beside those of dense matrices: a slice of ``benchmarks.coverage``, and runs of a few products."""

import math

import numpy as np
import pytest
import torch

from benchmarks.coverage.dense import outcomes
from benchmarks.coverage.problems import draw
from lightning_maml_guard import CurvatureOptions, MetaProblem, measure

# Problems whose exact_beta_c once lay outside of its interval, by up to a factor of 70.
ONCE_OUTSIDE = (1014, 3014, 3017, 3037, 3055)
SEEDS = (*ONCE_OUTSIDE, *range(30))


def test_limits_lie_in_their_intervals_and_most_are_resolved():
    resolved = []
    for seed in SEEDS:
        found, report = outcomes(draw(seed), CurvatureOptions())
        for each in found:
            assert each.inside or each.kink, (seed, each)
        resolved.append(found[2].resolved)
        assert not any(math.isnan(value) for value in (report.lambda_max, report.alpha_c))
    assert sum(resolved) > 0.6 * len(SEEDS)


def quadratic(seed, order):
    """Three tasks with Hessians of their own, of 40 eigenvalues that decay; returns the problem and its limit."""
    rng = np.random.default_rng(seed)
    hessians = []
    for _ in range(3):
        basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
        hessians.append(basis @ np.diag(rng.uniform(0.8, 1.2, 40) * rng.uniform(0.6, 0.95) ** np.arange(40)) @ basis.T)
    data = torch.from_numpy(np.stack(hessians))
    problem = MetaProblem(
        {"w": torch.ones(40, dtype=torch.float64)},
        lambda params, hessian: params["w"] @ hessian @ params["w"] / 2,
        data,
        data,
        inner_lr=0.1,
        order=order,
    )
    adapted = [np.eye(40) - 0.1 * each for each in hessians]
    update = [a @ h @ a if order == "exact" else h @ a for h, a in zip(hessians, adapted, strict=True)]
    return problem, 2 / np.linalg.eigvals(np.mean(update, 0)).real.max()


@pytest.mark.parametrize("order", ["exact", "first"])
@pytest.mark.parametrize("max_iter", [1, 2, 3, 4])
def test_a_few_products_call_no_rate_safe_that_diverges(order, max_iter):
    for seed in range(4):
        problem, limit = quadratic(seed, order)
        for factor in (1.02, 1.5, 2.0):
            report = measure(problem, beta=factor * limit, curvature=CurvatureOptions(max_iter=max_iter))
            assert report.beta_status != "safe", (seed, factor)
            low, high = report.exact_beta_c_interval
            assert low <= limit <= high


@pytest.mark.parametrize("order", ["exact", "first"])
def test_the_usual_number_of_products_decides(order):
    problem, limit = quadratic(0, order)
    assert measure(problem, beta=0.9 * limit).beta_status == "safe"
    assert measure(problem, beta=1.1 * limit).beta_status == "unsafe"
    low, high = measure(problem, beta=limit).exact_beta_c_interval
    assert 0.97 * limit < low <= limit <= high * (1 + 1e-9) < 1.03 * limit
