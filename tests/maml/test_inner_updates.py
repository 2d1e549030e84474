"""Inner loops with rates of each step (MAML++), and with an optimizer of their own."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim import SGD

from lightning_maml_guard import MetaLearningModule, MetaProblem
from lightning_maml_guard.maml import inner_updates
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.utils.task_map import TaskMap
from tests.helpers import fit

ORDERS = ["exact", "first", "simplified"]
K = 5
X, QX = (torch.randn(3, n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (6, 4))
SUPPORT, QUERY = (X, X.sum(-1, keepdim=True).sin()), (QX, QX.sum(-1, keepdim=True).cos())


def network(width=5):
    """With ``width=5`` a bias is as long as there are inner steps."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()


def loss_of(net):
    return lambda params, data: ((functional_call(net, params, (data[0],)) - data[1]) ** 2).mean()


def tasks():
    return [tuple((x[i], y[i]) for x, y in (SUPPORT, QUERY)) for i in range(3)]


def slopes(value, params):
    return dict(zip(params, torch.autograd.grad(value, list(params.values()), create_graph=True), strict=True))


def by_hand(net, params, rates, order="exact"):
    """Mean query loss after adaptation with ``rates[name][k]``, written out; its gradients by autograd."""
    loss, total = loss_of(net), 0.0
    for support, query in tasks():
        fast = params
        for k in range(K):
            step = slopes(loss(fast, support), fast)
            if order == "first":
                step = {name: each.detach() for name, each in step.items()}
            fast = {name: value - rates[name][k] * step[name] for name, value in fast.items()}
        total = total + loss(fast, query) / 3
    return total


