"""Other callbacks beside the guard, and Lightning's tuners, which train on their own in the middle of a run."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, GuardWarning, LookaheadOptions
from lightning_maml_guard.utils.lightning_compat import Callback, LightningModule, Trainer, seed_everything
from tests.helpers import fit, is_free_of_hooks, left_behind, linear_module, quadratic_batch

EPOCHS, BATCHES, CAP = 3, 5, 0.05
X = torch.randn(4 * BATCHES, 3, generator=torch.Generator().manual_seed(1))
Y = X.sum(1, keepdim=True).sin()
BATCH = quadratic_batch([0.3, 1.0, 2.0, 4.0], target=1.0)


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1))
        self.lr, self.batch_size = 0.1, 4

    def training_step(self, batch, batch_idx):
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", F.mse_loss(self.net(batch[0]), batch[1]))

    def train_dataloader(self):
        return DataLoader(TensorDataset(X, Y), self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(X, Y), 10)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.lr)


class Milestone(LearningRateFinder):
    """Lightning's example: find the rate again in the middle of a run."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        # Lightning 2.6.6 takes no step here (it restores the progress of the epoch before), but it saves the run, takes
        # the callbacks out and restores the run.
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


def found(finder):
    return finder.optimal_lr.results, finder.optimal_lr.suggestion()


NEIGHBOURS = {
    "monitor": (lambda folder: LearningRateMonitor("step"), lambda each: each.lrs),
    "stopping": (
        lambda folder: EarlyStopping("val", patience=1, min_delta=0.05),
        lambda each: (each.stopped_epoch, each.wait_count, float(each.best_score)),
    ),
    "checkpoint": (
        lambda folder: ModelCheckpoint(folder, "{epoch}-{step}", monitor="val", save_top_k=2),
        lambda each: sorted(map(float, each.best_k_models.values())),
    ),
    "averaging": (lambda folder: StochasticWeightAveraging(0.05, 1, 1), lambda each: int(each.n_averaged)),
    "rate finder": (lambda folder: LearningRateFinder(num_training_steps=15), found),
    "rate finder at a milestone": (lambda folder: Milestone(num_training_steps=15), found),
    "batch size finder": (
        lambda folder: BatchSizeFinder(max_trials=2, init_val=2, steps_per_trial=2),
        lambda each: each.optimal_batch_size,
    ),
    "second guard": (
        lambda folder: ConvergenceGuard(
            every_n_steps=4, action="log", curvature=CurvatureOptions(max_iter=5), lookahead=LookaheadOptions(steps=3)
        ),
        lambda each: [(report.step, report.beta_c, report.severity) for report in each.history],
    ),
}


def trainer_with(callbacks, folder):
    return Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=CSVLogger(folder), log_every_n_steps=1, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
    )  # fmt: skip


def run(name, guards, folder):
    make, result = NEIGHBOURS[name]
    seed_everything(3, verbose=False)
    module, neighbour = Regression(), make(folder / "kept")
    trainer = trainer_with([*guards, neighbour], folder)
    trainer.fit(module)
    return module, trainer, result(neighbour)


def flat(product, start):
    return [2 / CAP]


def capping(action="rescale"):
    """A guard by whose measurement the rates are safe up to CAP at every step."""
    return ConvergenceGuard(
        every_n_steps=3, action=action, curvature=CurvatureOptions(estimator=flat), lookahead=LookaheadOptions(steps=0)
    )


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_beside_a_guard_that_logs_all_is_as_without_it(name, tmp_path):
    module, trainer, result = run(name, [], tmp_path)
    expected = left_behind(module, trainer)
    guard = ConvergenceGuard(
        every_n_steps=5, action="log", curvature=CurvatureOptions(max_iter=5), lookahead=LookaheadOptions(steps=3)
    )
    module, trainer, guarded = run(name, [guard], tmp_path)
    assert guarded == result
    assert left_behind(module, trainer) == expected
    assert len(guard.history) > 1


@pytest.mark.parametrize("name", NEIGHBOURS)
@pytest.mark.filterwarnings("ignore:ConvergenceGuard")
def test_beside_a_guard_that_rescales_nothing_stays_behind(name, tmp_path):
    guard = capping()
    module, trainer, _ = run(name, [guard], tmp_path)
    assert is_free_of_hooks(trainer)
    assert {report.beta_applied for report in guard.history} == {min(CAP, report.beta) for report in guard.history}
    assert "log" not in module.__dict__
    assert str(pickle.loads(pickle.dumps(guard)).history) == str(guard.history)  # nothing of the run hangs on it


