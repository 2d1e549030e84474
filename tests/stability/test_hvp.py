"""Where second derivatives are missing, wrong or not those of one matrix: recognised and named."""

import random

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, GuardWarning, MetaLearningModule, measure
from lightning_maml_guard.linalg.operators import FiniteDifference, Jacobian, gradient_of
from lightning_maml_guard.linalg.pyhessian import largest_eigenvalue
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.stability.hvp import MeasurementCache, NetworkFacts
from lightning_maml_guard.stability.krylov_stopping import Krylov, run_lanczos
from lightning_maml_guard.stability.problems import PlainProblem
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.theory.ritz import rates_from_lanczos
from tests.helpers import dense_by_differences, one_line, symmetric_top


def plain(network, loss):
    params = {name: value for name, value in network.named_parameters() if value.requires_grad}
    return PlainProblem(params, lambda at: loss(lambda *inputs: functional_call(network, at, inputs)))


def true_top(problem):
    """Largest eigenvalue of the Hessian by central differences of plain backward gradients."""
    params = {name: value.detach().double() for name, value in problem.params.items()}
    shapes = [value.shape for value in params.values()]
    centre = torch.cat([value.flatten() for value in params.values()])

    def gradient(theta):
        pieces = theta.split([shape.numel() for shape in shapes])
        leaves = {n: p.reshape(s).clone().requires_grad_() for n, p, s in zip(params, pieces, shapes, strict=True)}
        grads = torch.autograd.grad(problem.loss(leaves), list(leaves.values()), allow_unused=True)
        zeros = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, leaves.values(), strict=True)]
        return torch.cat([g.flatten() for g in zeros])

    return symmetric_top(dense_by_differences(gradient, centre))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(5, 4, mode="mean"), nn.Linear(4, 1)

    def forward(self, indices):
        return self.head(torch.tanh(self.bag(indices)))


def bag_problem():
    torch.manual_seed(0)
    indices, target = torch.randint(0, 5, (7, 3)), torch.randn(7, 1).double()
    return plain(Bag().double(), lambda net: F.mse_loss(net(indices), target))


def ctc_problem():
    torch.manual_seed(0)
    network, x = nn.Linear(3, 4).double(), torch.randn(6, 2, 3).double()
    targets, lengths = torch.randint(1, 4, (2, 2)), (torch.tensor([6, 6]), torch.tensor([2, 2]))
    return plain(network, lambda net: F.ctc_loss(net(x).log_softmax(-1), targets, *lengths))


@pytest.mark.parametrize("make", [bag_problem, ctc_problem])
def test_finite_differences_step_in_where_there_is_no_double_backward(make):
    problem, cache = make(), MeasurementCache()
    report = measure(
        problem, beta=0.1, cache=cache, curvature=CurvatureOptions(criterion="simplified", tol=1e-4, max_iter=40)
    )
    true = true_top(problem)
    assert report.lambda_max == pytest.approx(true, rel=1e-5)
    assert any("no second derivative by double backward" in notice for notice in report.notices)
    assert set(cache.facts.finite) == {"Hessian"}
    assert (
        measure(
            problem, beta=0.1, cache=cache, curvature=CurvatureOptions(criterion="simplified", tol=1e-4, max_iter=40)
        ).lambda_max
        == report.lambda_max
    )


