"""A training_step that takes gradients itself may hold an inner loop, whose rate plain training does not look at."""

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
