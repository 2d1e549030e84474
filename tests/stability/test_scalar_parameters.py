"""Parameters without a dimension, as a learned temperature: whatever flattens takes them like those of one entry."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from lightning_maml_guard import (
    ConvergenceGuard,
    MetaLearningModule,
    MetaProblem,
    measure,
    phase_diagram,
    suggest_rates,
)
from lightning_maml_guard.phase.bisection import converges
from tests.helpers import fit

STEPS = 2
RATES = {
    "one": lambda shape: 0.05,
    "by step": lambda shape: torch.tensor([0.05, 0.03]),
    "by name": lambda shape: {"w": torch.tensor(0.05), "tau": torch.tensor(0.02)},
    "by name and step": lambda shape: {"w": torch.full((STEPS, 3), 0.05), "tau": torch.full((STEPS, *shape), 0.02)},
}


def problem(shape, rate="one", **arguments):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    params = {"w": draw(3).requires_grad_(), "tau": torch.full(shape, 0.1).requires_grad_()}

    def loss(params, data):
        return (data[0] @ params["w"] * (1 + params["tau"]) - data[1]).square().mean()

    support, query = ((draw(4, 8, 3), draw(4, 8)) for _ in range(2))
    return MetaProblem(params, loss, support, query, RATES[rate](shape), STEPS, **arguments)


@pytest.mark.parametrize("order", ["exact", "first", "simplified"])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_limits_are_those_of_one_entry(rate, order, kind):
    found = []
    for shape in ((), (1,)):
        stated = problem(shape, rate, order=order)
        optimizer = kind(stated.params.values(), lr=0.01)
        for each in stated.params.values():
            each.grad = torch.full_like(each, 0.1)
        optimizer.step()
        report = measure(stated, optimizer=optimizer)
        found.append((report.alpha_c, report.beta_c, report.exact_beta_c, report.beta_c_noise))
    assert not math.isnan(found[0][1])
    assert found[0] == pytest.approx(found[1], rel=1e-4, nan_ok=True)


def test_grids_of_trainings_are_those_of_one_entry():
    diagrams = [phase_diagram(problem(shape), [0.01, 0.05], [0.01, 50.0], 8, progress=False) for shape in ((), (1,))]
    one, other = (each.losses for each in diagrams)
    assert np.isfinite(one).any() and not np.isfinite(one).all()
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_runs_that_converge_are_found():
    rates = torch.full((4,), 0.01), torch.tensor([0.001, 0.05, 2.0, 5.0])
    one, other = (list(converges(problem(shape), *rates, 150)) for shape in ((), (1,)))
    assert one == other and one[0] and not all(one)


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.tau = nn.Linear(3, 1), nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        return self.linear(x) * self.tau.exp()


@pytest.mark.parametrize("learn", [False, True, "per_step"])
def test_a_module_is_guarded_and_given_rates(learn):
    x, y = torch.randn(2, 4, 8, 3).unbind()
    batch = ((x, y[..., :1]), (y, x[..., :1]))
    module = MetaLearningModule(
        Tempered(), inner_lr=0.05, inner_steps=2, learn_inner_lr=learn, optimizer=lambda params: SGD(params, lr=0.01)
    )
    guard = ConvergenceGuard(action="log", every_n_steps=1)
    fit(module, batch, 3, [guard])
    assert len(guard.history) == 3 and all(math.isfinite(report.beta_c) for report in guard.history)
    assert 0 < suggest_rates(module, DataLoader([batch] * 4, batch_size=None)).suggestion()[1] < math.inf
