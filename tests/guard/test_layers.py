"""Every kind of network, in the mode that trains, against a dense Hessian by differences of plain gradients."""

import copy

import pytest
import torch
from torch import nn

from lightning_maml_guard import CurvatureOptions, measure
from lightning_maml_guard.stability.problems import training_step_problem
from lightning_maml_guard.utils.isolation import isolated
from tests.helpers import dense_by_differences, symmetric_top
from tests.stability.test_plain_training import Shared, Tied
from tests.utils.test_double_backward import Attention, Recurrent, Sdpa


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle, self.frozen = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.used(torch.tanh(self.frozen(x)))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv1d(5, 3, 2), nn.BatchNorm1d(3), nn.Tanh())

    def forward(self, x):
        return self.inner(x)


def mlp():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def compiled_wrapper():
    return torch.compile(mlp(), backend="aot_eager")


def compiled_in_place():
    network = mlp()
    network.compile(backend="aot_eager")
    return network


def compiled_nested():
    return nn.Sequential(torch.compile(nn.Linear(4, 3), backend="aot_eager"), nn.Tanh(), nn.Linear(3, 1))


def narrow(make):
    return lambda: nn.Sequential(nn.Linear(4, 3), make())


NETWORKS = {
    "sdpa": Sdpa,
    "multihead attention": Attention,
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
    "lstm": Recurrent,
    "batch norm": Conv,
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm1d(5, affine=True), nn.Linear(4, 2)),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "tied weights": narrow(Tied),
    "shared submodule": narrow(Shared),
    "frozen and unused": Unused,
    "compiled, wrapper": compiled_wrapper,
    "compiled, in place": compiled_in_place,
    "compiled, nested": compiled_nested,
}


class Training(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        x, weights = batch
        out = self.network(x)
        return (out.pow(2) * weights[..., : out.shape[-1]]).mean() + out.sin().mean()


@pytest.mark.parametrize("name", NETWORKS)
def test_lambda_max_is_the_dense_hessians(name):
    torch.manual_seed(0)
    module = Training(NETWORKS[name]()).double().train()
    x = torch.randn(6, 5, 4).double()
    batch = (x, torch.rand(1, 1, 8).double())
    before = {n: v.clone() for n, v in module.state_dict().items()}
    with isolated(module):
        report = measure(
            training_step_problem(module, batch, 0),
            beta=0.1,
            curvature=CurvatureOptions(criterion="simplified", tol=1e-6, max_iter=120),
        )
    assert not report.notices, "double backward was expected to be right"
    assert all(torch.equal(value, before[n]) for n, value in module.state_dict().items())

    trained = [value for value in module.parameters() if value.requires_grad]
    centre = [value.detach().clone() for value in trained]
    flat = torch.cat([value.flatten() for value in centre])
    buffers = [(value, value.clone()) for value in module.buffers()]

    def gradient(theta):
        with torch.no_grad():
            for value, piece in zip(trained, theta.split([c.numel() for c in centre]), strict=True):
                value.copy_(piece.reshape(value.shape))
            for value, saved in buffers:
                value.copy_(saved)
        with torch.compiler.set_stance("force_eager"):
            loss = module.training_step(batch, 0)
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
        zeros = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, trained, strict=True)]
        return torch.cat([g.flatten() for g in zeros])

    assert report.lambda_max == pytest.approx(symmetric_top(dense_by_differences(gradient, flat)), rel=1e-5)
    assert copy.deepcopy(report).status == report.status


def test_batch_norm_is_measured_in_the_mode_that_trains():
    torch.manual_seed(0)
    module, x = Training(Conv()).double().train(), torch.randn(6, 5, 4).double() * 5
    batch = (x, torch.rand(1, 1, 8).double())
    numbers = []
    for mode in (True, False):
        module.train(mode)
        with isolated(module):
            numbers.append(
                measure(
                    training_step_problem(module, batch, 0),
                    beta=0.1,
                    curvature=CurvatureOptions(criterion="simplified"),
                ).lambda_max
            )
    assert numbers[0] != pytest.approx(numbers[1], rel=0.1)
