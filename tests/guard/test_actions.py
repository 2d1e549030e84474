"""Every action is a class of its own, and one more is a class and a row."""

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, RMSprop
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, GuardWarning
from lightning_maml_guard.guard.actions import ACTIONS, OUT_OF_REACH, Action
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.messages.spelling import IN_PYTHON
from lightning_maml_guard.stability.problems import PlainProblem
from lightning_maml_guard.theory.limits import UNSAFE
from tests.helpers import QUIET, Trainer, fit, guard_warns, is_free_of_hooks, linear_module, one_line, quadratic_batch

BATCH = quadratic_batch([0.3, 1.0, 2.0, 4.0], target=1.0)
# speaks, caps rates, stops, resumes exactly, what it says
EXPECTED = {
    "log": (False, False, False, False, []),
    "warn": (True, False, False, False, ["Or let the guard do it: ConvergenceGuard(action='rescale')."]),
    "rescale": (True, True, False, True, ["Applied from now on: alpha = 0.1, beta = 0.5 (action='rescale')."]),
    "stop": (True, False, True, True, ["Training stops after this step (action='stop')."]),
}


def test_every_action_is_a_class_of_its_own_with_its_attributes():
    assert list(ACTIONS) == list(EXPECTED)
    assert len({type(each) for each in ACTIONS.values()}) == len(ACTIONS)
    for name, action in ACTIONS.items():
        assert type(action).__bases__ == (Action,) and type(action).__name__.lower() == name
        attributes = action.speaks, action.caps_rates, action.stops, action.resumes_exactly
        assert (*attributes, action.effect(IN_PYTHON, "alpha = 0.1, beta = 0.5", helps=True, changed=True)) == EXPECTED[
            name
        ]
        # Where the rate to blame is out of reach, `rescale` is no help to name, and says what would be.
        out_of_reach = [] if name == "warn" else EXPECTED[name][-1]
        if name == "rescale":
            out_of_reach = [f"{out_of_reach[0]} {OUT_OF_REACH}"]
        assert action.effect(IN_PYTHON, "alpha = 0.1, beta = 0.5", helps=False, changed=True) == out_of_reach
        assert ConvergenceGuard(action=name).acting is action


@pytest.mark.parametrize(
    ("helps", "why", "way"),
    [
        (True, "a lower rate", ""),
        (False, "a lower lr", f" {OUT_OF_REACH}"),
    ],
)
def test_rescale_says_that_it_lowers_nothing(helps, why, way):
    said = ACTIONS["rescale"].effect(IN_PYTHON, "alpha = 0.1, beta = 0.5", helps=helps, changed=False)
    assert said == [f"Nothing is lowered: {why} does not bring the loss down (action='rescale').{way}"]


class Mine(Action):
    """Caps the meta rate at a fixed value as soon as the run is unsafe, and stops."""

    caps_rates = True
    stops = True

    def __init__(self):
        self.seen = []

    def decide(self, situation):
        self.seen.append(situation)
        return Caps(None, 0.01) if situation.transition.state == UNSAFE else situation.caps

    def effect(self, spelling, applied, *, helps, changed):
        return [f"Mine: {applied}."]


def test_a_new_action_is_a_class_and_a_row(monkeypatch):
    with pytest.raises(ValueError, match="`action` to be one of .* but got 'mine'"):
        ConvergenceGuard(action="mine")
    mine = Mine()
    monkeypatch.setitem(ACTIONS, "mine", mine)
    with pytest.raises(ValueError, match="'mine'.* but got 'other'"):
        ConvergenceGuard(action="other")
    guard, module = (
        ConvergenceGuard(every_n_steps=2, action="mine", rollback=True),
        linear_module(4, 1.5, inner_lr=0.05),
    )
    with guard_warns(
        r"step 0: beta = 1\.5 is too large\. Set the optimizer's lr to 0\.\d+\. Why: .* Mine: alpha = 0\.05, beta = 0\.01\."
    ) as caught:
        trainer = fit(module, BATCH, 20, [guard])
    assert len([each for each in caught if each.category is GuardWarning]) == 1
    assert trainer.global_step == 1 and guard.stopped_step == 0
    assert [(report.beta, report.beta_applied) for report in guard.history] == [(1.5, 0.01)]
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1.5 and is_free_of_hooks(trainer)
    (situation,) = mine.seen
    assert situation.fails and situation.caps == Caps() and situation.reach_alpha and not situation.rolled_back
    assert situation.lookahead is not None and situation.present.end > situation.present.begin
    assert guard.state_dict()["batches"] == []  # it does not ask for an exact resumption


