"""Stacks of plain layers, run for several tasks at once, against vmap of the network, in float64."""

import pytest
import torch
from torch import nn

from lightning_maml_guard import CurvatureOptions, MetaLearningModule, measure
from lightning_maml_guard.kernels import batched_stack
from lightning_maml_guard.kernels.batched_stack import BatchedStack
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import mlp
from tests.helpers import guard_warns

TASKS = 3


def shared():
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(2, 5), act, nn.Linear(5, 5, bias=False), act, nn.Linear(5, 1))


def frozen():
    network = mlp(2, (6,), 1, activation="tanh")
    network[0].weight.requires_grad_(False)
    return network


STACKS = {
    "linear": lambda: nn.Linear(2, 1),
    "shared activation": shared,
    "frozen": frozen,
    "norms": lambda: nn.Sequential(
        nn.LayerNorm(2),
        nn.Sequential(nn.Linear(2, 6), nn.GELU()),
        nn.LayerNorm(6, bias=False),
        nn.Linear(6, 1),
        nn.LayerNorm(1, elementwise_affine=False),
        nn.Linear(1, 1),
    ),
}


def tied():
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(2, 1))


def hooked():
    network = mlp(2, (4,), 1)
    network[0].register_forward_hook(lambda module, given, out: 2 * out)
    return network


OTHERS = {
    "tied": tied,
    "hook": hooked,
    "in place": lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)),
    "dropout": lambda: nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1)),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.Linear(4, 1)),
    "of one's own": lambda: nn.Sequential(type("Own", (nn.Linear,), {})(2, 1)),
}


def batch(labels=False, more=()):
    def draw(n):
        y = torch.randint(2, (TASKS, n)) if labels else torch.randn(TASKS, n, *more, 1).double()
        return torch.randn(TASKS, n, *more, 2).double(), y

    torch.manual_seed(1)
    return draw(4), draw(5)


def made(network, batched=True, **options):
    torch.manual_seed(0)
    module = MetaLearningModule(network().double(), inner_lr=0.05, inner_steps=2, batched=batched, **options)
    for value in module.network.parameters():
        nn.init.normal_(value)
    return module


@pytest.mark.parametrize("order", ["exact", "first", "simplified"])
@pytest.mark.parametrize("name", STACKS)
def test_stacks_give_the_gradient_of_vmap(name, order):
    given = batch(more=(3,) if name == "norms" else ())
    found, expected = (
        meta_gradient(made(STACKS[name], batched, order=order).meta_problem(given)) for batched in (True, False)
    )
    assert made(STACKS[name]).meta_problem(given).task_losses is not None
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=1e-13)


def test_labels_learned_rates_and_losses_of_ones_own_go_with_it():
    def network():
        return mlp(2, (6,), 2, activation="tanh")

    for options, labels in (({}, True), ({"learn_inner_lr": True}, True), ({"loss": nn.L1Loss()}, False)):
        given = batch(labels, () if labels else (1,))
        given = given if labels else tuple((x, y.expand(*y.shape[:-1], 2)) for x, y in given)
        modules = [made(network, batched, **options) for batched in (True, False)]
        found, expected = (
            meta_gradient(each.meta_problem(given), learn_rates=each.learned_rates is not None) for each in modules
        )
        torch.testing.assert_close(found[:3], expected[:3], rtol=1e-12, atol=1e-13)


def test_a_measurement_is_the_same():
    options = CurvatureOptions(tol=1e-10, max_iter=40)
    reports = [
        measure(made(STACKS["norms"], batched).meta_problem(batch()), beta=0.1, curvature=options)
        for batched in (True, False)
    ]
    for name in ("lambda_max", "exact_beta_c", "beta_c_noise"):
        assert getattr(reports[0], name) == pytest.approx(getattr(reports[1], name), rel=1e-8)


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_left_to_vmap(name):
    assert made(OTHERS[name]).meta_problem(batch()).task_losses is None


def test_a_network_that_changes_is_left_to_vmap():
    module = made(STACKS["linear"])
    assert module.meta_problem(batch()).task_losses is not None
    handle = module.network.register_forward_hook(lambda *_: None)
    assert module.meta_problem(batch()).task_losses is None
    handle.remove()
    assert module.meta_problem(batch()).task_losses is not None
    module.network = nn.Sequential(nn.Linear(2, 1)).double()
    assert module.meta_problem(batch()).task_losses is None
    assert made(STACKS["linear"], batched=False).meta_problem(batch()).task_losses is None


def test_off_by_the_switch_of_all_kernels(monkeypatch):
    monkeypatch.setattr(batched_stack, "kernels_enabled", lambda: False)
    assert made(STACKS["linear"]).meta_problem(batch()).task_losses is None


def test_what_does_not_agree_on_the_first_batch_is_not_used(monkeypatch):
    monkeypatch.setattr(BatchedStack, "__call__", lambda self, params, x: x[..., :1] * params["weight"][:, :1, :1])
    module = made(STACKS["linear"])
    with guard_warns("batched matrix products gives another meta-gradient .* Pass batched=False"):
        assert module.meta_problem(batch()).task_losses is None
    assert module.meta_problem(batch()).task_losses is None
