"""``measure`` leaves the modules that a loss calls as they were, in a loop of the user's own too."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_maml_guard import MetaProblem, measure
from lightning_maml_guard.stability.hvp import MeasurementCache
from lightning_maml_guard.stability.problems import PlainProblem


class Counting(nn.Module):
    """Keeps a number, a buffer written into and one made anew."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("renewed", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.written.add_(1.0)
        self.renewed = self.renewed + 1.0
        return x


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), Counting(), nn.Linear(8, 1))
    for _ in range(5):
        net(torch.randn(40, 2))  # the statistics of the user's training data
    return net


NET = network()


def loss_of_a_global(params, data):
    return (functional_call(NET, params, (data[0],)) - data[1]).pow(2).mean()


class Experiment:
    def __init__(self, net):
        self.net = net

    def loss(self, params, data):
        return (functional_call(self.net, params, (data[0],)) - data[1]).pow(2).mean()


def state(net):
    values = {name: value.clone() for name, value in net.state_dict().items()}
    return values, [id(buffer) for buffer in net.buffers()], net[3].calls, [part.training for part in net.modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["a global", "a closure", "an object", "plain training"])
def test_buffers_counters_and_gradients_are_as_they_were(where, training):
    net = NET if where == "a global" else network()
    net.train(training)
    params = dict(net.named_parameters())
    for value in params.values():
        value.grad = torch.ones_like(value)
    x = 5 + torch.randn(3, 10, 2)
    data = x, x.sum(-1, keepdim=True).sin()

    def in_a_closure(params, data):
        return (functional_call(net, params, (data[0],)) - data[1]).pow(2).mean()

    loss = {"a global": loss_of_a_global, "an object": Experiment(net).loss}.get(where, in_a_closure)
    if where == "plain training":
        problem = PlainProblem(params, lambda params: loss(params, (data[0][0], data[1][0])))
    else:
        problem = MetaProblem(params, loss, data, data, inner_lr=0.1, inner_steps=2, looped=True)
    before, random = state(net), torch.get_rng_state()
    report = measure(problem, beta=0.1, cache=MeasurementCache())
    after = state(net)
    assert before[0].keys() == after[0].keys() and before[1:] == after[1:]
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name
    assert all(torch.equal(value.grad, torch.ones_like(value)) for value in params.values())
    assert torch.equal(random, torch.get_rng_state()) and report.lambda_max > 0


@pytest.mark.filterwarnings("ignore:The tasks of a batch cannot be vectorised")
def test_batch_norms_counter_is_left_where_the_tasks_are_tried_at_once():
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    net(torch.randn(40, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = 5 + torch.randn(4, 10, 2)
    data = x, x.sum(-1, keepdim=True).sin()
    problem = MetaProblem(
        dict(net.named_parameters()),
        lambda params, data: (functional_call(net, params, (data[0],)) - data[1]).pow(2).mean(),
        data,
        data,
        inner_lr=0.1,
        inner_steps=2,
    )
    measure(problem, beta=0.1)
    assert int(net[1].num_batches_tracked) == 1
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
