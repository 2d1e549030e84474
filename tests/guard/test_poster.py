"""The poster's theorem against real training runs: Trainer, MetaLearningModule, torch.optim.SGD."""

import pytest
import torch

from lightning_maml_guard import ConvergenceGuard, EpisodeBatch
from lightning_maml_guard.tasks.regression import LinearRegression
from tests.helpers import bisect, fit, linear_module

STEPS = 500


def linear_task():
    batch = LinearRegression(features=4, shots=20, noise=0.1, same_query=True, dtype="float64").sample(
        1, torch.Generator().manual_seed(0)
    )
    return EpisodeBatch(batch.support, batch.query)


def train(batch, alpha, beta, steps=STEPS, callbacks=()):
    module = linear_module(4, beta, inner_lr=alpha, order="simplified")
    fit(module, batch, steps, callbacks)
    x, y = batch.support[0][0], batch.support[1][0]
    optimum = torch.linalg.lstsq(x, y).solution.T
    return float((module.network.weight.detach() - optimum).norm())


def converges(batch, alpha, beta):
    """The distance to the minimum shrinks over the last half of a run."""
    half, whole = (train(batch, alpha, beta, steps) for steps in (STEPS // 2, STEPS))
    return whole < max(half, 1e-9)


def guards_view(batch, alpha, beta=0.1):
    guard = ConvergenceGuard(action="log", tol=1e-6)
    train(batch, alpha, beta, steps=1, callbacks=[guard])
    return guard.history[0]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.99])
def test_the_largest_convergent_beta_is_the_guards_beta_c(fraction):
    batch = linear_task()
    alpha = fraction * guards_view(batch, 0.01).alpha_c
    beta_c = guards_view(batch, alpha).beta_c
    found = bisect(lambda beta: converges(batch, alpha, beta), beta_c * 0.97, beta_c * 1.03, relative=2e-4)
    print(f"alpha = {fraction} alpha_c: trained {found:.6g}, guard {beta_c:.6g}, ratio {found / beta_c:.5f}")
    assert found == pytest.approx(beta_c, rel=1e-3)


def test_the_largest_convergent_alpha_is_the_guards_alpha_c():
    batch = linear_task()
    report = guards_view(batch, 0.01)
    beta = 0.9 * guards_view(batch, report.alpha_c * 0.999).beta_c
    found = bisect(
        lambda alpha: converges(batch, alpha, beta),
        report.alpha_c * 0.97,
        report.alpha_c * 1.03,
        relative=2e-4,
    )
    print(f"trained {found:.6g}, guard {report.alpha_c:.6g}, ratio {found / report.alpha_c:.5f}")
    assert found == pytest.approx(report.alpha_c, rel=1e-3)
