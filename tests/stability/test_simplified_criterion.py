"""The theorem of Takagi et al. against real training runs: Trainer, MetaLearningModule, torch.optim.SGD."""

import pytest
import torch

from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, EpisodeBatch
from lightning_maml_guard.tasks.regression import LinearRegression
from lightning_maml_guard.utils.lightning_compat import Callback
from tests.helpers import bisect, fit, linear_module

STEPS = 400


def linear_task():
    batch = LinearRegression(features=4, shots=20, noise=0.1, same_query=True, dtype="float64").sample(
        1, torch.Generator().manual_seed(0)
    )
    return EpisodeBatch(batch.support, batch.query)


class Distance(Callback):
    """Distance of the weights to the minimum, before each step and after the last."""

    def __init__(self, batch):
        (x,), (y,) = batch.support
        self.optimum = torch.linalg.lstsq(x, y).solution.T
        self.path = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.path.append(float((module.network.weight.detach() - self.optimum).norm()))

    def on_train_end(self, trainer, module):
        self.on_train_batch_start(trainer, module, None, 0)


def train(batch, alpha, beta, steps=STEPS, callbacks=()):
    fit(linear_module(4, beta, inner_lr=alpha, order="simplified"), batch, steps, callbacks)


def converges(batch, alpha, beta):
    """The distance to the minimum shrinks over the last half of a run."""
    distance = Distance(batch)
    train(batch, alpha, beta, callbacks=[distance])
    return distance.path[-1] < max(distance.path[STEPS // 2], 1e-9)


def guards_view(batch, alpha, beta=0.1):
    guard = ConvergenceGuard(action="log", curvature=CurvatureOptions(tol=1e-6))
    train(batch, alpha, beta, steps=1, callbacks=[guard])
    return guard.history[0]


@pytest.mark.parametrize("fraction", [0.1, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.5, 0.9, 0.99))])
def test_the_largest_convergent_beta_is_the_guards_beta_c(fraction):
    batch = linear_task()
    alpha = fraction * guards_view(batch, 0.01).alpha_c
    beta_c = guards_view(batch, alpha).beta_c
    found = bisect(lambda beta: converges(batch, alpha, beta), beta_c * 0.996, beta_c * 1.004, relative=5e-4)
    print(f"alpha = {fraction} alpha_c: trained {found:.6g}, guard {beta_c:.6g}, ratio {found / beta_c:.5f}")
    assert found == pytest.approx(beta_c, rel=1e-3)


def test_the_largest_convergent_alpha_is_the_guards_alpha_c():
    batch = linear_task()
    report = guards_view(batch, 0.01)
    beta = 0.9 * guards_view(batch, report.alpha_c * 0.999).beta_c
    found = bisect(
        lambda alpha: converges(batch, alpha, beta),
        report.alpha_c * 0.996,
        report.alpha_c * 1.004,
        relative=5e-4,
    )
    print(f"trained {found:.6g}, guard {report.alpha_c:.6g}, ratio {found / report.alpha_c:.5f}")
    assert found == pytest.approx(report.alpha_c, rel=1e-3)
