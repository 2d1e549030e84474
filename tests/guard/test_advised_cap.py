"""``rescale`` applies the outer rate that is advised: one that survives the next steps may kill a network all the same."""

import math

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.func import functional_call
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_maml_guard import ConvergenceGuard, GuardWarning, MetaLearningModule, MetaProblem, TaskDataModule
from lightning_maml_guard.guard.rescale import RELEASE, released
from lightning_maml_guard.lookahead.ceiling import Ceiling
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.lookahead.results import LookaheadResult
from lightning_maml_guard.messages.advice import Cause
from lightning_maml_guard.messages.reasons import Kind
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid
from tests.helpers import guard_warns, one_line

PLAIN = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Pictures(LightningModule):
    """A small convolutional classifier whose ReLUs die at a large rate: the loss then rests at chance, calmly."""

    def __init__(self, lr, rises_for=0):
        super().__init__()
        torch.manual_seed(1)
        self.lr, self.rises_for, self.losses, self.applied = lr, rises_for, [], []
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(108, 5)
        )

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=self.lr, momentum=0.9)
        optimizer.register_step_post_hook(lambda *_: self.applied.append(optimizer.param_groups[0]["lr"]))
        if not self.rises_for:
            return optimizer
        schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.rises_for))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def pictures(steps):
    draw = torch.Generator().manual_seed(5)
    kinds, labels = torch.randn(5, 1, 10, 10, generator=draw), torch.randint(5, (32 * steps,), generator=draw)
    noisy = kinds[labels] + 3.0 * torch.randn(32 * steps, 1, 10, 10, generator=draw)
    return DataLoader(TensorDataset(noisy, labels), batch_size=32)


def trained(lr, steps=200, rises_for=0, action=None):
    guards = [] if action is None else [ConvergenceGuard(action=action)]
    module = Pictures(lr, rises_for)
    Trainer(max_steps=steps, callbacks=[*guards], **PLAIN).fit(module, pictures(steps))
    return module, sum(module.losses[-25:]) / 25, *guards


def test_a_network_that_would_die_at_a_rate_that_survives_trains_at_the_one_that_is_advised(recwarn):
    _, lost = trained(1.0)
    module, end, guard = trained(1.0, action="rescale")
    said = [one_line(each.message) for each in recwarn if each.category is GuardWarning]
    advised = guard.advice.beta
    assert guard.advice.cause is Cause.BETA and f"beta = {advised:.3g} (action='rescale')." in said[0]
    assert len(said) == 1 and not [each for each in guard.events if each.kind == "rolled back"]
    # Its critical rate, which the next 10 steps survive, is many times that.
    assert max(module.applied[:32]) == pytest.approx(advised) and guard.history[0].beta_c > 2 * advised
    _, followed = trained(advised)
    assert lost > 1.5 and followed < 0.7 and end < 1.25 * followed


def test_a_schedule_that_goes_too_high_is_held_before_it_gets_there(recwarn):
    _, lost = trained(1.0, rises_for=60)
    module, end, guard = trained(1.0, rises_for=60, action="rescale")
    said = [one_line(each.message) for each in recwarn if each.category is GuardWarning]
    assert guard.advice.cause is Cause.SCHEDULE and guard.advice.step == 0
    assert said[0].endswith(f"Applied from now on: beta = {guard.advice.beta:.3g} at most (action='rescale').")
    assert module.applied[0] == pytest.approx(1 / 60, rel=1e-3) and max(module.applied[:32]) <= 1.05 * guard.advice.beta
    assert lost > 1.5 and end < 0.7


class Looks(ConvergenceGuard):
    """Keeps the cap on the outer rate at every step."""

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.caps = [*getattr(self, "caps", []), self._run.caps.caps.beta]


def test_maml_begins_at_the_rate_whose_trial_ended_lowest_and_goes_up_when_it_may():
    torch.manual_seed(0)
    module = MetaLearningModule(
        mlp(activation="tanh"), inner_lr=0.02, inner_steps=2, optimizer=lambda p: SGD(p, lr=1.0, momentum=0.9)
    )
    guard = Looks(action="rescale")
    with guard_warns("step 0: beta = 1 is too large"):
        Trainer(max_steps=40, callbacks=[guard], **PLAIN).fit(module, TaskDataModule(Sinusoid(), meta_batch_size=5))
    (tried,) = [each.beta for each in guard.advice.evidence if each.kind is Kind.RATES_TRIED]
    assert guard.advice.step == 0 and guard.advice.beta < tried < 1.0
    assert guard.caps[:32] == [pytest.approx(tried)] * 32
    # Nothing above may be tried before step 32, so the look that would be wasted earlier comes then.
    assert 32 in [step for step, _ in guard.severities]


def levels(ends):
    """Look ahead where the loss ends at a level for each applied meta rate."""
    return lambda caps: LookaheadResult(
        (1.0, *[next(end for most, end in ends if caps.applied(0.1, 8.0)[1] <= most)] * 2)
    )


