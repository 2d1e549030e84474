"""Runs side by side against one torch optimizer each: every optimizer, groups, clipping, accumulation, vmap or not."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop

from lightning_maml_guard import MetaProblem
from lightning_maml_guard.optim.clipping import trainer_clipping
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem
from lightning_maml_guard.tuner.rungs import RunGradients, Rungs
from lightning_maml_guard.utils.task_map import TaskMap
from lightning_maml_guard.utils.warnings import GuardWarning

ALPHAS, BETAS = torch.tensor([0.05, 0.2, 0.1]).double(), torch.tensor([0.01, 0.3, 0.05]).double()
X = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(2, 4, 3)
Y = (X**2).sum(-1, keepdim=True)


class Trainer:
    """What of a Trainer is read."""

    def __init__(self, value=None, algorithm="norm"):
        self.gradient_clip_val, self.gradient_clip_algorithm = value, algorithm


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def problem(net, alpha=0.1, shift=0.0, **options):
    def loss(params, data):
        return nn.functional.mse_loss(torch.func.functional_call(net, params, (data[0],)), data[1])

    data = X + shift, Y
    return MetaProblem(dict(net.named_parameters()), options.pop("loss", None) or loss, data, data, alpha, **options)


def groups(net, lr):
    return [{"params": net[0].parameters(), "lr": lr}, {"params": net[2].parameters(), "lr": lr / 2}]


def alone(make, alpha, beta, steps, *, clip=None, shifts=(0.0,)):
    """One run, by autograd and the optimizer itself."""
    net = network()
    optimizer = make(groups(net, float(beta)))
    params = dict(net.named_parameters())
    losses = []
    for _ in range(steps):
        total = 0.0
        for shift in shifts:
            for x, y in zip(X + shift, Y, strict=True):
                inner = nn.functional.mse_loss(torch.func.functional_call(net, params, (x,)), y)
                slopes = torch.autograd.grad(inner, list(params.values()), create_graph=True)
                fast = {n: p - alpha * g for (n, p), g in zip(params.items(), slopes, strict=True)}
                total += nn.functional.mse_loss(torch.func.functional_call(net, fast, (x,)), y) / len(X) / len(shifts)
        optimizer.zero_grad()
        total.backward()
        if clip is not None:
            clip(list(net.parameters()))
        optimizer.step()
        losses.append(float(total.detach()))
    return losses, {name: value.detach() for name, value in params.items()}


OPTIMIZERS = {
    "sgd": SGD,
    "momentum": lambda p: SGD(p, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: Adam(p, amsgrad=True),
    "fused": lambda p: Adam(p, fused=True),
    "adamw": lambda p: AdamW(p, weight_decay=0.2),
    "nadam": NAdam,
    "rmsprop": lambda p: RMSprop(p, momentum=0.5, centered=True),
    "adagrad": Adagrad,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_run_is_that_of_its_own_optimizer(name):
    make, net = OPTIMIZERS[name], network()
    rungs = Rungs(problem(net), [make(groups(net, 0.7))], ALPHAS, BETAS, RunGradients())
    losses = torch.stack([rungs.step(problem(net)) for _ in range(5)])
    for run, (alpha, beta) in enumerate(zip(ALPHAS, BETAS, strict=True)):
        expected, params = alone(make, alpha, beta, 5)
        assert losses[:, run].tolist() == pytest.approx(expected, rel=1e-9)
        assert all(torch.allclose(rungs.params[n][run], params[n], rtol=1e-8, atol=1e-10) for n in params)
    assert all(torch.equal(value, other) for value, other in zip(net.parameters(), network().parameters(), strict=True))


@pytest.mark.parametrize("clip", [("norm", 0.3), ("value", 0.05)])
def test_each_run_is_clipped_by_itself(clip):
    net, trained = network(), trainer_clipping(Trainer(clip[1], clip[0]))
    rungs = Rungs(problem(net), [SGD(groups(net, 1.0))], ALPHAS, BETAS, RunGradients(), trained)
    for _ in range(3):
        rungs.step(problem(net))
    for run in range(3):
        _, params = alone(SGD, ALPHAS[run], BETAS[run], 3, clip=trained)
        assert all(torch.allclose(rungs.params[n][run], params[n], rtol=1e-9) for n in params)


def test_dropped_runs_leave_the_others_as_they_are():
    net = network()
    rungs = Rungs(problem(net), [Adam(groups(net, 1.0))], ALPHAS, BETAS, RunGradients())
    rungs.step(problem(net))
    rungs.keep(torch.tensor([True, False, True]))
    for _ in range(2):
        rungs.step(problem(net))
    assert rungs.index.tolist() == [0, 2] and len(rungs) == 2
    _, params = alone(Adam, ALPHAS[2], BETAS[2], 3)
    assert all(torch.allclose(rungs.params[n][1], params[n], rtol=1e-9) for n in params)


@pytest.mark.parametrize("looped", [False, True])
def test_accumulated_batches_are_averaged(looped):
    net, slopes = network(), RunGradients()
    slopes.looped = looped
    both = AccumulatedProblem((problem(net), problem(net, shift=0.5)))
    rungs = Rungs(both, [SGD(groups(net, 1.0))], ALPHAS, BETAS, slopes)
    losses = torch.stack([rungs.step(both) for _ in range(3)])
    expected, params = alone(SGD, ALPHAS[1], BETAS[1], 3, shifts=(0.0, 0.5))
    assert losses[:, 1].tolist() == pytest.approx(expected, rel=1e-9)
    assert all(torch.allclose(rungs.params[n][1], params[n], rtol=1e-9) for n in params)


def test_what_cannot_be_vmapped_trains_one_after_another_and_says_so():
    net = network()

    def stubborn(params, data):
        loss = nn.functional.mse_loss(torch.func.functional_call(net, params, (data[0],)), data[1])
        return loss * (1 if float(loss.detach()) > 0 else -1)

    stated, slopes = problem(net, loss=stubborn, looped=True), RunGradients(TaskMap(looped=True))
    rungs = Rungs(stated, [SGD(groups(net, 1.0))], ALPHAS, BETAS, slopes)
    with pytest.warns(GuardWarning, match="rungs of a ladder of rates cannot be vectorised.* said: "):
        losses = torch.stack([rungs.step(stated) for _ in range(3)])
    expected, params = alone(SGD, ALPHAS[1], BETAS[1], 3)
    assert slopes.looped and losses[:, 1].tolist() == pytest.approx(expected, rel=1e-9)
    assert rungs.losses(stated)[1] < losses[0, 1]


def test_a_loss_that_is_wrong_raises_its_own_error():
    net = network()

    def broken(params, data):
        raise KeyError("mine")

    stated = problem(net, loss=broken, looped=True)
    with pytest.raises(KeyError, match="mine"):
        Rungs(stated, [SGD(groups(net, 1.0))], ALPHAS, BETAS, RunGradients()).step(stated)


@pytest.mark.parametrize("rates", ["by parameter", "by step"])
def test_several_inner_rates_keep_their_proportions(rates):
    net = network()
    named = {"0.weight": torch.tensor(0.1).double(), "2.weight": torch.tensor(0.05).double()}
    inner = named if rates == "by parameter" else torch.tensor([0.1, 0.05]).double()
    stated = problem(net, inner, inner_steps=2)
    found, each = RunGradients(), RunGradients()
    each.looped = True
    params = {name: value.detach().expand(3, *value.shape).clone() for name, value in net.named_parameters()}
    (some, losses), (others, looped) = (s.gradients(stated, params, ALPHAS) for s in (found, each))
    assert not found.looped and torch.allclose(losses, looped, rtol=1e-9)
    assert all(torch.allclose(some[name], others[name], rtol=1e-8, atol=1e-12) for name in some)


def test_plain_training():
    weight = nn.Parameter(torch.tensor([2.0, -1.0]).double())
    stated = PlainProblem({"w": weight}, lambda at: (at["w"] ** 2).sum())
    nan = torch.full((3,), float("nan")).double()
    rungs = Rungs(stated, [SGD([weight], lr=1.0)], nan, BETAS, RunGradients())
    assert rungs.step(stated).tolist() == [5.0] * 3
    assert torch.allclose(rungs.params["w"], weight.detach() * (1 - 2 * BETAS[:, None]))
