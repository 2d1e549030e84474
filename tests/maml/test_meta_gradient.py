"""Meta-gradients against a plain autograd loop over tasks and against finite differences, in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_maml_guard import EpisodeBatch, MetaLearningModule
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import conv4, mlp

ALPHA = 0.05


def regression_batch(tasks=3):
    def draw(n):
        return torch.randn(tasks, n, 2).double(), torch.randn(tasks, n, 1).double()

    return EpisodeBatch(draw(6), draw(5))


def image_batch(tasks=2):
    def draw():
        return torch.randn(tasks, 5, 1, 16, 16).double(), torch.arange(5).expand(tasks, 5)

    return EpisodeBatch(draw(), draw())


CASES = {
    "mlp": (lambda: mlp(2, (8,), 1, activation="tanh"), regression_batch),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)),
        regression_batch,
    ),
    "conv4 batch norm": (lambda: conv4(filters=4, image_size=16), image_batch),
    "running statistics": (
        lambda: nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)),
        regression_batch,
    ),
}


def loss_of(module, params, x, y):
    """The task loss computed apart from the module's own path: batch statistics by switching the layer."""
    buffers = {n: b.clone() for n, b in module.network.named_buffers()}
    return module.loss(functional_call(module.network.train(), {**params, **buffers}, (x,)), y)


def plain_loop(module, batch, order, steps):
    """MAML as the textbooks write it: a loop over tasks with torch.autograd.grad."""
    total = None
    for xs, ys, xq, yq in zip(*batch.support, *batch.query, strict=True):
        theta = {n: p.detach().clone().requires_grad_() for n, p in module.network.named_parameters()}
        if order == "simplified":
            g = torch.autograd.grad(loss_of(module, theta, xq, yq), list(theta.values()), create_graph=True)
            s = torch.autograd.grad(loss_of(module, theta, xs, ys), list(theta.values()))
            product = torch.autograd.grad(g, list(theta.values()), grad_outputs=s)
            gradient = [a.detach() - steps * ALPHA * b for a, b in zip(g, product, strict=True)]
        else:
            fast = dict(theta)
            for _ in range(steps):
                inner = torch.autograd.grad(
                    loss_of(module, fast, xs, ys), list(fast.values()), create_graph=order == "exact"
                )
                fast = {n: p - ALPHA * g for (n, p), g in zip(fast.items(), inner, strict=True)}
            if order == "first":
                fast = {n: p.detach().requires_grad_() for n, p in fast.items()}
            gradient = torch.autograd.grad(
                loss_of(module, fast, xq, yq), list((theta if order == "exact" else fast).values())
            )
        total = gradient if total is None else [a + b for a, b in zip(total, gradient, strict=True)]
    return torch.cat([g.flatten() / len(batch.support[0]) for g in total])


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


def relative(found, reference):
    return float((found - reference).norm() / reference.norm())


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("order", ["exact", "first", "simplified"])
@pytest.mark.parametrize("name", CASES)
def test_meta_gradients_are_those_of_a_plain_loop(name, order, steps, looped):
    make, draw = CASES[name]
    module, batch = (
        MetaLearningModule(make().double(), inner_lr=ALPHA, inner_steps=steps, order=order),
        draw(),
    )
    module.task_map.looped = looped
    found = meta_gradient(module.meta_problem(batch), tasks=module.task_map)
    assert relative(flat(found.gradients), plain_loop(module, batch, order, steps)) < 1e-9
    assert module.task_map.looped == looped