@pytest.mark.filterwarnings("ignore:ConvergenceGuard")
def test_a_tuner_meets_no_cap_in_the_middle_of_a_capped_run(applied, tmp_path):
    """It looks for the rate of the schedule, so it must see the loss at the rates it tries."""

    class Tuning(Callback):
        """As Lightning's tuners do: the run's own optimizer, other callbacks."""

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                callbacks, trainer.callbacks = trainer.callbacks, []
                (optimizer,) = trainer.optimizers
                for value in pl_module.parameters():
                    value.grad = torch.zeros_like(value)
                for rate in (0.2, 0.4, 0.01):
                    optimizer.param_groups[0]["lr"] = rate
                    optimizer.step()
                optimizer.param_groups[0]["lr"] = 0.1
                trainer.callbacks = callbacks

    module = Regression()
    reached = applied(module.net[0].weight)
    trainer_with([capping(), Tuning()], tmp_path).fit(module)
    assert reached == [CAP] * BATCHES + [0.2, 0.4, 0.01] + [CAP] * (EPOCHS - 1) * BATCHES


@pytest.mark.parametrize("action", ["log", "rescale"])
@pytest.mark.filterwarnings("ignore:ConvergenceGuard")
def test_tuner_lr_find_is_not_guarded_and_leaves_nothing_to_the_fit(action, tmp_path):
    results, ends = [], []
    for guards in ([], [capping(action)]):
        seed_everything(3, verbose=False)
        module = Regression()
        trainer = trainer_with(guards, tmp_path)
        finder = Tuner(trainer).lr_find(module, num_training=15)
        assert not any(guard.history or guard.severities for guard in guards)
        assert is_free_of_hooks(trainer) and trainer.callbacks[: len(guards)] == guards
        results.append((finder.results, module.lr))
        trainer.fit(module)
        ends.append(left_behind(module, trainer))
        assert all([report.step for report in guard.history] == [0, 3, 6, 9, 12] for guard in guards)
    assert results[0] == results[1]
    assert action == "rescale" or ends[0] == ends[1]


@pytest.mark.filterwarnings("ignore:ConvergenceGuard")
def test_weight_averagings_pass_for_batch_norm_is_not_checked(tmp_path):
    """It takes no step, and its weights are not those of training."""
    guard = ConvergenceGuard(
        every_n_steps=1, action="log", curvature=CurvatureOptions(max_iter=5), lookahead=LookaheadOptions(steps=3)
    )
    run("averaging", [guard], tmp_path)
    assert guard.history[-1].step == EPOCHS * BATCHES - 1
    assert [step for step, _ in guard.severities] == list(range(EPOCHS * BATCHES))


def test_two_guards_keep_their_own_time_and_state():
    guards = [ConvergenceGuard(every_n_steps=n, action="log") for n in (2, 3)]
    trainer = fit(linear_module(4, 0.1, inner_lr=0.05), BATCH, 7, guards)
    assert [len(guard.history) for guard in guards] == [4, 3]
    assert guards[0].state_key != guards[1].state_key
    assert trainer.global_step == 7


def test_two_rescaling_guards_leave_the_schedule_alone():
    guards = [ConvergenceGuard(every_n_steps=1, action="rescale", margin=m) for m in (0.9, 0.5)]
    with pytest.warns(GuardWarning):
        trainer = fit(linear_module(4, 5.0, inner_lr=0.05, order="simplified"), BATCH, 10, guards)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 5.0
    assert all(report.beta == 5.0 for guard in guards for report in guard.history)


class Holder(Regression):
    """Takes a guard as an argument, and saves it among its hyperparameters."""

    def __init__(self, guard):
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:ConvergenceGuard")
def test_a_checkpoint_can_be_saved_while_the_guard_is_a_hyperparameter(tmp_path):
    guard = ConvergenceGuard(every_n_steps=2, action="rescale", lookahead=LookaheadOptions(steps=3))
    module = Holder(guard)
    module.lr = 5.0
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    trainer = trainer_with([guard, checkpoint], tmp_path)
    trainer.fit(module)
    middle = Holder.load_from_checkpoint(tmp_path / "epoch=0-step=4.ckpt", weights_only=False).hparams.guard
    assert guard.history[0].status == "unsafe" and len(guard.history) > 2
    assert str(middle.history) == str(guard.history[:2]) and middle.settings() == guard.settings()
    again = copy.deepcopy(middle)
    trainer_with([again], tmp_path).fit(Holder(again))
    assert again.history[0].step == 0 and len(again.history) > 2
