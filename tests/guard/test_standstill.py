"""Under ``rescale``, a cap that leads nowhere is no rescue: the loss survives, and stands still."""

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from lightning_maml_guard import ConvergenceGuard
from lightning_maml_guard.messages.sentences import rates_lowered
from tests.helpers import guard_warns, one_line

PLAIN = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
STEPS, SIZE = 400, 256


class Ratings(LightningModule):
    """Users and items as vectors whose products are ratings: at a large rate, Adam's noise keeps the loss up."""

    def __init__(self, lr):
        super().__init__()
        torch.manual_seed(0)
        self.users, self.items, self.lr, self.losses, self.applied = (
            nn.Embedding(200, 8),
            nn.Embedding(100, 8),
            lr,
            [],
            [],
        )
        for each in (self.users, self.items):
            nn.init.normal_(each.weight, std=0.3)

    def training_step(self, batch, batch_idx):
        user, item, rating = batch
        loss = ((self.users(user) * self.items(item)).sum(-1) - rating).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        optimizer = Adam(self.parameters(), lr=self.lr)
        optimizer.register_step_post_hook(lambda *_: self.applied.append(optimizer.param_groups[0]["lr"]))
        return optimizer


def ratings():
    draw = torch.Generator().manual_seed(5)
    users, items = (torch.randint(many, (SIZE * STEPS,), generator=draw) for many in (200, 100))
    of_users, of_items = torch.randn(200, 6, generator=draw), torch.randn(100, 6, generator=draw)
    noise = 0.5 * torch.randn(SIZE * STEPS, generator=draw)
    found = (of_users[users] * of_items[items]).sum(-1) + noise
    return DataLoader(TensorDataset(users, items, found), batch_size=SIZE)


def trained(lr, callbacks=()):
    module = Ratings(lr)
    Trainer(max_steps=STEPS, callbacks=[*callbacks], **PLAIN).fit(module, ratings())
    return module, sum(module.losses[-25:]) / 25


def test_a_cap_at_which_the_loss_stands_still_is_lowered(caplog):
    _, good = trained(0.02)
    with guard_warns("beta = 2 is too large"), caplog.at_level("INFO"):
        module, end = trained(2.0, [ConvergenceGuard(action="rescale")])
    assert end < 1.5 * good  # before: 3.4 times
    (said,) = [one_line(each.message) for each in caplog.records if "Applied from now on" in each.message]
    step = int(said.split("step ")[1].split(":")[0])
    assert said.startswith(f"ConvergenceGuard: step {step}: the loss ") and step > 100
    assert module.applied[step] < 0.6 * module.applied[step - 1]
    assert said.endswith(f"beta = {module.applied[step]:.3g}.")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"left_best": True}, "the loss has risen above its lowest mean, and at lower rates the next steps end lower."),
        ({}, "the loss does not fall any more, and at lower rates the next steps end lower."),
        ({"raised": True}, "the loss has not fallen since the outer rate was raised."),
    ],
)
def test_why_rates_are_lowered_is_said(how, why):
    said = rates_lowered(7, float("nan"), 0.5, **{"left_best": False, "raised": False, **how})
    assert said == f"ConvergenceGuard: step 7: {why} Applied from now on: beta = 0.5."