@pytest.mark.parametrize("name", ["mlp", "layer norm", "running statistics"])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_exact_meta_gradient_agrees_with_finite_differences(name, steps):
    make, draw = CASES[name]
    module, batch = MetaLearningModule(make().double(), inner_lr=ALPHA, inner_steps=steps), draw()
    found = meta_gradient(module.meta_problem(batch))
    direction = {n: torch.randn_like(p) for n, p in module.theta().items()}

    def meta_loss(h):
        with torch.no_grad():
            for n, p in module.theta().items():
                p.add_(h * direction[n])
        value = meta_gradient(module.meta_problem(batch)).losses.mean()
        with torch.no_grad():
            for n, p in module.theta().items():
                p.sub_(h * direction[n])
        return value

    slope = (meta_loss(1e-5) - meta_loss(-1e-5)) / 2e-5
    assert float(flat(found.gradients) @ flat(direction)) == pytest.approx(float(slope), rel=1e-6)


def test_simplified_is_the_posters_g_minus_alpha_h_g_when_support_is_query():
    module = MetaLearningModule(mlp(2, (8,), 1, activation="tanh").double(), inner_lr=ALPHA, order="simplified")
    batch = regression_batch(1)
    batch = EpisodeBatch(batch.support, batch.support)
    from tests.helpers import dense_hessian, support_loss

    loss = support_loss(module, batch)
    h = torch.from_numpy(dense_hessian(loss, module.theta()))
    g = flat(torch.func.grad(loss)({n: p.detach() for n, p in module.theta().items()}))
    found = flat(meta_gradient(module.meta_problem(batch)).gradients)
    assert relative(found, g - ALPHA * h @ g) < 1e-12


@pytest.mark.parametrize("order", ["exact", "first", "simplified"])
def test_learned_rates_get_their_gradient(order):
    """Exact: finite differences of the meta loss. First-order: -sum of inner gradients times G."""
    module = MetaLearningModule(
        mlp(2, (6,), 1, activation="tanh").double(), inner_lr=ALPHA, learn_inner_lr=True, order=order
    )
    batch = regression_batch(1)
    found = meta_gradient(module.meta_problem(batch), learn_rates=True)
    if order == "exact":
        rate = module.learned_rates[0]

        def meta_loss(h):
            with torch.no_grad():
                rate[0, 1] += h
                value = meta_gradient(module.meta_problem(batch)).losses.mean()
                rate[0, 1] -= h
            return value

        slope = (meta_loss(1e-5) - meta_loss(-1e-5)) / 2e-5
        assert float(found.rate_gradients["0.weight"][0, 1]) == pytest.approx(float(slope), rel=1e-6)
        return
    theta = {n: p.detach() for n, p in module.theta().items()}

    def grads_at(params, data):
        return torch.func.grad(lambda p: module.task_loss(p, (data[0][0], data[1][0])))(params)

    g_s = grads_at(theta, batch.support)
    at = {n: p - ALPHA * g_s[n] for n, p in theta.items()} if order == "first" else theta
    g_q = grads_at(at, batch.query)
    assert relative(flat(found.rate_gradients), flat({n: -g_s[n] * g_q[n] for n in theta})) < 1e-10


def test_parameters_that_are_not_adapted_do_not_move_in_the_inner_loop():
    from lightning_maml_guard.maml.inner_loop import adapt

    module = MetaLearningModule(mlp(2, (6,), 1).double(), inner_lr=ALPHA, adapt="2")
    batch = regression_batch(1)
    problem = module.meta_problem(batch)
    task = (batch.support[0][0], batch.support[1][0])
    theta = {n: p.detach() for n, p in problem.params.items()}
    adapted = adapt(module.task_loss, theta, task, problem.inner_lr, 2)
    assert {n for n in adapted if not torch.equal(adapted[n], theta[n])} == {"2.weight", "2.bias"}


def test_chunks_change_nothing():
    whole = MetaLearningModule(mlp(2, (8,), 1).double(), inner_lr=ALPHA)
    chunked = MetaLearningModule(whole.network, inner_lr=ALPHA, task_chunk_size=2)
    batch = regression_batch(5)
    a = meta_gradient(whole.meta_problem(batch), tasks=whole.task_map)
    b = meta_gradient(chunked.meta_problem(batch), tasks=chunked.task_map)
    assert relative(flat(a.gradients), flat(b.gradients)) < 1e-14
