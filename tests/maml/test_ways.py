"""The meta-gradient by every way of running over tasks, against a plain autograd loop, in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_maml_guard import EpisodeBatch, MetaLearningModule
from lightning_maml_guard.linalg.layout import Layout
from lightning_maml_guard.maml.jacobian import meta_field
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.task_map import task_map
from tests.helpers import guard_warns

ALPHA, WAYS = 0.05, ("all", 2, 3, "loop")  # five tasks: the last chunk is smaller


def vectors(tasks=5):
    return EpisodeBatch(*((torch.randn(tasks, n, 2).double(), torch.randn(tasks, n, 1).double()) for n in (6, 4)))


def images(tasks=3):
    return EpisodeBatch(
        *((torch.randn(tasks, 4, 1, 16, 16).double(), torch.arange(4).expand(tasks, 4)) for _ in range(2))
    )


def normed(norm):
    return lambda: (nn.Sequential(nn.Linear(2, 6), norm(), nn.Tanh(), nn.Linear(6, 1)), vectors())


CASES = {
    "mlp": lambda: (mlp(2, (6,), 1, activation="tanh"), vectors()),
    "conv4": lambda: (conv4(4, filters=3, image_size=16), images()),
    "layer": normed(lambda: nn.LayerNorm(6)),
    "group": normed(lambda: nn.GroupNorm(2, 6)),
    "instance": normed(
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten(1))
    ),
}


def plain(module, batch, order, steps, rates):
    """A loop over tasks with torch.autograd.grad: mean gradients towards theta and towards the rates."""
    theta0 = {n: p.detach() for n, p in module.network.named_parameters()}
    totals, losses = None, []

    def loss(params, x, y):
        if "conv" in type(module.network).__name__.lower():
            names = {n.removeprefix("features."): v for n, v in params.items() if n.startswith("features")}
            hidden = functional_call(module.network.features, names, (x,)).flatten(1)  # torch's own layers
            return module.loss(nn.functional.linear(hidden, params["head.weight"], params["head.bias"]), y)
        return module.loss(functional_call(module.network, params, (x,)), y)

    for xs, ys, xq, yq in zip(*batch.support, *batch.query, strict=True):
        theta = {n: p.clone().requires_grad_() for n, p in theta0.items()}
        alpha = {n: r.detach().clone().requires_grad_() for n, r in rates.items()}
        fast, summed = dict(theta), dict.fromkeys(alpha, 0.0)
        for _ in range(steps):
            inner = torch.autograd.grad(loss(fast, xs, ys), [fast[n] for n in alpha], create_graph=True)
            summed = {n: summed[n] + g for n, g in zip(alpha, inner, strict=True)}
            fast |= {n: fast[n] - alpha[n] * g for n, g in zip(alpha, inner, strict=True)}
        value = loss(fast, xq, yq)
        losses.append(value.detach())
        if order == "exact":
            found = torch.autograd.grad(value, [*theta.values(), *alpha.values()])
            own, of_rates = found[: len(theta)], found[len(theta) :]
        elif order == "first":
            fast = {n: p.detach().requires_grad_() for n, p in fast.items()}
            value = loss(fast, xq, yq)
            own = torch.autograd.grad(value, list(fast.values()))
            of_rates = [-summed[n] * g for n, g in zip(fast, own, strict=True) if n in alpha]
        else:
            g = torch.autograd.grad(loss(theta, xq, yq), list(theta.values()), create_graph=True)
            s = torch.autograd.grad(loss(theta, xs, ys), list(theta.values()))
            move = [
                steps * alpha[n].detach() * each if n in alpha else 0 * each for n, each in zip(theta, s, strict=True)
            ]
            product = torch.autograd.grad(g, list(theta.values()), grad_outputs=move)
            own = [a - b for a, b in zip(g, product, strict=True)]
            of_rates = [-steps * each * a for n, each, a in zip(theta, s, g, strict=True) if n in alpha]
        both = [each.detach() / len(batch.support[0]) for each in (*own, *of_rates)]
        totals = both if totals is None else [a + b for a, b in zip(totals, both, strict=True)]
    return (
        dict(zip(theta0, totals, strict=False)),
        dict(zip(rates, totals[len(theta0) :], strict=True)),
        torch.stack(losses),
    )


def apart(found, expected):
    size = sum(float(each.norm() ** 2) for each in expected.values()) ** 0.5
    return sum(float((found[n] - each).norm() ** 2) for n, each in expected.items()) ** 0.5 / size


@pytest.mark.parametrize("order", ["exact", "first", "simplified"])
@pytest.mark.parametrize(
    ("name", "steps", "form"),
    [
        *((name, steps, "plain") for name in CASES for steps in (1, 3)),
        *((name, 3, form) for name in ("mlp", "layer") for form in ("learned", "anil")),
        ("conv4", 1, "learned"),
    ],
)
def test_every_way_gives_the_gradient_of_a_plain_loop(name, order, steps, form):
    network, batch = CASES[name]()
    network = network.double()
    for value in network.parameters():
        if value.dim() == 1:
            nn.init.uniform_(value, 0.5, 1.5)
    last = {"conv4": "head", "mlp": "2"}.get(name, "3")
    module = MetaLearningModule(
        network,
        inner_lr=ALPHA,
        inner_steps=steps,
        order=order,
        learn_inner_lr=form == "learned",
        adapt=last if form == "anil" else None,
    )
    if form == "learned":
        for rate in module.learned_rates:
            nn.init.uniform_(rate, 0.5 * ALPHA, ALPHA)
    problem = module.meta_problem(batch)
    rates = {n: r for n, r in problem.rates().items() if form != "anil" or n.startswith(last)}
    expected, of_rates, losses = plain(module, batch, order, steps, rates)
    for way in WAYS:
        found = meta_gradient(
            problem,
            tasks=task_map(way, strict=True),
            learn_rates=form == "learned",
            auxiliary=lambda params, query: {"prediction": module.predict(params, query[0])},
        )
        assert apart(found.gradients, expected) < 1e-12
        torch.testing.assert_close(found.losses, losses, rtol=1e-12, atol=0)
        assert found.auxiliary["prediction"].shape[:2] == batch.query[1].shape[:2]
        mean = module.loss(found.auxiliary["prediction"][-1], batch.query[1][-1])
        torch.testing.assert_close(mean, losses[-1], rtol=1e-10, atol=0)
        assert (found.rate_gradients is None) == (form != "learned")
        if form == "learned":
            assert apart(found.rate_gradients, of_rates) < 1e-12
        held = [*found.gradients.values(), *(found.rate_gradients or {}).values(), found.losses, mean]
        assert not any(each.requires_grad for each in held)


@pytest.mark.parametrize("order", ["exact", "first", "simplified"])
def test_the_guards_field_is_the_meta_gradient_by_every_way(order):
    network, batch = CASES["layer"]()
    module = MetaLearningModule(network.double(), inner_lr=ALPHA, inner_steps=2, order=order)
    problem = module.meta_problem(batch)
    params = {n: p.detach().requires_grad_() for n, p in problem.params.items()}
    layout, products = Layout(params), []
    expected = meta_gradient(problem, tasks=task_map("loop")).gradients
    for way in WAYS:
        with double_backward():
            _, gradients, _ = meta_field(problem, task_map(way, strict=True))(params, True)
        assert apart({n: g.detach() for n, g in gradients.items()}, expected) < 1e-12
        v = layout.split(torch.linspace(-1, 1, layout.size, dtype=torch.float64))
        total = sum((gradients[n] * v[n]).sum() for n in v)
        products.append(dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True)))
        bare = meta_field(problem, task_map(way, strict=True))(params, False).gradients
        assert apart(bare, expected) < 1e-12 and not any(g.requires_grad for g in bare.values())
    assert all(apart(product, products[-1]) < 1e-9 for product in products)


@pytest.mark.parametrize("way", WAYS)
def test_dropout_draws_other_masks_for_every_task(way):
    batch = vectors(1)
    batch = EpisodeBatch(*(tuple(each.expand(5, *each.shape[1:]) for each in part) for part in batch))
    module = MetaLearningModule(nn.Sequential(nn.Linear(2, 30), nn.Dropout(0.5), nn.Linear(30, 1)).double())
    found = meta_gradient(module.meta_problem(batch), tasks=task_map(way, strict=True))
    assert len(set(found.losses.tolist())) == 5
    assert all(bool(torch.isfinite(each).all()) for each in found.gradients.values())
    module.network.eval()
    assert len({f"{each:.9f}" for each in meta_gradient(module.meta_problem(batch)).losses.tolist()}) == 1


class Branches(MetaLearningModule):
    def task_loss(self, params, batch):
        loss = super().task_loss(params, batch)
        return loss if float(loss.detach()) > 0.1 else 2 * loss


def test_control_flow_on_data_loops_and_says_so_once():
    network, batch = CASES["mlp"]()
    module, plainly = (kind(network.double(), inner_lr=ALPHA) for kind in (Branches, MetaLearningModule))
    with guard_warns("cannot be vectorised, so they run one after another") as caught:
        for _ in range(2):
            found = meta_gradient(module.meta_problem(batch), tasks=module.task_map)
    assert len(caught) == 1 and module.task_map.looped
    expected, *_ = plain(module, batch, "exact", 1, plainly.meta_problem(batch).rates())
    assert apart(found.gradients, expected) < 1e-12