@pytest.mark.parametrize(
    ("ends", "advised", "expected"),
    [
        ([(9.0, 1.0)], 0.1, 0.1),  # dead: no rate leads anywhere
        ([(9.0, 1.0)], None, 0.8),
        ([(0.15, 0.9), (0.3, 0.8), (9.0, 0.8)], 0.1, 0.2),  # as long as higher rates lead further down
        ([(0.15, 0.9), (0.3, 0.93), (9.0, 0.8)], 0.1, 0.1),
        ([(0.15, 0.9), (9.0, 0.93)], 0.8, 0.8),  # elsewhere no less far is enough
        ([(0.3, 0.9), (9.0, 0.5)], 0.4, 0.4),  # up to the advised rate as elsewhere
    ],
)
def test_above_the_advised_rate_caps_rise_where_higher_rates_lead_further_down(ends, advised, expected):
    look, caps = levels(ends), Caps(None, 0.1)
    assert RELEASE == 2.0
    found = released(0.1, 8.0, caps, look(caps), look, advised=Caps(None, advised))
    assert found == Caps(None, pytest.approx(expected))


def test_rates_above_the_advised_one_are_tried_after_a_while():
    for ceiling in (Ceiling().with_advised(0.1, 0), Ceiling().with_failure(math.nan, 1.0, 0).with_advised(0.1, 0)):
        for inner in (math.nan, 0.5):
            tried = [ceiling.allows(Caps(None, beta), inner, 1.0, step) for beta in (0.1, 0.2) for step in (8, 32)]
            assert tried == [True, True, False, True]
    assert Ceiling().with_failure(math.nan, 1.0, 0).allows(Caps(None, 0.2), math.nan, 1.0, 8)


def test_rates_above_the_advised_one_wait_until_something_was_learned():
    """What a rate kills before that looks as it did."""
    ceiling = Ceiling().with_advised(0.1, 0)
    for learned in (True, False):
        assert ceiling.allows(Caps(None, 0.2), math.nan, 1.0, 40, learned=learned) is learned
        assert ceiling.allows(Caps(None, 0.1), math.nan, 1.0, 40, learned=learned)
        assert Ceiling().allows(Caps(None, 0.2), math.nan, 1.0, 40, learned=learned)


class Tasks(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        height = 0.5 + 4 * torch.rand(4, 1, 1, generator=draw)
        x = 6 * torch.rand(4, 20, 1, generator=draw) - 3
        y = height * torch.sin(x)
        return (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])


class Proximal(LightningModule):
    """An inner loop that is pulled back to where it started, as iMAML's, and steps taken by hand."""

    def __init__(self, inner_lr, steps=4):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization, self.inner_lr, self.steps = False, inner_lr, steps
        self.net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))

    def task_loss(self, params, data):
        return (functional_call(self.net, params, (data[0],)) - data[1]).square().mean()

    def pulled(self, params, grads, start):
        start = params if start is None else start
        return {n: params[n] - (grads[n] + 2.0 * (params[n] - start[n])) for n in params}, start

    def meta_problem(self, batch):
        params = dict(self.net.named_parameters())
        return MetaProblem(params, self.task_loss, *batch, self.inner_lr, self.steps, inner_update=self.pulled)

    def training_step(self, batch, batch_idx):
        params, losses = dict(self.net.named_parameters()), []
        for x, y, query_x, query_y in zip(*batch[0], *batch[1], strict=True):
            fast = params
            for _ in range(self.steps):
                found = torch.autograd.grad(self.task_loss(fast, (x, y)), list(fast.values()), create_graph=True)
                step = {n: g + 2.0 * (fast[n] - params[n]) for n, g in zip(fast, found, strict=True)}
                fast = {n: value - self.inner_lr * step[n] for n, value in fast.items()}
            losses.append(self.task_loss(fast, (query_x, query_y)))
        loss = torch.stack(losses).mean()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize(("inner_lr", "cause"), [(0.02, None), (1.0, Cause.ALPHA)])
def test_an_inner_update_of_ones_own_is_searched_for_its_rate(inner_lr, cause, recwarn):
    """The search compares with the loss before adaptation, where the inner rate is 0."""
    guard = ConvergenceGuard()
    Trainer(max_steps=4, callbacks=[guard], **PLAIN).fit(Proximal(inner_lr), DataLoader(Tasks(), batch_size=None))
    said = [one_line(each.message) for each in recwarn if each.category is GuardWarning]
    assert not [each for each in said if "failed" in each]
    assert (guard.advice.cause if guard.advice else None) == cause
    if cause is not None:  # not one word of the optimizer's lr, or of clipping
        assert said[0].startswith(
            f"ConvergenceGuard: step 0: alpha = 1 is too large. Set the inner rate (inner_lr) to {guard.advice.alpha:.3g}."
        )
        assert guard.advice.alpha < 0.25 and Kind.CLIPPING_NOT_SEEN.value not in guard.state_dict()["announced"]


def test_a_run_goes_back_once_where_an_inner_rate_out_of_reach_alone_is_to_blame(recwarn):
    guard = ConvergenceGuard(action="rescale")
    trainer = Trainer(max_steps=30, callbacks=[guard], **PLAIN)
    trainer.fit(Proximal(8.0, steps=16), DataLoader(Tasks(), batch_size=None))
    said = [one_line(each.message) for each in recwarn if each.category is GuardWarning]
    assert sum("(rollback" in each for each in said) == 1 and trainer.global_step < 10
    assert any("there are no earlier ones that would stay finite" in each for each in said)
    assert guard.advice.cause is Cause.ALPHA and guard.stopped_step is not None
    assert all(value.isfinite().all() for value in trainer.lightning_module.parameters())
