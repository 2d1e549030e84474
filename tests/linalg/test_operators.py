import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_maml_guard.linalg.layout import Layout
from lightning_maml_guard.linalg.operators import Hessian, Jacobian, gradient_of, gradients_by_task, scaled, simplified
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.task_map import TaskMap
from lightning_maml_guard.utils.warnings import GuardWarning
from tests.helpers import dense_hessian


def regression(network, tasks=3, n=6):
    network = network.double()
    data = (torch.randn(tasks, n, 2).double(), torch.randn(tasks, n, 1).double())

    def loss(params, task):
        return F.mse_loss(functional_call(network, params, (task[0],)), task[1])

    return loss, dict(network.named_parameters()), data


NETWORKS = {
    "tanh": lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)),
    "relu": lambda: nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)),
    "layer norm": lambda: nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(2, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.Linear(5, 1)
    ),
    "running statistics": lambda: nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)),
    "linear": lambda: nn.Linear(2, 1),
}


def dense(operator, n):
    return torch.stack([operator(row) for row in torch.eye(n, dtype=torch.float64)]).numpy()


def mean_hessian(loss, params, data, tasks):
    return Jacobian(gradient_of(lambda shared: tasks(loss, shared, data, in_dims=(None, 0)).mean()), params)


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_mean_hessian_is_the_dense_one(name, looped):
    loss, params, data = regression(NETWORKS[name]())
    reference = dense_hessian(lambda p: sum(loss(p, (x, y)) for x, y in zip(*data, strict=True)) / 3, params)
    with double_backward():
        operator = mean_hessian(loss, params, data, TaskMap(looped=looped))
        found = dense(operator, operator.layout.size)
    np.testing.assert_allclose(found, reference, atol=1e-10)
    assert operator.matvecs == len(found)


@pytest.mark.parametrize("looped", [False, True])
def test_the_per_task_hessians_are_the_dense_ones(looped):
    loss, params, data = regression(NETWORKS["tanh"]())
    with double_backward():
        operator = Jacobian(*gradients_by_task(loss, params, data, TaskMap(looped=looped), 3))
        vectors = torch.randn(3, operator.layout.size, dtype=torch.float64)
        products = operator(vectors)
    for task in range(3):
        reference = dense_hessian(lambda p, t=task: loss(p, (data[0][t], data[1][t])), params)
        np.testing.assert_allclose(products[task].numpy(), reference @ vectors[task].numpy(), atol=1e-10)


def test_lambda_max_of_a_conv_net_is_eigshs():
    from lightning_maml_guard.networks import conv4
    from lightning_maml_guard.stability.krylov_stopping import Krylov, top_eigenvalue

    network = conv4(filters=4, image_size=16).double()
    images, labels = torch.randn(5, 1, 16, 16).double(), torch.arange(5)
    params = dict(network.named_parameters())
    with double_backward():
        operator = Hessian(lambda p: F.cross_entropy(functional_call(network, p, (images,)), labels), params)
        n = operator.layout.size
        linear = scipy.sparse.linalg.LinearOperator(
            (n, n), matvec=lambda v: operator(torch.from_numpy(v.ravel())).numpy(), dtype=float
        )
        reference = scipy.sparse.linalg.eigsh(linear, k=1, which="LA", return_eigenvectors=False)[0]
        value, (low, high) = top_eigenvalue(operator, n, params["head.bias"], None, krylov=Krylov())
    assert value == pytest.approx(reference, rel=1e-2)
    assert low <= reference <= high


def test_unused_and_linear_parameters_have_zero_rows():
    params = {"used": torch.tensor([2.0, 3.0]), "unused": torch.ones(2), "linear": torch.ones(2)}
    operator = Hessian(lambda p: (p["used"] ** 2).sum() + p["linear"].sum(), params)
    assert torch.equal(operator(torch.ones(6)), torch.tensor([2.0, 2, 0, 0, 0, 0]))
    assert torch.equal(operator.gradient, torch.tensor([4.0, 6, 0, 0, 1, 1]))
    assert torch.equal(Hessian(lambda p: p["linear"].sum(), params)(torch.ones(6)), torch.zeros(6))


def test_a_loss_that_ignores_its_params_is_refused():
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        Hessian(lambda p: torch.tensor(1.0), {"a": torch.ones(2)})
    stranger = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="does not depend on the `params`"):
        Hessian(lambda p: stranger.sum(), {"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "at least one parameter but it is empty"),
        ({"a": torch.ones(2, dtype=torch.long)}, "floating point but got"),
        ({"a": torch.ones(2), "b": torch.ones(2, device="meta")}, "on one device"),
    ],
)
def test_bad_params_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        Layout(params)


def test_layout_round_trip_with_and_without_leading_dimensions():
    layout = Layout({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    for shape, batch in (((10,), 0), ((5, 10), 1)):
        vector = torch.randn(shape)
        pieces = layout.split(vector)
        assert pieces["a"].shape == (*shape[:-1], 2, 3)
        assert torch.equal(layout.flatten(pieces, batch), vector)


def test_simplified_and_scaled_are_the_dense_formulas():
    h = torch.randn(6, 6, dtype=torch.float64)
    h = h + h.T
    a, d, s = (torch.rand(6, dtype=torch.float64) for _ in range(3))
    np.testing.assert_allclose(dense(simplified(lambda v: v @ h, a), 6), h - h @ torch.diag(a) @ h, atol=1e-12)
    np.testing.assert_allclose(dense(simplified(lambda v: v @ h, 0.2), 6), h - 0.2 * h @ h, atol=1e-12)
    root = torch.diag(d.sqrt())
    np.testing.assert_allclose(dense(scaled(lambda v: v @ h, d, s), 6), root @ (h + torch.diag(s)) @ root, atol=1e-12)


def test_a_dropout_net_is_one_matrix():
    network = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 1))
    loss, params, data = regression(network)
    with double_backward():
        operator = mean_hessian(loss, params, data, TaskMap())
        found = dense(operator, operator.layout.size)
    np.testing.assert_allclose(found, found.T, atol=1e-12)


def test_what_cannot_be_vmapped_is_looped_and_said_once():
    def loss(params, task):
        if task[0].sum() > 0:  # data-dependent control flow
            return (params["w"] ** 2).sum() * task[0].sum()
        return (params["w"] ** 4).sum()

    tasks = TaskMap()
    data = (torch.tensor([[1.0], [-1.0]]),)
    with pytest.warns(GuardWarning, match="cannot be vectorised, so they run one after another") as caught:
        values = tasks(loss, {"w": torch.ones(2)}, data, in_dims=(None, 0))
        tasks(loss, {"w": torch.ones(2)}, data, in_dims=(None, 0))
    assert values.tolist() == [2.0, 2.0] and len(caught) == 1


def test_an_error_of_the_users_own_is_raised_as_it_is():
    def loss(params, task):
        raise KeyError("my own mistake")

    tasks = TaskMap()
    with pytest.raises(KeyError, match="my own mistake"):
        tasks(loss, {"w": torch.ones(2)}, (torch.ones(2, 1),), in_dims=(None, 0))
    assert not tasks.looped


def test_an_operator_whose_graph_was_let_go_of_says_so():
    loss, params, (x, y) = regression(NETWORKS["tanh"]())
    operator = Hessian(lambda p: loss(p, (x[0], y[0])), params)
    vector = torch.ones(operator.layout.size).double()
    operator(vector)
    operator.release()
    with pytest.raises(RuntimeError, match=r"before release\(\) but it came after"):
        operator(vector)
    assert operator.matvecs == 1