class Quiet(Mine):
    speaks = False
    stops = False
    resumes_exactly = True


def test_an_action_that_does_not_speak_acts_in_silence(monkeypatch, recwarn):
    monkeypatch.setitem(ACTIONS, "quiet", Quiet())
    guard, batches = ConvergenceGuard(every_n_steps=2, action="quiet"), []
    module = linear_module(4, 1.5, inner_lr=0.05)
    module.on_train_batch_end = lambda *_: batches.append(len(guard.state_dict()["batches"]))
    trainer = fit(module, BATCH, 4, [guard])
    assert not [one_line(each.message) for each in recwarn if each.category is GuardWarning]
    assert trainer.global_step == 4 and guard.history[0].beta_applied == 0.01
    assert batches == [1, 2, 3, 4]


def noting(kind, applied):
    """An optimizer that notes the rates it steps at."""

    class Noted(kind):
        @torch.no_grad()
        def step(self, closure=None):
            loss = None if closure is None else torch.enable_grad()(closure)()
            applied.append(self.param_groups[0]["lr"])
            super().step()
            return loss

    return Noted


class Noting(LightningModule):
    """A line that diverges at its rate; it notes the rates that its optimizers apply, and keeps what it returns."""

    def __init__(self, optimizer, lr=5.0, several=False):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.lr, self.applied, self.kept = nn.Linear(2, 1), lr, [], []
        self.optimizer = noting(optimizer, self.applied)
        self.automatic_optimization, self.several = not several, several

    def training_step(self, batch, batch_idx):
        loss = (self.line(batch).sum(1) - 1).square().mean()
        self.kept.append(loss.detach())
        self.before = [each.detach().clone() for each in self.parameters()]
        if self.several:
            self.zero_grad()
            self.manual_backward(loss)
            for each in self.optimizers():
                each.step()
        return loss

    def meta_problem(self, batch):
        def loss(params):
            return (functional_call(self.line, params, (batch,)).sum(1) - 1).square().mean()

        return PlainProblem(dict(self.line.named_parameters()), loss)

    def on_train_epoch_end(self):
        self.log("mean", torch.stack(self.kept).mean())  # as many modules do: raises where no step was taken

    def configure_optimizers(self):
        held = [[each] for each in self.line.parameters()] if self.several else [self.line.parameters()]
        made = [self.optimizer(each, lr=self.lr) for each in held]
        return made if self.several else made[0]


@pytest.mark.parametrize(("optimizer", "several"), [(SGD, False), (RMSprop, False), (AdamW, False), (SGD, True)])
def test_the_last_step_of_a_run_that_is_stopped_moves_no_parameters(optimizer, several):
    module, guard = Noting(optimizer, several=several), ConvergenceGuard(action="stop")
    with guard_warns(r"Training stops after this step \(action='stop'\)\. It is taken at beta = 0\.$"):
        trainer = fit(module, torch.ones(16, 2), 50, [guard])
    assert guard.stopped_step == len(module.kept) - 1 and set(module.applied[-1 - several :]) == {0.0}
    assert all(torch.equal(each, before) for each, before in zip(module.parameters(), module.before, strict=True))
    assert is_free_of_hooks(trainer) and {each.param_groups[0]["lr"] for each in trainer.optimizers} == {5.0}


def test_steps_that_the_trainer_has_to_take_first_are_taken_at_the_runs_rates():
    module, guard = Noting(SGD), ConvergenceGuard(action="stop")
    with guard_warns(r"The Trainer first reaches min_epochs = 1 and min_steps = 4\.$"):
        fit(module, torch.ones(16, 2), 50, [guard], min_steps=4, max_epochs=9, limit_train_batches=4)
    assert module.applied == [5.0] * 4


def test_a_checkpoint_of_a_run_that_was_stopped_goes_on_at_its_rates(tmp_path):
    batch = torch.randn(16, 2)
    with pytest.warns(GuardWarning, match="Training stops"):
        trainer = fit(Noting(SGD), batch, 50, [ConvergenceGuard(action="stop")])
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    module = Noting(SGD)
    again = Trainer(max_steps=4, callbacks=[ConvergenceGuard(action="log")], **QUIET)
    again.fit(module, DataLoader([batch] * 9, batch_size=None), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    assert module.applied == [5.0] * 3
