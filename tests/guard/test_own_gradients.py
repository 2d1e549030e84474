"""A training_step that takes gradients itself may hold an inner loop, whose rate plain training does not look at."""

from copy import deepcopy

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.autograd import grad as bound_grad
from torch.func import functional_call, grad_and_value
from torch.optim import SGD

from lightning_maml_guard import ConvergenceGuard, GuardWarning
from lightning_maml_guard.messages.advice import Cause
from lightning_maml_guard.messages.reasons import Kind
from tests.helpers import fit

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
ENGINE = torch.autograd._engine_run_backward


class Adapts(LightningModule):
    def __init__(self, inner_lr, lr, how):
        super().__init__()
        torch.manual_seed(0)
        self.network, self.inner_lr, self.lr, self.how = nn.Linear(3, 1), inner_lr, lr, how

    def task_loss(self, params):
        return nn.functional.mse_loss(functional_call(self.network, params, (X,)), Y)

    def training_step(self, batch, batch_idx):
        params = dict(self.network.named_parameters())
        if self.how is None:
            return self.task_loss(params)
        for _ in range(3):
            if self.how == "func":
                gradient = grad_and_value(self.task_loss)(params)[0]
            else:
                found = self.how(self.task_loss(params), list(params.values()), create_graph=True)
                gradient = dict(zip(params, found, strict=True))
            params = {name: value - self.inner_lr * gradient[name] for name, value in params.items()}
        return self.task_loss(params)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("how", [bound_grad, "func"], ids=["autograd", "func"])
def test_an_inner_loop_that_is_not_stated_is_told_of_once(how, recwarn):
    guard = ConvergenceGuard(every_n_steps=2, action="warn")
    fit(Adapts(0.05, 0.01, how), X, 5, [guard])
    said = [" ".join(str(each.message).split()) for each in recwarn if each.category is GuardWarning]
    assert len(said) == 1 and "training_step takes gradients itself" in said[0] and "`meta_problem`" in said[0]
    assert guard.advice is None and torch.autograd._engine_run_backward is ENGINE


def by_autograd(net, x):
    x = x.clone().requires_grad_()
    slope = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
    return torch.autograd.grad(slope.sum(), x, create_graph=True)[0]


def by_func(net, x):
    return torch.func.vmap(torch.func.jacrev(lambda point: net(point).tanh().sum()))(x)


class Physics(Adapts):
    """A differential equation, or a gradient penalty: derivatives by the data are no inner loop."""

    def training_step(self, batch, batch_idx):
        return (self.how(nn.Sequential(self.network, nn.Tanh()), X) - 1).square().mean()


@pytest.mark.parametrize("how", [by_autograd, by_func])
def test_derivatives_by_the_data_are_no_inner_loop(how, recwarn):
    guard = ConvergenceGuard(every_n_steps=2, action="warn")
    fit(Physics(None, 0.01, how), X, 3, [guard])
    assert guard.history and not [each for each in recwarn if each.category is GuardWarning]


def first_order(loss, params, create_graph):
    return torch.autograd.grad(loss, params)


class Copies(Adapts):
    """Adapts a copy of the network, which autograd does not connect with the parameters."""

    def training_step(self, batch, batch_idx):
        learner = deepcopy(self.network)
        learner.zero_grad()
        nn.functional.mse_loss(learner(X), Y).backward()
        moved = {n: p - self.inner_lr * learner.get_parameter(n).grad for n, p in self.network.named_parameters()}
        return self.task_loss(moved)


@pytest.mark.parametrize("kind, how", [(Adapts, first_order), (Copies, None)])
def test_a_first_order_inner_loop_is_told_of_as_well(kind, how, recwarn):
    fit(kind(0.05, 0.01, how), X, 3, [ConvergenceGuard(every_n_steps=2, action="warn")])
    assert "training_step takes gradients itself" in " ".join(
        str(each.message) for each in recwarn if each.category is GuardWarning
    )


def test_plain_training_hears_nothing_of_it(recwarn):
    guard = ConvergenceGuard(every_n_steps=2, action="warn")
    fit(Adapts(0.05, 0.01, None), X, 3, [guard])
    assert not [each for each in recwarn if each.category is GuardWarning]


def test_advice_about_the_outer_rate_is_conditional(recwarn):
    """The inner rate is 50 times its limit; lowering the outer one to nothing leaves the loss where it is."""
    guard = ConvergenceGuard(every_n_steps=2, action="log")
    fit(Adapts(1.5, 0.01, bound_grad), X, 2, [guard])
    assert not [each for each in recwarn if each.category is GuardWarning]  # action="log" says nothing
    assert guard.advice is not None and guard.advice.cause is Cause.BETA and guard.advice.beta < 0.01
    assert guard.advice.evidence[-1].kind is Kind.OWN_GRADIENTS
    assert "unless it is the rate of an inner loop that is" in str(guard.advice)


class Unscaled(LightningModule):
    """An inner optimizer's root of a second moment that is 0: its derivative is not finite, at any rate."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.line(batch).square().mean()
        return loss + (0 * loss).sqrt()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_guard_that_lowers_rates_is_not_offered_where_none_survives(action):
    guard, module = ConvergenceGuard(action=action), Unscaled()
    with pytest.warns(GuardWarning) as caught:
        fit(module, torch.ones(4, 2), 8, [guard])
    # The step that a Trainer takes before it stops moves nothing, though its gradient is not finite.
    assert bool(torch.isfinite(module.line.weight).all()) == (action == "stop")
    said = [" ".join(str(each.message).split()) for each in caught if each.category is GuardWarning]
    assert "training diverges at every rate that was tried. Look at" in said[0] and guard.advice.cause is Cause.UNKNOWN
    assert ("Training stops after" in said[0]) == (action == "stop") and not any("rescale" in each for each in said)
