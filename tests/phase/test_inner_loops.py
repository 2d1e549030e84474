"""Grids of trainings whose inner loop has an optimizer of its own, or whose tasks are listed one by one."""

import math

import pytest
import torch

from lightning_maml_guard import MetaProblem, phase_diagram
from lightning_maml_guard.maml.inner_updates import Momentum
from lightning_maml_guard.phase.gradients import GridError
from lightning_maml_guard.phase.optimizers import SGD

X = torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 1.0]], dtype=torch.float64)
Y = X @ torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
STACKED = X.expand(2, 3, 2), torch.stack([Y, 2 * Y])
RAGGED = [(X[:2], Y[:2]), (X, 2 * Y)]


def loss(params, data):
    return ((data[0] @ params["w"] - data[1]) ** 2).mean()


def problem(data=STACKED, **arguments):
    return MetaProblem({"w": torch.ones(2, 1, dtype=torch.float64)}, loss, data, data, **{"inner_lr": 0.1, **arguments})


def trained(data, update, alpha, beta, steps):
    """Exact MAML with two inner steps, by hand."""
    w = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    for _ in range(steps + 1):
        total = 0.0
        for x, y in data:
            fast, buffer = w, 0.0
            for _ in range(2):
                (g,) = torch.autograd.grad(((x @ fast - y) ** 2).mean(), fast, create_graph=True)
                buffer = update * buffer + g
                fast = fast - alpha * buffer
            total = total + ((x @ fast - y) ** 2).mean() / len(data)
        (g,) = torch.autograd.grad(total, w)
        w = (w - beta * g).detach().requires_grad_()
    return float(total.detach())


@pytest.mark.parametrize("data, update", [(RAGGED, None), (STACKED, Momentum(0.5)), (RAGGED, Momentum(0.5))])
def test_a_grid_ends_where_hand_written_trainings_do(data, update):
    given = problem(data, inner_steps=2, inner_update=update)
    found = phase_diagram(given, [0.05, 0.2], [0.1, 0.3], 5, optimizer=SGD(), progress=False)
    tasks = data if isinstance(data, list) else list(zip(*data, strict=True))
    for i, alpha in enumerate((0.05, 0.2)):
        for j, beta in enumerate((0.1, 0.3)):
            expected = trained(tasks, 0.5 if update else 0.0, alpha, beta, 5)
            assert found.final[i, j] == pytest.approx(expected, rel=1e-9)
    assert math.isnan(found.alpha_c[0, 0, 0]) == (update is not None)
    assert (found.exact_beta_c > 0).all()


def test_rates_of_each_step_are_no_column_of_a_grid():
    given = problem(inner_lr=torch.full((2,), 0.1, dtype=torch.float64), inner_steps=2)
    with pytest.raises(GridError, match="one for each step. Give the problem one rate"):
        phase_diagram(given, [0.1], [0.1], 2, progress=False)