class Wrong(torch.autograd.Function):
    """The square, whose backward forgets that it depends on the input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.detach())
        return x * x

    @staticmethod
    def backward(ctx, output):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * output


def test_a_wrong_double_backward_is_found_by_the_self_check():
    problem = PlainProblem({"w": nn.Parameter(torch.tensor([1.0, 2.0]).double())}, lambda p: Wrong.apply(p["w"]).sum())
    report = measure(problem, beta=0.1, curvature=CurvatureOptions(criterion="simplified"))
    assert report.lambda_max == pytest.approx(2.0, rel=1e-6)
    (notice,) = report.notices
    assert "disagrees with finite differences by 100.0%" in notice and "double backward is wrong" in notice


def test_a_loss_over_its_own_detached_value_is_measured_as_the_update_that_it_is():
    def loss(p):
        value = p["w"].square().sum()
        return value / (1 + value.detach())

    weight = torch.tensor([1.0, 2.0]).double()
    report = measure(PlainProblem({"w": nn.Parameter(weight)}, loss), beta=0.1)
    update = 2 * torch.eye(2) / 6 - 4 * torch.outer(weight, weight) / 36  # d/dw of 2w / (1 + w.w)
    assert report.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(update)[-1]), rel=1e-6)
    assert "or the loss holds a value that was detached" in report.notices[0]


def test_where_a_run_has_been_thrown_nothing_is_compared_and_later_it_is():
    """There kinks and overflow make differences and double backward disagree, and no layer is wrong."""
    problem = PlainProblem({"w": nn.Parameter(torch.tensor([1.0, 2.0]).double())}, lambda p: Wrong.apply(p["w"]).sum())
    cache, simplified = MeasurementCache(checks=False), CurvatureOptions(criterion="simplified")
    thrown = measure(problem, beta=0.1, curvature=simplified, cache=cache)
    cache.checks = True
    later = measure(problem, beta=0.1, curvature=simplified, cache=cache)
    assert [any("disagrees" in notice for notice in each.notices) for each in (thrown, later)] == [False, True]


def test_an_operator_that_changes_between_products_is_named():
    torch.manual_seed(0)
    network, x, y = mlp(2, (16,), 1, activation="tanh").double(), torch.randn(9, 2).double(), torch.randn(9, 1).double()

    draw = random.Random(0)

    def forgetful(net):
        # Another factor in every backward pass.
        found = net(x)
        found.register_hook(lambda gradient: gradient * (1 + draw.random()))
        return F.mse_loss(found, y)

    report = measure(
        plain(network, forgetful),
        beta=0.1,
        cache=MeasurementCache(NetworkFacts(checked={"Hessian"})),
        curvature=CurvatureOptions(criterion="simplified"),
    )
    assert report.status == "unresolved"
    assert "do not belong to one symmetric matrix" in report.reasons[0] and "torch's generator" in report.reasons[0]


def test_differences_that_kinks_make_coarse_are_named_as_such():
    """A distance has no double backward; beside ReLUs, differences of its gradients belong to no one matrix."""
    torch.manual_seed(0)
    network, x, y = mlp(2, (48, 48), 4, activation="relu"), torch.randn(12, 2), torch.randn(5, 2)
    loss = lambda net: -torch.cdist(net(x), net(y)).square().log_softmax(-1)[:, 0].mean()  # noqa: E731
    report = measure(plain(network, loss), beta=0.1)
    assert report.status == "unresolved" and any("_cdist_backward" in notice for notice in report.notices)
    assert "kinks (ReLU, max-pool, a distance of 0)" in report.reasons[0]
    assert "torch's generator" not in report.reasons[0]


def test_a_process_checks_a_networks_second_derivatives_once():
    module = MetaLearningModule(mlp(1, (4,), 1, activation="tanh"))
    batch = Sinusoid().sample(2, torch.Generator().manual_seed(0))
    first, second = (measure(module.meta_problem(batch), beta=0.1) for _ in range(2))
    assert first.cost > second.cost + 5 and first.exact_beta_c == second.exact_beta_c
    module.network[1] = nn.Softplus()  # another layer, and another Hessian
    assert measure(module.meta_problem(batch), beta=0.1).cost > second.cost + 5
    assert measure(module.meta_problem(batch), beta=0.1, cache=MeasurementCache()).cost > second.cost + 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_gives_one_stable_number(dtype):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 1)).to(dtype)
    module = MetaLearningModule(network, inner_lr=0.01)
    batch = Sinusoid().sample(4, torch.Generator().manual_seed(0))
    problem = module.meta_problem(tuple(tuple(part.to(dtype) for part in pair) for pair in batch))
    first = measure(problem, beta=0.1)
    torch.rand(5)
    second = measure(problem, beta=0.1)
    assert first.lambda_max == second.lambda_max and first.exact_beta_c == second.exact_beta_c
    assert first.status == "safe" and not first.notices


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_finite_differences_are_the_products_on_a_smooth_network(dtype, tolerance):
    torch.manual_seed(0)
    network, x = mlp(2, (6,), 1, activation="tanh").to(dtype), torch.randn(9, 2).to(dtype)
    params = {name: value.detach() for name, value in network.named_parameters()}
    field = gradient_of(lambda p: functional_call(network, p, (x,)).pow(2).mean())
    vector = torch.randn(Jacobian(field, params).layout.size).to(dtype)
    product = Jacobian(field, params)(vector)
    assert (FiniteDifference(field, params)(vector) - product).norm() / product.norm() < tolerance


def test_the_guard_says_it_once():
    module = Bag().double()
    indices = torch.randint(0, 5, (7, 3))

    from lightning_maml_guard.utils.lightning_compat import LightningModule
    from tests.stability.test_plain_training import train

    class Training(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = module

        def training_step(self, batch, batch_idx):
            return self.net(indices).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    with pytest.warns(GuardWarning) as caught:
        train(Training(), [ConvergenceGuard(every_n_steps=2)])
    said = [one_line(w.message) for w in caught if w.category is GuardWarning]
    assert len(said) == 1 and "finite differences of gradients" in said[0]


def spectra():
    rng = np.random.default_rng(0)
    for index in range(1000):
        n = int(rng.integers(2, 30))
        kind = index % 5
        values = rng.standard_normal(n) * 10 ** rng.uniform(-2, 2)
        if kind == 1:  # clustered top
            values = np.sort(values)
            values[-min(3, n) :] = abs(values).max() * (1 + 1e-4 * rng.standard_normal(min(3, n)))
        elif kind == 2:
            values = np.abs(values)
        elif kind == 3:  # the most negative dominates
            values[0] = -1.5 * abs(values).max()
        elif kind == 4:
            values = np.array([2.0, -2.0])
        yield kind, np.linalg.qr(rng.standard_normal((len(values), len(values))))[0], values


def test_a_thousand_spectra_have_the_right_sign_and_lie_in_their_intervals():
    wrong, beside = 0, []
    for index, (_, basis, values) in enumerate(spectra()):
        matrix = torch.as_tensor(basis * values @ basis.T)
        run = run_lanczos(lambda v, m=matrix: m @ v, len(values), matrix, None, krylov=Krylov())
        rates = rates_from_lanczos(*run.runs[0], 0.0, rounding=1e-14, resolution=1e-2)
        low, high = rates.lambda_max_interval
        size = np.abs(values).max()
        inside = low - 1e-12 * size <= values.max() <= high + 1e-12 * size
        sign = np.sign(rates.lambda_max) == np.sign(values.max())
        wrong += not (inside and sign)
        if index < 50:
            scipys = (
                scipy.sparse.linalg.eigsh(matrix.numpy(), k=1, which="LA")[0][0] if len(values) > 2 else max(values)
            )
            assert rates.lambda_max == pytest.approx(scipys, abs=1e-2 * size)
            power = largest_eigenvalue(
                lambda p, m=matrix: 0.5 * p["w"] @ m @ p["w"],
                {"w": torch.ones(len(values)).double()},
                max_iter=100,
                tol=1e-3,
            )
            beside.append(abs(power.lambda_max - values.max()) / size)
    print(
        f"Lanczos wrong: {wrong} of 1000; PyHessian's errors on 50: median {np.median(beside):.1e}, "
        f"largest {max(beside):.1e}"
    )
    assert wrong == 0
