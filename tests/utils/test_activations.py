"""Dead units are counted by what the activations put out, whatever they are made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_maml_guard import MetaProblem
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.stability.problems import PlainProblem, dead_units
from lightning_maml_guard.utils.activations import DeadUnits, ReluUnits


def count(forward, x):
    units = ReluUnits()
    with units:
        forward(x)
    return units.count()


def killed(network, layer, units):
    with torch.no_grad():
        network[layer].bias[:units] = -1e3
    return network


class Functional(nn.Module):
    """Two layers of one width by plain calls, on one line."""

    def __init__(self, relu):
        super().__init__()
        self.relu, self.layers = relu, nn.ModuleList([nn.Linear(3, 6), nn.Linear(6, 6)])

    def forward(self, x):
        for layer in self.layers:
            x = self.relu(layer(x))
        return x


X = torch.linspace(-1, 1, 12).reshape(4, 3)


@pytest.mark.parametrize(
    "relu", [F.relu, torch.relu, torch.relu_, F.relu6, lambda x: x.relu(), lambda x: F.relu(x, True)]
)
def test_units_of_plain_calls_are_counted_by_layer(relu):
    network = Functional(relu)
    with torch.no_grad():
        for layer in network.layers:
            layer.weight.abs_()
            layer.bias.fill_(4.0)  # alive on all data
        network.layers[1].bias[:5] = -1e3
    assert count(network, X) == DeadUnits(5, 12, False) and not count(network, X).most
    with torch.no_grad():
        network.layers[1].bias.fill_(-1e3)
    assert count(network, X) == DeadUnits(6, 12, True) and count(network, X).most


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.ReLU6(), nn.ReLU(inplace=True), nn.Threshold(0.0, 0.0)])
def test_units_of_modules_are_counted(layer):
    network = nn.Sequential(killed(nn.Sequential(nn.Linear(3, 6)), 0, 6), layer)
    assert count(network, X) == DeadUnits(6, 6, True)


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.GELU(), nn.LeakyReLU(), nn.Hardtanh(), nn.Sigmoid()])
def test_without_a_relu_nothing_is_counted(layer):
    network = nn.Sequential(killed(nn.Sequential(nn.Linear(3, 6)), 0, 6), layer)
    assert count(network, X) == DeadUnits(0, 0, False) and not count(network, X).most


def test_a_unit_lives_that_any_task_or_set_moves():
    """Each task's inputs move other units: none of them is dead on the batch."""
    weights = {"w": nn.Parameter(torch.eye(4))}
    tasks = torch.eye(4)[:, None, :]  # task i drives unit i alone
    problem = MetaProblem(weights, lambda p, x: F.relu(x @ p["w"]).sum(), tasks[:2], tasks[2:])
    assert dead_units(problem) == DeadUnits(0, 4, False)
    fewer = MetaProblem(weights, lambda p, x: F.relu(x @ p["w"]).sum(), tasks[:1], tasks[1:2])
    assert dead_units(fewer) == DeadUnits(2, 4, False)


def test_a_loop_over_tasks_in_a_training_step_counts_each_unit_once():
    network = killed(mlp(3, (6, 6), 1), 2, 6)
    params = dict(network.named_parameters())

    def loss(params):
        total = 0.0
        for x in X[:, None]:
            inner = functional_call(network, params, (x,)).square().mean()
            gradients = torch.autograd.grad(inner, list(params.values()), create_graph=True)
            adapted = {name: p - 0.1 * g for (name, p), g in zip(params.items(), gradients, strict=True)}
            total = total + functional_call(network, adapted, (x,)).square().mean()
        return total

    found = dead_units(PlainProblem(params, loss))
    assert (found.units, found.blocked) == (12, True) and found.dead >= 6


@pytest.mark.parametrize("strided", [False, True])
def test_the_channels_of_our_own_network_count_also_where_layers_are_fused(strided):
    network = conv4(3, filters=4, strided=strided)
    images = torch.randn(5, 1, 28, 28)
    assert count(network, images).units == 16
    with torch.no_grad():
        network.features[-2 if strided else -3].bias.fill_(-1e3)
    assert count(network, images)[1:] == (16, True) and count(network, images).dead >= 4


def test_hooks_are_gone_afterwards_and_hidden_values_are_left_alone():
    from torch.nn.modules import module

    before = len(module._global_forward_hooks), len(module._global_forward_pre_hooks)
    with pytest.raises(RuntimeError):
        count(nn.Linear(3, 6), torch.ones(2, 2))
    assert (len(module._global_forward_hooks), len(module._global_forward_pre_hooks)) == before
    assert count(lambda x: torch.func.vmap(F.relu)(x), X[None]) == DeadUnits(0, 0, False)
