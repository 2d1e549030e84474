"""A loss whose steps are not along its own gradient, as a policy gradient's: no rate is named for its rise."""

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.optim import SGD, Adam, Adamax

from lightning_maml_guard import ConvergenceGuard, GuardWarning
from lightning_maml_guard.messages.advice import Cause
from lightning_maml_guard.messages.reasons import Kind
from tests.helpers import fit


class Surrogate(LightningModule):
    """Each step moves the weight on; the loss falls from 0 to -1 where the weight is 1, and rises again."""

    def __init__(self, optimizer=SGD):
        super().__init__()
        self.weight, self.optimizer = nn.Parameter(torch.zeros(())), optimizer

    def training_step(self, batch, batch_idx):
        descended = 0.05 * self.weight**2 - self.weight
        return descended + ((self.weight - 1) ** 2 - 1 - descended).detach()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.02)


def said_in(recwarn):
    return [" ".join(str(each.message).split()) for each in recwarn if each.category is GuardWarning]


def test_no_rate_is_named_for_a_loss_that_rises_at_any(recwarn):
    guard = ConvergenceGuard()
    fit(Surrogate(), torch.ones(1), 130, [guard])
    said = said_in(recwarn)
    assert len(said) == 1 and "rises at lower rates too. Look at the data and the loss" in said[0]
    assert guard.advice.cause is Cause.UNKNOWN and guard.advice.alpha is guard.advice.beta is None
    assert "action='rescale'" not in said[0]  # which would undo what was learned


class Quadratic(Surrogate):
    def training_step(self, batch, batch_idx):
        return 10 * (self.weight - 1) ** 2


def test_an_optimizer_without_a_limit_is_judged_by_its_steps(recwarn):
    guard = ConvergenceGuard()
    fit(Quadratic(Adamax), torch.ones(1), 40, [guard])
    assert not said_in(recwarn) and guard.history[0].notes[0].kind is Kind.NOT_JUDGED


@pytest.mark.parametrize("optimizer", [Adam, Adamax])
def test_that_a_rate_has_no_limit_is_no_reason_to_lower_it(optimizer, recwarn):
    guard = ConvergenceGuard()
    fit(Quadratic(lambda params, lr: optimizer(params, lr=50.0)), torch.ones(1), 3, [guard])
    assert guard.advice.cause is Cause.BETA and guard.advice.beta < 10
    assert Kind.NOT_JUDGED not in {each.kind for each in guard.advice.evidence}
    assert len(said_in(recwarn)) == 1 and "not judged" not in said_in(recwarn)[0]


class Kinked(Surrogate):
    """A loss whose curvature cannot be measured: its gradient cannot be differentiated again, and has kinks."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(200))
        self.data = torch.randn(200, 200)

    def training_step(self, batch, batch_idx):
        return torch.cdist(torch.relu(self.data @ self.weight)[None], self.data[:1]).square().mean()


def test_that_no_curvature_could_be_measured_is_no_reason_to_lower_a_rate(recwarn):
    guard = ConvergenceGuard()
    fit(Kinked(lambda params, lr: Adam(params, lr=50.0)), torch.ones(1), 3, [guard])
    assert Kind.NOT_MEASURED in {each.kind for each in guard.history[0].findings}
    assert guard.advice.cause is Cause.BETA and guard.advice.beta < 10
    assert {each.kind for each in guard.advice.evidence} == {Kind.LOOKAHEAD_DIVERGES, Kind.RATES_TRIED}
    assert not any("could not be measured" in each for each in said_in(recwarn))


class Slow(Surrogate):
    """A loss that hardly falls, at a learning rate that is a share of its limit."""

    def training_step(self, batch, batch_idx):
        return 1 + 0.01 * (self.weight - 1) ** 2


@pytest.mark.parametrize(("optimizer", "share", "said"), [(SGD, 0.001, True), (SGD, 0.4, False), (Adam, 1e-6, False)])
def test_a_rate_far_below_its_limit_may_be_too_low_for_a_loss_that_hardly_falls(optimizer, share, said, recwarn):
    module = Slow(lambda params, lr: optimizer(params, lr=share * 2 / 0.02))
    fit(module, torch.ones(1), 70, [ConvergenceGuard()])
    (told,) = said_in(recwarn)
    assert " fallen: after 64 steps" in told
    assert (f"beta was never above {share:g} of beta_c: a higher rate may learn faster" in told) == said
    assert ("a higher rate" in told) == said
