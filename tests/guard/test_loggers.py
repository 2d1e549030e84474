"""Pictures and histograms, read back from each logger's own files with its own client."""

import builtins
import math
import random
import sys
from statistics import median

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_maml_guard import ConvergenceGuard, LookaheadOptions
from lightning_maml_guard.guard import loggers
from lightning_maml_guard.messages.sentences import sentence
from lightning_maml_guard.utils.lightning_compat import Callback
from tests.helpers import fit, grouped, guard_warns, linear_module, quadratic_batch

SPECTRUM = [0.3, 1.0, 2.0, 4.0]
BATCH = quadratic_batch(SPECTRUM, target=1.0)
pytestmark = pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")


def run(logger, steps=10, **arguments):
    guard = ConvergenceGuard(**grouped(every_n_steps=2, action="rescale", **arguments))
    module = linear_module(4, 1.5, inner_lr=0.05, order="simplified")
    return guard, fit(module, BATCH, steps, [guard], logger=logger, log_every_n_steps=1)


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    return events


def test_tensorboard_gets_pictures_when_the_state_changes_and_at_the_end_and_a_histogram_a_check(tmp_path):
    before, shown = dict(matplotlib.rcParams), pyplot.get_fignums()
    _, trainer = run([TensorBoardLogger(tmp_path), CSVLogger(tmp_path)])
    assert dict(matplotlib.rcParams) == before and pyplot.get_fignums() == shown
    events = read(trainer.loggers[0].log_dir)
    # Unsafe at 0, back at 2: too soon after the first pictures; 8 is the last check.
    for name in ("guard/safe_region", "guard/spectrum"):
        images = events.Images(name)
        assert [image.step for image in images] == [0, 8]
        assert images[0].encoded_image_string.startswith(b"\x89PNG") and images[0].width >= 500
    histograms = events.Histograms("guard/eigenvalues")
    assert [each.step for each in histograms] == [0, 2, 4, 6, 8]
    found = histograms[-1].histogram_value
    assert found.min == pytest.approx(0.3) and found.max == pytest.approx(4.0)
    assert sum(found.bucket) == pytest.approx(1.0)
    assert [step.step for step in events.Scalars("guard/beta_c")] == [0, 2, 4, 6, 8]


def test_drawing_touches_no_random_numbers(tmp_path):
    def after(wanted):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        _, trainer = run(TensorBoardLogger(tmp_path), steps=2, figures=wanted)
        weight = trainer.model.network.weight.detach().clone()
        return weight, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    (weight, state, *others), (other_weight, other_state, *rest) = after(True), after(False)
    assert torch.equal(weight, other_weight) and torch.equal(state, other_state) and others == rest


