"""A rollback takes back the averages of the weights that other callbacks keep: what ruins the weights ruins them."""

from itertools import islice

import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn
from torch.optim import SGD

from lightning_maml_guard import ConvergenceGuard
from lightning_maml_guard.optim.rollback_state import ModuleWithAverages
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.utils.lightning_compat import Callback, LightningModule, Trainer
from tests.helpers import QUIET

ODD = 20


class Fit(LightningModule):
    """A line through noisy points, by gradient descent."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1)
        with torch.no_grad():
            self.line.weight.fill_(2.0)

    def training_step(self, batch, batch_idx):
        return (self.line(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.05)


def batches(count, odd):
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(16, 2, generator=generator) for _ in range(count)]
    return [(x, x.sum(1, keepdim=True) * (1e6 if step == odd else 1.0)) for step, x in enumerate(points)]


class Stream:
    """Batches that go on from epoch to epoch."""

    def __init__(self, data, epoch):
        self.rest, self.epoch = iter(data), epoch

    def __iter__(self):
        return islice(self.rest, self.epoch)


@pytest.mark.filterwarnings("ignore:ConvergenceGuard")
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("epoch", [30, ODD + 1])  # the odd batch in the middle of an epoch, or before it is averaged
@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(0.05, 2, 1)]
)
def test_the_average_of_a_run_that_is_rolled_back_is_that_of_its_good_weights(averaging, epoch, first):
    guard, average, module = ConvergenceGuard(action="rescale"), averaging(), Fit()
    callbacks = [guard, average] if first else [average, guard]
    data = batches(3 * epoch, ODD)
    Trainer(callbacks=callbacks, max_epochs=3, **QUIET).fit(module, Stream(data, epoch))
    assert any(event.kind == "rolled back" for event in guard.events)
    with torch.no_grad():
        losses = [float(module.training_step(batch, 0)) for batch in data[:ODD]]
    assert max(losses) < 0.1


class Keeper(Callback):
    """Keeps an average as StochasticWeightAveraging does, counted in a tensor that is None before the first."""

    def __init__(self, average):
        self.average, self.n_averaged, self.teacher = average, None, nn.Linear(5, 5)


def test_a_snapshot_holds_the_average_and_its_count_and_no_other_network():
    module = Fit()
    keeper = Keeper(Fit())
    held, optimizer = ModuleWithAverages(module, [keeper, Callback()]), SGD(module.parameters(), lr=0.1)
    snapshot = Snapshot(held, [optimizer], 0)
    keeper.n_averaged = torch.tensor(3)
    with torch.no_grad():
        for each in (module, keeper.average, keeper.teacher):
            nn.init.constant_(next(each.parameters()), 7.0)
    assert snapshot.fits(held, [optimizer])
    snapshot.restore(held, [optimizer])
    weights = [each.line.weight[0, 0].item() for each in (module, keeper.average)]
    assert weights == [2.0, 2.0]
    assert keeper.n_averaged == 0 and keeper.teacher.weight[0, 0].item() == 7.0


def test_a_module_that_a_callback_holds_is_no_average_of_itself():
    module = Fit()
    held = ModuleWithAverages(module, [Keeper(module), Keeper(module.line)])
    assert len(list(held.buffers())) == 0 and len(list(held.parameters())) == 2
