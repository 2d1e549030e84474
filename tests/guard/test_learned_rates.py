"""Inner rates that training learns, and moves away from where they converge."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, GuardWarning, MetaProblem
from lightning_maml_guard.messages.reasons import Kind
from lightning_maml_guard.utils.lightning_compat import LightningModule, Trainer, seed_everything
from tests.helpers import QUIET, one_line


class LearnsRates(LightningModule):
    """Exact MAML of two inner steps, with a learned inner rate for each parameter."""

    def __init__(self, learned):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
        for name, _ in self.net.named_parameters():
            self.register_parameter(f"rate_{name.replace('.', '_')}", nn.Parameter(torch.tensor(0.05), learned))

    def rates(self):
        return {name: getattr(self, f"rate_{name.replace('.', '_')}") for name, _ in self.net.named_parameters()}

    def task_loss(self, params, data):
        return (functional_call(self.net, params, (data[0],)) - data[1]).square().mean()

    def training_step(self, batch, batch_idx):
        losses, rates = [], self.rates()
        for x, y, query_x, query_y in zip(*batch, strict=True):
            params = dict(self.net.named_parameters())
            for _ in range(2):
                gradients = torch.autograd.grad(self.task_loss(params, (x, y)), [*params.values()], create_graph=True)
                params = {n: p - rates[n] * g for (n, p), g in zip(params.items(), gradients, strict=True)}
            losses.append(self.task_loss(params, (query_x, query_y)))
        return torch.stack(losses).mean()

    def meta_problem(self, batch):
        return MetaProblem(dict(self.net.named_parameters()), self.task_loss, batch[:2], batch[2:], self.rates(), 2)

    lr = 0.05

    def configure_optimizers(self):
        return SGD([each for each in self.parameters() if each.requires_grad], lr=self.lr)


def sines(count):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        height, phase = (torch.rand(4, 1, 1, generator=generator) for _ in range(2))
        x = torch.rand(4, 16, 1, generator=generator) * 6 - 3
        y = (0.5 + 2 * height) * torch.sin(x + 3.1 * phase)
        batches.append((x[:, :8], y[:, :8], x[:, 8:], y[:, 8:]))
    return batches


def fitted(module, guard):
    trainer = Trainer(max_epochs=1, callbacks=[guard], **QUIET)
    trainer.fit(module, DataLoader(sines(40), batch_size=None))
    return trainer


def test_an_outer_rate_that_lets_learned_rates_run_away_is_advised_lower():
    seed_everything(0, verbose=False)
    guard = ConvergenceGuard()
    with pytest.warns(GuardWarning):
        fitted(LearnsRates(learned=True), guard)
    assert guard.advice.cause.value == "beta" and guard.advice.alpha is None
    seed_everything(0, verbose=False)
    module = LearnsRates(learned=True)
    module.lr = guard.advice.beta
    trainer = fitted(module, ConvergenceGuard(action="log"))
    assert trainer.callback_metrics["guard/unsafe"] == 0 and max(module.rates().values()) < 0.5


def test_advice_names_computed_rates_that_training_has_moved():
    """A lower inner rate to begin with would be moved as far: the rate here is advised above the one it began at."""

    class Computed(LearnsRates):
        """Its rates are no parameters themselves, so that steps tried on copies do not move them."""

        def rates(self):
            return {name: 1.0 * rate for name, rate in super().rates().items()}

    seed_everything(0, verbose=False)
    guard = ConvergenceGuard()
    with pytest.warns(GuardWarning) as caught:
        fitted(Computed(learned=True), guard)
    assert guard.history[0].alpha == pytest.approx(0.05) and guard.advice.cause.value == "alpha"
    assert Kind.RATES_MOVED in [each.kind for each in guard.advice.evidence]
    (said,) = [each for each in (one_line(w.message) for w in caught) if "training has moved the inner rates" in each]
    assert "the largest was 0.05 at step 0 and is 0." in said and "at a lower lr, in a parameter group of their" in said


def test_rates_that_are_not_learned_are_not_said_to_move():
    class Raised(LearnsRates):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 20:
                for rate in self.rates().values():
                    rate.data.fill_(1.0)

    seed_everything(0, verbose=False)
    guard = ConvergenceGuard()
    with pytest.warns(GuardWarning):
        fitted(Raised(learned=False), guard)
    assert guard.advice.cause.value == "alpha"
    assert Kind.RATES_MOVED not in [each.kind for each in guard.advice.evidence]
