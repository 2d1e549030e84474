"""Tasks of different sizes, listed one by one."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError

from lightning_maml_guard import ConvergenceGuard, EpisodeBatch, MetaLearningModule, MetaProblem, measure
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from tests.helpers import dense_by_differences, dense_hessian, fit

SHOTS = (3, 5, 9, 4)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def task(shots, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shots, 1, dtype=torch.float64, generator=draw)
    return x, (1 + seed) * x.sin()


def sets(shots=SHOTS, queries=(2, 8, 3, 3)):
    return [task(n, i) for i, n in enumerate(shots)], [task(n, 10 + i) for i, n in enumerate(queries)]


def loss_of(net):
    return lambda params, data: ((functional_call(net, params, (data[0],)) - data[1]) ** 2).mean()


def by_hand(net, params, support, query, rate=0.1):
    total, loss = 0.0, loss_of(net)
    for own, asked in zip(support, query, strict=True):
        g = torch.autograd.grad(loss(params, own), list(params.values()), create_graph=True)
        total = total + loss({n: v - rate * s for (n, v), s in zip(params.items(), g, strict=True)}, asked)
    return total / len(support)


@pytest.mark.parametrize("container", [list, tuple])
def test_the_gradient_is_the_mean_over_the_listed_tasks(container):
    net, (support, query) = network(), sets()
    params = dict(net.named_parameters())
    problem = MetaProblem(params, loss_of(net), container(support), container(query), 0.1)
    assert problem.tasks == 4 and problem.part(2).tasks == 2
    found = meta_gradient(problem)
    expected = torch.autograd.grad(by_hand(net, params, support, query), list(params.values()))
    for name, value in zip(params, expected, strict=True):
        torch.testing.assert_close(found.gradients[name], value, rtol=1e-10, atol=1e-13)


def test_curvature_is_that_of_the_ragged_loop():
    """Beside the dense Hessian of the mean support loss, and the dense Jacobian of the meta-gradient."""
    net, (support, query) = network(), sets()
    params = dict(net.named_parameters())
    report = measure(MetaProblem(params, loss_of(net), support, query, 0.1), beta=0.05)
    loss = loss_of(net)
    top = torch.linalg.eigvalsh(
        torch.from_numpy(dense_hessian(lambda p: sum(loss(p, own) for own in support) / 4, params))
    )[-1]
    assert report.lambda_max == pytest.approx(float(top), rel=0.01)
    shapes = {name: value.shape for name, value in params.items()}

    def gradient(flat):
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        at = {n: p.reshape(s).detach().requires_grad_() for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        value = by_hand(net, at, support, query)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(at.values()))])

    jacobian = dense_by_differences(gradient, torch.cat([v.detach().flatten() for v in params.values()]))
    largest = torch.linalg.eigvalsh(torch.from_numpy(jacobian + jacobian.T) / 2)[-1]
    assert report.exact_beta_c == pytest.approx(2 / float(largest), rel=0.01)


def test_lists_of_equal_tasks_are_tasks_however_many_shots_there_are():
    """Four tasks of four shots, four tasks of five shots and eight queries: what a stack of them gives."""
    net = network()
    params = dict(net.named_parameters())
    for shots, queries in ((4, 4), (5, 8)):
        support, query = sets((shots,) * 4, (queries,) * 4)
        stacked = [tuple(torch.stack(each) for each in zip(*data, strict=True)) for data in (support, query)]
        found, expected = (
            meta_gradient(MetaProblem(params, loss_of(net), *data, 0.1)).gradients
            for data in ((support, query), stacked)
        )
        for name in params:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-15)


def test_a_module_trains_validates_and_is_guarded_on_lists():
    net, batch = network(), EpisodeBatch(*sets())
    params = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    for _ in range(3):
        gradients = torch.autograd.grad(by_hand(net, params, *batch), list(params.values()))
        params = {
            n: (v - 0.05 * g).detach().requires_grad_() for (n, v), g in zip(params.items(), gradients, strict=True)
        }
    module = MetaLearningModule(
        network(), inner_lr=0.1, optimizer=lambda p: SGD(p, lr=0.05), metrics=MeanSquaredError()
    )
    guard = ConvergenceGuard(every_n_steps=1)
    trainer = fit(module, batch, 3, [guard])
    for name, value in module.network.named_parameters():
        torch.testing.assert_close(value, params[name], rtol=1e-9, atol=1e-12)
    assert [report.status for report in guard.history] == ["safe"] * 3
    found = trainer.validate(module, DataLoader([batch], None), verbose=False)[0]
    after = float(by_hand(module.network, dict(module.network.named_parameters()), *batch))
    assert found["val/loss"] == pytest.approx(after, rel=1e-6)
    assert found["val/meansquarederror"] == pytest.approx(after, rel=1e-5)


def test_labels_of_listed_tasks_are_checked():
    batch = [(torch.ones(n, 2), torch.arange(n)) for n in (2, 4)]
    with pytest.raises(ValueError, match="class labels between 0 and 2, .* labels from 0 to 3"):
        fit(MetaLearningModule(nn.Linear(2, 3)), (batch, batch), 1)


def test_nested_tuples_that_share_a_leading_dimension_are_read_as_before():
    pair = (torch.ones(4, 3, 1), torch.ones(4, 3, 2))
    problem = MetaProblem({"w": torch.ones(1)}, lambda p, d: p["w"].sum(), (pair, pair), (pair, pair), 0.1)
    assert problem.tasks == 4 and not problem.listed


def test_a_tensor_that_may_be_one_task_is_named_in_both_readings():
    net, (x, y), (q, z) = network(), task(5, 0), task(8, 1)
    with pytest.raises(ValueError, match="5 tasks in `support` and 8 in `query`") as caught:
        MetaProblem(dict(net.named_parameters()), loss_of(net), (x, y), (q, z), 0.1)
    for part in ("(tasks, shots, ...)", "`support` [(5, 1), (5, 1)]", "unsqueeze(0)", "[(x_1, y_1), ...]"):
        assert part in str(caught.value)


def padded(data, width):
    return tuple(
        torch.stack([nn.functional.pad(each[i], (0, 0, 0, width - len(each[i])), value=float("nan")) for each in data])
        for i in range(2)
    )


def test_padding_with_nan_is_told_to_list_the_tasks():
    support, query = (padded(data, 9) for data in sets())
    module = MetaLearningModule(network(), inner_lr=0.1)
    with pytest.raises(ValueError, match=r"Where nan fills tasks .* pass them as lists of tasks instead"):
        fit(module, (support, query), 1)
    net = network()

    def loss(params, data):
        return ((functional_call(net, params, (data[0],)) - data[1]) ** 2).nanmean()

    report = measure(MetaProblem(dict(net.named_parameters()), loss, support, query, 0.1), beta=0.05)
    assert report.status == "unresolved" and "The data holds nan" in report.reasons[0]
    assert "list the tasks instead" in report.reasons[0]
