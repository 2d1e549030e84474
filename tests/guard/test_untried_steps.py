"""Optimizers whose steps cannot be tried: where the curvature does not judge the rates, the last loss does."""

import math

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.optim import SGD

from lightning_maml_guard import ConvergenceGuard, MetaProblem
from lightning_maml_guard.messages.reasons import Kind
from tests.helpers import fit, guard_warns, is_free_of_hooks


class NeedsClosure(SGD):
    """Evaluates the loss itself, twice, as SAM does."""

    def step(self, closure):
        loss = closure()
        closure()
        super().step()
        return loss


class Square(LightningModule):
    """Loss ``w**2``: a step multiplies ``w`` by ``1 - 2 lr`` and the loss by its square."""

    def __init__(self, lr, lr_later=None):
        super().__init__()
        self.weight, self.lr, self.lr_later, self.seen = nn.Parameter(torch.ones(1)), lr, lr_later, []

    def training_step(self, batch, batch_idx):
        self.trainer.optimizers[0].param_groups[0]["lr"] = self.lr_later if batch_idx > 2 and self.lr_later else self.lr
        return (self.weight**2).sum()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))

    def configure_optimizers(self):
        return NeedsClosure(self.parameters(), lr=self.lr)


@pytest.mark.parametrize(
    ("action", "lr", "kind"),
    [("warn", 1.5, Kind.LOSS_DIVERGED), ("log", 1e30, Kind.LOSS_NOT_FINITE), ("stop", 1e30, Kind.LOSS_NOT_FINITE)],
)
@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
def test_a_lost_loss_is_acted_on(action, lr, kind, recwarn):
    """The losses are 1 and ``(1 - 2 lr)**2``, above three times that: the check before step 2 knows."""
    guard, module = ConvergenceGuard(action=action), Square(lr)
    trainer = fit(module, torch.zeros(1), 6, [guard])
    assert module.seen[:2] == [1.0, pytest.approx((1 - 2 * lr) ** 2 if lr < 2 else math.inf)]
    assert guard.advice is not None and guard.advice.step == 2 and kind in {r.kind for r in guard.advice.evidence}
    assert "Look at the rates, the data" in str(guard.advice)
    assert guard.history[0].status == "unresolved"
    assert guard.history[-1].status == "unsafe"
    assert (guard.stopped_step, trainer.global_step) == ((2, 3) if action == "stop" else (None, 6))
    said = [str(each.message) for each in recwarn if "training diverges" in str(each.message)]
    assert len(said) == (action != "log")


@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
def test_rescale_rolls_back_and_halves():
    guard, module = ConvergenceGuard(action="rescale"), Square(1.5)
    with guard_warns(r"rolled back to step 0.*the outer rate is halved: beta = 0.75"):
        trainer = fit(module, torch.zeros(1), 30, [guard])
    assert math.isfinite(module.seen[-1]) and module.seen[-1] < 1e-3 and is_free_of_hooks(trainer)
    assert guard._run.caps.caps.beta == 0.75 and guard._run.state.rollbacks == 1


@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
def test_without_rollback_the_rate_is_halved_where_the_run_is():
    guard, module = ConvergenceGuard(action="rescale", rollback=False), Square(1.5)
    fit(module, torch.zeros(1), 30, [guard])
    assert module.seen[:4] == [1.0, 4.0, 16.0, 4.0] and module.seen[-1] < 1e-3  # at 0.75 the loss falls to a quarter
    assert guard._run.caps.caps.beta <= 0.75 and guard.advice.step == 2


@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
def test_a_run_that_comes_back_is_said_to_and_a_sound_one_hears_nothing_more(caplog):
    with caplog.at_level("INFO"):
        guard = ConvergenceGuard(every_n_steps=8)
        fit(Square(1.5, lr_later=0.25), torch.zeros(1), 20, [guard])
    assert [each.status for each in guard.history][-1] == "unresolved" and guard.advice.step == 2
    said = " ".join(each.getMessage() for each in caplog.records)
    assert "neither the curvature nor the last loss says any more that the run diverges" in " ".join(said.split())
    sound = ConvergenceGuard(every_n_steps=4)
    fit(Square(0.25), torch.zeros(1), 20, [sound])
    assert sound.advice is None and {each.status for each in sound.history} == {"unresolved"}


class MovesBetween(NeedsClosure):
    """Evaluates the loss again where it has moved, as LBFGS does."""

    def step(self, closure):
        closure()
        SGD.step(self)
        return closure()


class Quartic(Square):
    """One inner step on the loss ``(w - x)**4``, whose curvature grows with the distance."""

    def one(self, params, data):
        return ((params["weight"] - data) ** 4).mean()

    def training_step(self, batch, batch_idx):
        gradient = torch.autograd.grad(self.one({"weight": self.weight}, batch), self.weight, create_graph=True)[0]
        return self.one({"weight": self.weight - 0.01 * gradient}, batch)

    def configure_optimizers(self):
        return MovesBetween(self.parameters(), lr=self.lr)

    def meta_problem(self, batch):
        return MetaProblem({"weight": self.weight}, self.one, batch[None], batch[None], inner_lr=0.01)


def test_limits_where_a_run_was_thrown_blame_no_rate(recwarn):
    """And the loss that such a step returns is no mismatch: it is that of parameters that it has moved."""
    guard = ConvergenceGuard()
    fit(Quartic(1.5), torch.zeros(4), 4, [guard])
    assert guard.history[0].alpha_ratio < 1 < guard.history[-1].alpha_ratio
    assert guard.advice is not None and guard.advice.alpha is guard.advice.beta is None
    assert "Look at the rates, the data" in str(guard.advice)
    assert not [each for each in recwarn if "is not what training_step trains" in str(each.message)]