@pytest.mark.parametrize("order", ["exact", "first"])
def test_mamlpp_trains_as_a_hand_written_loop(order):
    """Per-layer per-step learned rates, K = 5, by the Trainer: 1e-9."""
    arguments = {"inner_lr": 0.05, "inner_steps": K, "learn_inner_lr": "per_step", "order": order}
    module = MetaLearningModule(network(), optimizer=lambda p: SGD(p, lr=0.1), **arguments)
    assert [rate.shape for rate in module.learned_rates] == [(K,)] * 4
    net = network()
    params = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    rates = {name: torch.full((K,), 0.05, dtype=torch.float64, requires_grad=True) for name in params}
    for _ in range(4):
        trained = [*params.values(), *rates.values()]
        gradients = torch.autograd.grad(by_hand(net, params, rates, order), trained)
        with torch.no_grad():
            for value, gradient in zip(trained, gradients, strict=True):
                value -= 0.1 * gradient
    fit(module, (SUPPORT, QUERY), 4)
    for found, expected in zip([*module.network.parameters(), *module.learned_rates], trained, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(rate.detach().unique().numel() == K for rate in module.learned_rates)


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("kind", ["all", "by name", "by entry"])
@pytest.mark.parametrize("order", ORDERS)
def test_rates_of_each_step_give_the_hand_written_gradient(order, kind, looped):
    net = network()
    params = dict(net.named_parameters())
    draw = torch.Generator().manual_seed(1)
    shared = torch.rand(K, dtype=torch.float64, generator=draw) / 10
    given = {
        "all": shared,
        "by name": {n: torch.rand(K, dtype=torch.float64, generator=draw) / 10 for n in params},
        "by entry": {n: torch.rand(K, *v.shape, dtype=torch.float64, generator=draw) / 10 for n, v in params.items()},
    }[kind]
    rates = dict.fromkeys(params, given) if kind == "all" else given
    problem = MetaProblem(params, loss_of(net), SUPPORT, QUERY, given, K, order)
    assert problem.per_step and problem.alpha == max(float(rate.max()) for rate in rates.values())
    found = meta_gradient(problem, tasks=TaskMap(looped=looped)).gradients
    if order == "simplified":
        expected = dict.fromkeys(params, 0.0)
        for support, query in tasks():
            step, at = (slopes(loss_of(net)(params, each), params) for each in (support, query))
            along = sum((at[n] * (rates[n].sum(0) * step[n]).detach()).sum() for n in params)
            product = slopes(along, params)
            expected = {n: expected[n] + (at[n] - product[n]) / 3 for n in params}
    else:
        expected = slopes(by_hand(net, params, rates, order), params)
    for name in params:
        torch.testing.assert_close(found[name], expected[name].detach(), rtol=1e-9, atol=1e-12)


def test_a_rate_of_each_step_trains_and_evaluates_beyond_its_steps():
    module = MetaLearningModule(network(), inner_lr=[0.1, 0.02], inner_steps=2, eval_inner_steps=4)
    assert module.hparams.inner_lr == [0.1, 0.02]
    assert module.meta_problem((SUPPORT, QUERY)).alpha == pytest.approx(0.1)
    module.inner_lr_cap = 0.05
    torch.testing.assert_close(module.rates(), torch.tensor([0.05, 0.01], dtype=torch.float64))
    module.inner_lr_cap = None
    trainer = fit(module, (SUPPORT, QUERY), 2)
    found = trainer.validate(module, torch.utils.data.DataLoader([(SUPPORT, QUERY)], None), verbose=False)[0]
    net, total = module.network, 0.0
    for support, query in tasks():
        fast = dict(net.named_parameters())
        for rate in (0.1, 0.02, 0.02, 0.02):
            step = slopes(loss_of(net)(fast, support), fast)
            fast = {name: value - rate * step[name] for name, value in fast.items()}
        total += float(loss_of(net)(fast, query).detach()) / 3
    assert found["val/loss"] == pytest.approx(total, rel=1e-6)


def test_meta_sgd_and_a_cap_work_with_rates_of_each_step():
    module = MetaLearningModule(network(), inner_lr=[0.2, 0.1], inner_steps=2, learn_inner_lr=True)
    assert [rate.shape for rate in module.learned_rates] == [(2, *v.shape) for v in module.network.parameters()]
    before = [rate.detach().clone() for rate in module.learned_rates]
    module.inner_lr_cap = 0.1
    assert module.meta_problem((SUPPORT, QUERY)).alpha == pytest.approx(0.1)
    fit(module, (SUPPORT, QUERY), 1)
    assert all(bool((a != b).all()) for a, b in zip(module.learned_rates, before, strict=True))


@pytest.mark.parametrize(
    ("rate", "steps", "message"),
    [
        (torch.tensor([0.1, 0.1]), 3, "a tensor of 3 finite rates"),
        (torch.tensor(0.1), 1, "a tensor of 1 finite rates"),
        ({"0.weight": torch.full((3,), 0.1)}, 2, "a leading dimension of the 2 inner steps"),
        ({"0.weight": torch.full((2,), 0.1)}, 2, "can be read in two ways"),
    ],
)
def test_rates_that_are_none_of_the_forms_are_named(rate, steps, message):
    net = nn.Sequential(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=message):
        MetaProblem(dict(net.named_parameters()), loss_of(net), SUPPORT, QUERY, rate, steps)


def test_learned_rates_may_come_in_a_parameter_dict():
    net = nn.Linear(2, 1).double()
    rates = nn.ParameterDict({n: nn.Parameter(torch.full((K,), 0.1).double()) for n, _ in net.named_parameters()})
    problem = MetaProblem(dict(net.named_parameters()), loss_of(net), SUPPORT, QUERY, rates, K)
    assert problem.per_step and problem.alpha == pytest.approx(0.1)


def test_module_arguments_are_checked():
    with pytest.raises(ValueError, match="one for each of the 3 inner steps, but got 2"):
        MetaLearningModule(network(), inner_lr=[0.1, 0.2], inner_steps=3)
    with pytest.raises(ValueError, match="`learn_inner_lr` to be True or False .* but got 'layers'"):
        MetaLearningModule(network(), learn_inner_lr="layers")


UPDATES = {
    "none": (None, lambda p: SGD(p, lr=0.1)),
    "momentum": (inner_updates.Momentum(0.8), lambda p: SGD(p, lr=0.1, momentum=0.8)),
    "nesterov": (inner_updates.Momentum(0.8, nesterov=True), lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True)),
    "adam": (inner_updates.Adam((0.8, 0.9)), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9))),
    "rmsprop": (inner_updates.RMSprop(0.9, momentum=0.5), lambda p: torch.optim.RMSprop(p, 0.1, 0.9, momentum=0.5)),
}


@pytest.mark.parametrize("name", UPDATES)
def test_the_updates_are_those_of_torch(name):
    update, optimizer = UPDATES[name]
    net = network()
    params, optimizer = dict(net.named_parameters()), optimizer(net.parameters())
    support, query = tasks()[0]
    problem = MetaProblem(
        {n: v.detach().clone() for n, v in params.items()},
        loss_of(net),
        [support],
        [query],
        0.1,
        4,
        "first",
        inner_update=update,
    )
    found = meta_gradient(problem)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(net)(params, support).backward()
        optimizer.step()
    assert float(found.losses) == pytest.approx(float(loss_of(net)(params, query).detach()), rel=1e-12)
    expected = slopes(loss_of(net)(params, query), params)
    for key in params:
        torch.testing.assert_close(found.gradients[key], expected[key].detach(), rtol=1e-9, atol=1e-12)