def test_wandb_gets_them(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the client of Weights & Biases is not installed")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    _, trainer = run(logger, steps=4)
    summary = logger.experiment.summary
    assert summary["trainer/global_step"] == 2 and summary["guard/beta_c"] == pytest.approx(0.625)
    bins, counts = (np.array(summary["guard/eigenvalues"][name]) for name in ("bins", "values"))
    assert bins[0] == pytest.approx(0.3) and bins[-1] == pytest.approx(4.0) and counts.sum() == pytest.approx(1.0)
    assert summary["guard/spectrum"]["_type"] == summary["guard/safe_region"]["_type"] == "images/separated"
    wandb.finish()
    names = [path.name.rsplit("_", 2)[0] for path in tmp_path.rglob("media/images/guard/*.png")]
    assert sorted(names) == ["safe_region", "safe_region", "spectrum", "spectrum"]


def test_a_warning_is_sent_as_an_alert_and_one_that_cannot_be_sent_costs_a_warning(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the client of Weights & Biases is not installed")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger, alerts = WandbLogger(save_dir=tmp_path, offline=True), []
    monkeypatch.setattr(logger.experiment, "alert", lambda **given: alerts.append(given))
    guard, trainer = run([logger, CSVLogger(tmp_path)], steps=4, figures=False)
    (one,) = alerts
    assert one["title"] == f"ConvergenceGuard: step 0: {guard.advice}" and one["level"] == "WARN"
    assert one["text"].startswith("Why: beta = 1.5 is 2.4x") and "Applied from now on" in one["text"]

    def unreachable(**_):
        raise ConnectionError("no server")

    monkeypatch.setattr(logger.experiment, "alert", unreachable)
    with guard_warns("could not send an alert to a logger; training goes on. Cause: ConnectionError: no server"):
        guard, trainer = run(logger, steps=4, figures=False)
    assert trainer.global_step == 4 and len(guard.history) == 2
    logger.experiment.finish()


def test_other_callbacks_monitor_the_guards_state(tmp_path):
    """Known from the first check on, whatever was measured; kept over epochs in which no check is made."""
    stop = EarlyStopping("guard/unsafe", mode="min", divergence_threshold=0.5, check_on_train_epoch_end=True)
    keep = ModelCheckpoint(tmp_path, "{step}", monitor="guard/severity", mode="min", save_on_train_epoch_end=True)
    options = {"max_epochs": 5, "max_steps": -1, "logger": False}
    trainer = fit(
        linear_module(4, 1.5, inner_lr=0.05, order="simplified"),
        BATCH,
        2,
        [ConvergenceGuard(action="log"), stop],
        **options,
    )
    assert trainer.current_epoch == 1 and trainer.global_step == 2 and "guard/unsafe" in stop.monitor
    guard = ConvergenceGuard(every_n_steps=4, action="log")
    healthy = linear_module(4, 0.3, inner_lr=0.05, order="simplified")
    stop = EarlyStopping(
        "guard/unsafe", mode="min", divergence_threshold=0.5, patience=9, check_on_train_epoch_end=True
    )
    trainer = fit(healthy, BATCH, 2, [guard, stop, keep], enable_checkpointing=True, **options)
    assert trainer.global_step == 10 and float(trainer.callback_metrics["guard/unsafe"]) == 0.0
    assert keep.best_model_score == pytest.approx(min(value for _, value in guard.severities), rel=1e-6)


def test_mlflow_gets_them(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the client of MLflow is not installed")
    from pytorch_lightning.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/runs")
    run(logger, steps=4)
    client = logger.experiment
    found = sorted(artifact.path for artifact in client.list_artifacts(logger.run_id, "guard"))
    assert found == [f"guard/{name}_step_0000000{step}.png" for name in ("safe_region", "spectrum") for step in (0, 2)]
    assert [each.step for each in client.get_metric_history(logger.run_id, "guard/beta_c")] == [0, 2]


class Foreign(CSVLogger):
    """A logger that can do nothing but numbers, and says so loudly."""

    def __getattr__(self, name):
        assert "image" not in name and "figure" not in name and "histogram" not in name, name
        raise AttributeError(name)


@pytest.mark.parametrize("kind", [CSVLogger, Foreign, None])
def test_any_other_logger_or_none_gets_numbers_alone(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(loggers, "new_figure", lambda *_: pytest.fail("drew a picture nobody can show"))
    guard, trainer = run(kind(tmp_path) if kind else False, steps=4)
    assert len(guard.history) == 2 and trainer.global_step == 4
    assert not list(tmp_path.rglob("*.png"))


def test_figures_false_sends_none_and_the_flag_is_checked(tmp_path):
    _, trainer = run(TensorBoardLogger(tmp_path), steps=2, figures=False)
    assert not read(trainer.logger.log_dir).Tags()["images"] and not read(trainer.logger.log_dir).Tags()["histograms"]
    with pytest.raises(ValueError, match="Expected argument `figures` to be True or False but got 'all'"):
        ConvergenceGuard(figures="all")


def test_without_matplotlib_there_is_no_picture_and_no_failure(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == "matplotlib" else pytest.fail(name))
    guard, trainer = run(TensorBoardLogger(tmp_path))
    events = read(trainer.logger.log_dir)
    assert len(guard.history) == 5 and not events.Tags()["images"]
    assert len(events.Histograms("guard/eigenvalues")) == 5
    assert all("picture" not in sentence(reason) for event in guard.events for reason in event.reasons)


@pytest.mark.filterwarnings("default::lightning_maml_guard.GuardWarning")
def test_a_logger_that_cannot_take_a_picture_costs_one_warning(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("disk full")

    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(loggers, "_drawn", lambda history: {"safe_region": loggers.new_figure(1, 1)})
    monkeypatch.setattr(logger.experiment, "add_image", broken)
    monkeypatch.setattr(logger.experiment, "add_histogram_raw", broken)
    with guard_warns(r"could not send a picture or histogram .*figures=False.* Cause: OSError: disk full") as caught:
        guard, trainer = run(logger)
    said = [each for each in caught if "OSError: disk full" in str(each.message)]
    assert len(said) == 2  # with the checks, and at the end
    assert len(guard.history) == 5 and trainer.global_step == 10


def test_a_flapping_run_is_not_drawn_at_every_turn():
    class Shown:
        is_global_zero = True
        loggers = ()

    drawn, sender = [], loggers.Figures(True)
    sender._send = lambda trainer, history: drawn.append(len(history))
    history = []
    for _ in range(25):
        history.append(object())
        sender.after_check(Shown, history, changed=True)
    assert drawn == [1, 12, 23]


def test_a_history_is_a_pandas_table(monkeypatch):
    guard, _ = run(False, steps=6)
    table = guard.frame()
    assert table.index.tolist() == [0, 2, 4] and table.index.name == "step"
    assert table["status"].tolist() == [report.status for report in guard.history]
    assert table["beta_ratio"].tolist() == [report.beta_ratio for report in guard.history]
    assert table.loc[0, "beta_c_low"] <= table.loc[0, "beta_c"] <= table.loc[0, "beta_c_high"]
    assert "beta = 1.5 is 2.4x" in table.loc[0, "reasons"] and math.isfinite(table["severity"].iloc[0])
    empty = ConvergenceGuard().frame()
    assert empty.shape == (0, table.shape[1]) and list(empty.columns) == list(table.columns)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"guard.frame\(\) needs pandas: pip install pandas"):
        guard.frame()


@pytest.mark.parametrize("moved", ["lr", "inner_lr"])
def test_ratios_and_severity_rise_with_the_rates_between_checks(moved):
    """A check at step 0 alone: what is logged later is its limits and its severity at the rates of each step."""
    module = linear_module(4, 1e-3, inner_lr=1e-3)
    seen = []

    class Rises(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if moved == "lr":
                trainer.optimizers[0].param_groups[0]["lr"] = 1e-3 * 1.2**batch_idx
            else:
                pl_module.inner_lr = 1e-3 * 1.2**batch_idx

        def on_train_batch_end(self, trainer, *_):
            names = ("guard/alpha_ratio", "guard/beta_ratio", "guard/severity")
            seen.append([float(trainer.callback_metrics[name]) for name in names])

    guard = ConvergenceGuard(every_n_steps=100, action="log")
    fit(module, quadratic_batch([0.5, 1.0, 2.0, 4.0]), 8, [Rises(), guard])
    (first,), (_, severity) = guard.history, guard.severities[0]
    index, ratio = (1, first.beta_ratio) if moved == "lr" else (0, first.alpha_ratio)
    assert [each[index] for each in seen] == pytest.approx([ratio * 1.2**step for step in range(8)], rel=1e-6)
    assert [each[2] for each in seen] == pytest.approx([severity + step * math.log(1.2) for step in range(8)], rel=1e-5)


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_severity_rises_with_the_rates_that_are_to_come(by_hand):
    """A schedule that restarts at step 25, and a rate that rises by hand: ten steps ahead both are known."""

    def rate(step):
        return (1 + step if by_hand else 10.0 if step >= 25 else 1.0) * 1e-4

    class Scheduled(type(linear_module(4, 1e-4))):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step) / rate(0))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Moves(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if by_hand:
                trainer.optimizers[0].param_groups[0]["lr"] = rate(batch_idx)

        def on_train_batch_end(self, trainer, *_):
            seen.append(float(trainer.callback_metrics["guard/severity"]))

    seen, module = [], linear_module(4, 1e-4, inner_lr=1e-4)
    if not by_hand:
        module.__class__ = Scheduled
    guard = ConvergenceGuard(every_n_steps=100, action="log", lookahead=LookaheadOptions(triggers=False))
    fit(module, quadratic_batch([0.5, 1.0, 2.0, 4.0]), 30, [Moves(), guard])
    (_, severity), ten = guard.severities[0], math.log(10.0)
    if by_hand:
        assert seen[5] == pytest.approx(severity + math.log(6), abs=0.1)
        assert seen[20] == pytest.approx(severity + math.log(31), abs=0.1)
    else:
        assert seen[:15] == pytest.approx([severity] * 15, abs=1e-3)
        assert seen[16:] == pytest.approx([severity + ten] * 14, abs=1e-3)


def test_a_loss_that_leaves_its_best_raises_the_severity_between_checks():
    """The rates stay; from step 12 on the tasks are others, and the median of the last 8 losses follows."""
    module = linear_module(4, 1e-3, inner_lr=1e-3)
    seen, losses = [], []

    class Worse(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 12:
                with torch.no_grad():
                    for parameter in pl_module.parameters():
                        parameter.mul_(4.0)

        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            losses.append(float(outputs["loss"]))
            seen.append(float(trainer.callback_metrics["guard/severity"]))

    guard = ConvergenceGuard(every_n_steps=100, action="log", lookahead=LookaheadOptions(triggers=False))
    fit(module, quadratic_batch([0.5, 1.0, 2.0, 4.0]), 24, [Worse(), guard])
    assert len(guard.severities) == 1
    start = median(losses[:8])
    assert seen[15] == pytest.approx(guard.severities[0][1])  # 3 of 8 losses do not move the median that far
    # The step's own loss is not known when its severity is logged.
    expected = [math.log(median(losses[step - 8 : step]) / start) for step in range(17, 24)]
    assert seen[17:24] == pytest.approx(expected, abs=0.11)
    assert expected[-1] > 2
