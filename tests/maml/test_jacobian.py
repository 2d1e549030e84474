"""The Jacobian of the meta-update through norm layers: a third derivative, against finite differences."""

import pytest
import torch
from torch import nn

from lightning_maml_guard import EpisodeBatch, MetaLearningModule, MetaProblem
from lightning_maml_guard.linalg.operators import Jacobian
from lightning_maml_guard.maml.jacobian import curvature_by_task, meta_field, query_losses
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.task_map import TaskMap

NORMS = {
    "batch": lambda: nn.BatchNorm1d(5),
    "batch, no running statistics": lambda: nn.BatchNorm1d(5, track_running_stats=False),
    "layer": lambda: nn.LayerNorm(5),
    "instance": lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.InstanceNorm1d(1, affine=True), nn.Flatten(1)),
    "group": lambda: nn.GroupNorm(1, 5),
}


def problem(norm, order, inner_steps=1):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 5), norm, nn.Tanh(), nn.Linear(5, 1)).double()
    for name, value in network.named_parameters():
        if name.startswith("1."):
            nn.init.uniform_(value, 0.5, 1.5)
    module = MetaLearningModule(network, inner_lr=0.05, order=order, inner_steps=inner_steps)
    sets = [(torch.randn(3, 7, 2).double(), torch.randn(3, 7, 1).double()) for _ in range(2)]
    return module.meta_problem(EpisodeBatch(*sets))


def moved(problem, vector, layout, step):
    """The meta-gradient as training takes it, in a plain loop and with the native kernels, ``step`` along a vector."""
    params = {n: problem.params[n].detach() + step * v for n, v in layout.split(vector).items()}
    at = MetaProblem(
        params, problem.task_loss, problem.support, problem.query, problem.inner_lr, problem.inner_steps, problem.order
    )
    return layout.flatten(meta_gradient(at, tasks=TaskMap(looped=True)).gradients)


@pytest.mark.parametrize("order, inner_steps", [("exact", 1), ("exact", 2), ("first", 2), ("simplified", 1)])
@pytest.mark.parametrize("name", NORMS)
def test_the_product_through_a_norm_layer_agrees_with_finite_differences(name, order, inner_steps):
    given = problem(NORMS[name](), order, inner_steps)
    with double_backward():
        jacobian = Jacobian(meta_field(given, TaskMap()), {n: p.detach() for n, p in given.params.items()})
        layout = jacobian.layout
        u, v = (torch.randn(layout.size, generator=torch.Generator().manual_seed(k)).double() for k in (1, 2))
        # u.(J v) from products with the transpose, so that the orders without symmetry are covered as well
        product = jacobian(u)
    h = 1e-3
    near, far = (moved(given, v, layout, k * h) - moved(given, v, layout, -k * h) for k in (1, 2))
    difference = (8 * near - far) / (12 * h)
    scale = float(difference.norm() * u.norm())
    assert abs(float(product @ v - u @ difference)) < 1e-6 * scale


def test_each_tasks_curvature_is_its_own():
    given = problem(nn.LayerNorm(5), "first", 2)
    params = {n: p.detach() for n, p in given.params.items()}
    with double_backward():
        layout = Jacobian(meta_field(given, TaskMap()), params).layout
        u = torch.randn(layout.size).double()
        found = curvature_by_task(given, params, layout.split(u), TaskMap())
        for k in range(3):
            one = MetaProblem(
                given.params,
                given.task_loss,
                *[tuple(t[k : k + 1] for t in part) for part in (given.support, given.query)],
                given.inner_lr,
                given.inner_steps,
                given.order,
            )
            alone = Jacobian(meta_field(one, TaskMap()), params)
            torch.testing.assert_close(found[k], u @ alone(u))


@pytest.mark.parametrize("order, inner_steps", [("exact", 1), ("exact", 3), ("first", 2), ("simplified", 1)])
@pytest.mark.parametrize("tasks", [TaskMap(), TaskMap(2), TaskMap(looped=True)], ids=["all", "chunks", "loop"])
@pytest.mark.parametrize("name", ["batch", "layer"])
def test_losses_without_a_gradient_are_those_with_one(name, tasks, order, inner_steps):
    given = problem(NORMS[name](), order, inner_steps)
    params = {n: p.detach() for n, p in given.params.items()}
    with double_backward():
        for factor in (1.0, 0.5):
            found = query_losses(given, params, factor, tasks)
            expected = meta_gradient(given.at_factor(factor), tasks=tasks).losses
            assert torch.allclose(found, expected, rtol=1e-12) and not found.requires_grad
        unadapted = query_losses(given, params, 0.0, tasks)
    each = zip(*given.query, strict=True)
    assert torch.allclose(unadapted, torch.stack([given.loss(given.params, task) for task in each]), rtol=1e-12)


def test_losses_without_a_gradient_of_tasks_that_share_their_weights():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    module = MetaLearningModule(network, inner_lr=0.05, batched=True)
    sets = [(torch.randn(4, 5, 3).double(), torch.randn(4, 5, 1).double()) for _ in range(2)]
    given = module.meta_problem(EpisodeBatch(*sets))
    assert given.shares_weights
    params = {n: p.detach() for n, p in given.params.items()}
    for factor in (1.0, 0.0):
        expected = meta_gradient(given.at_factor(factor)).losses
        assert torch.allclose(query_losses(given, params, factor, TaskMap()), expected, rtol=1e-12)