def normed(params, grads, state):
    """An update that is not elementwise, with a count in its state."""
    taken = 1 if state is None else state["taken"] + 1
    mean = grads if state is None else {n: (state["mean"][n] + g) / 2 for n, g in grads.items()}
    moved = {n: value - mean[n] / (1 + mean[n].norm()) / taken for n, value in params.items()}
    return moved, {"taken": taken, "mean": mean}


def adam_by_hand(params, loss, support, alpha):
    first, second = ({n: torch.zeros_like(v) for n, v in params.items()} for _ in range(2))
    for k in range(1, 4):
        g = slopes(loss(params, support), params)
        first = {n: 0.9 * first[n] + 0.1 * g[n] for n in g}
        second = {n: 0.999 * second[n] + 0.001 * g[n] ** 2 for n in g}
        params = {
            n: v - alpha * (first[n] / (1 - 0.9**k)) / ((second[n] / (1 - 0.999**k)).sqrt() + 1e-8)
            for n, v in params.items()
        }
    return params


@pytest.mark.parametrize("looped", [False, True])
def test_exact_maml_through_adam_is_the_hand_written_gradient(looped):
    net = network()
    params, loss = dict(net.named_parameters()), loss_of(net)
    total = sum(loss(adam_by_hand(params, loss, support, 0.01), query) for support, query in tasks()) / 3
    expected = slopes(total, params)
    module = MetaLearningModule(network(), inner_lr=0.01, inner_steps=3, inner_update=inner_updates.Adam())
    problem = module.meta_problem((SUPPORT, QUERY))
    found = meta_gradient(problem, tasks=TaskMap(looped=looped))
    assert float(found.losses.mean()) == pytest.approx(float(total.detach()), rel=1e-12)
    for name in params:
        torch.testing.assert_close(found.gradients[name], expected[name].detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", ["exact", "first"])
def test_an_update_over_whole_tensors_is_the_same_vmapped_and_looped(order):
    net = network()
    params = dict(net.named_parameters())
    problem = MetaProblem(params, loss_of(net), SUPPORT, QUERY, 0.3, 3, order, inner_update=normed)
    alone, beside = (meta_gradient(problem, tasks=TaskMap(looped=each, strict=True)) for each in (True, False))
    for name in params:
        torch.testing.assert_close(beside.gradients[name], alone.gradients[name], rtol=1e-12, atol=1e-15)


def test_a_module_trains_with_adam_inside_and_learns_its_rates():
    arguments = {"inner_lr": 0.01, "inner_steps": 3, "learn_inner_lr": True, "inner_update": inner_updates.Adam()}
    module = MetaLearningModule(network(), optimizer=lambda p: SGD(p, lr=0.05), **arguments)
    assert "inner_update" not in module.hparams
    before = meta_gradient(module.meta_problem((SUPPORT, QUERY))).losses.mean()
    fit(module, (SUPPORT, QUERY), 20)
    assert meta_gradient(module.meta_problem((SUPPORT, QUERY))).losses.mean() < before
    assert all(bool((rate != 0.01).any()) for rate in module.learned_rates)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inner_update": 3}, TypeError, "`inner_update` to be callable"),
        ({"inner_update": normed, "order": "simplified"}, ValueError, "about an inner loop of gradient descent"),
        ({"inner_update": normed, "inner_lr": 0.0}, ValueError, "1.0 for an update that holds its own"),
    ],
)
def test_an_update_that_cannot_be_is_refused(arguments, error, message):
    net = network()
    with pytest.raises(error, match=message):
        MetaProblem(dict(net.named_parameters()), loss_of(net), SUPPORT, QUERY, **{"inner_lr": 0.1, **arguments})


def test_an_update_that_returns_something_else_is_named():
    net = network()
    problem = MetaProblem(
        dict(net.named_parameters()), loss_of(net), SUPPORT, QUERY, 0.1, inner_update=lambda p, g, s: p
    )
    with pytest.raises(TypeError, match="`inner_update` to return \\(params, state\\)"):
        meta_gradient(problem, tasks=TaskMap(looped=True))
