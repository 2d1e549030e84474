import math
import pickle
import warnings

import pandas as pd
import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    GuardWarning,
    LookaheadOptions,
    MetaLearningModule,
    MetaProblem,
    measure,
)
from lightning_maml_guard.guard.loggers import metrics
from lightning_maml_guard.guard.report import CheckReport
from lightning_maml_guard.messages.reasons import Kind
from lightning_maml_guard.messages.sentences import returned
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import (
    LightningModule,
    MisconfigurationException,
    Trainer,
)
from tests.helpers import QUIET, fit, grouped, guard_warns, is_free_of_hooks, linear_module, one_line, quadratic_batch

SPECTRUM = [0.3, 1.0, 2.0, 4.0]
BATCH = quadratic_batch(SPECTRUM, target=1.0)


def module_at(alpha=0.05, beta=0.1, order="simplified", **arguments):
    return linear_module(4, beta, inner_lr=alpha, order=order, **arguments)


def loss_of(trainer):
    return float(trainer.callback_metrics["train/loss"])


def test_unguarded_the_run_blows_up():
    assert not loss_of(fit(module_at(beta=1.5), BATCH, 300)) < 1e6


def test_warn_warns_once_a_crossing_with_the_numbers_and_the_remedy():
    guard = ConvergenceGuard(every_n_steps=2, action="warn")
    with pytest.warns(GuardWarning) as caught:
        fit(module_at(beta=1.5), BATCH, 12, [guard])
    messages = [one_line(w.message) for w in caught if w.category is GuardWarning]
    assert len(messages) == 1
    first, why = messages[0].split(" Why: ", 1)
    assert (
        first == f"ConvergenceGuard: step 0: beta = 1.5 is too large. Set the optimizer's lr to {guard.advice.beta:g}."
    )
    assert guard.advice.beta < 0.625 / 2 and guard.advice.alpha is None
    assert why.startswith("beta = 1.5 is 2.4x beta_c = 0.625")
    assert (
        "along the sharpest direction each step multiplies the error by 3.8. Why: The next 10 steps, tried on copies"
        in why
    )
    assert messages[0].endswith(" Or let the guard do it: ConvergenceGuard(action='rescale').")
    assert [report.step for report in guard.history] == [0, 2, 4, 6, 8, 10]


def test_warn_speaks_again_only_after_a_return(caplog):
    class Sawtooth(MetaLearningModule):
        def on_train_batch_start(self, batch, batch_idx):
            self.optimizers().param_groups[0]["lr"] = 1.5 if batch_idx % 6 >= 4 else 0.1

    network = nn.Linear(4, 1, bias=False).double()
    module = Sawtooth(network, inner_lr=0.05, order="simplified", optimizer=lambda p: SGD(p, lr=0.1))
    guard = ConvergenceGuard(every_n_steps=1)
    with pytest.warns(GuardWarning) as caught, caplog.at_level("INFO"):
        fit(module, BATCH, 14, [guard])
    assert [report.status for report in guard.history].count("unsafe") == 4
    assert len([w for w in caught if w.category is GuardWarning]) == 2
    assert sum("back in the safe region" in record.message for record in caplog.records) == 2


def test_of_a_return_only_what_is_true_is_said(caplog):
    guard = ConvergenceGuard(every_n_steps=1, action="rescale")
    with pytest.warns(GuardWarning), caplog.at_level("INFO"):
        fit(module_at(beta=1.5), BATCH, 6, [guard])
    (said,) = [one_line(record.message) for record in caplog.records if "ConvergenceGuard: step" in record.message]
    applied = f"{guard.history[1].beta_applied:.3g}"
    assert said.endswith(f"the next steps survive at the applied beta = {applied} (configured: 1.5).")
    assert (
        returned(3, safe=True, applied=1.5, configured=1.5)
        == "ConvergenceGuard: step 3: the rates are back in the safe region."
    )
    assert (
        returned(3, safe=False, applied=1.5, configured=1.5)
        == "ConvergenceGuard: step 3: the next steps survive again, at the edge of stability."
    )


def test_safe_runs_hear_nothing():
    guard = ConvergenceGuard(every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuardWarning)
        fit(module_at(), BATCH, 5, [guard])
    assert {report.status for report in guard.history} == {"safe"}


def test_patience_waits_for_consecutive_unsafe_checks():
    guard = ConvergenceGuard(every_n_steps=1, patience=3, action="stop")
    with guard_warns("step 2: beta = 1.5 is too large"):
        fit(module_at(beta=1.5), BATCH, 20, [guard])
    assert guard.stopped_step == 2


def test_stop_stops_before_the_loss_is_infinite_and_says_why():
    guard = ConvergenceGuard(every_n_steps=5, action="stop")
    module = module_at(beta=1.5)
    with guard_warns("Training stops after this step"):
        trainer = fit(module, BATCH, 500, [guard])
    assert guard.stopped_step == 0 and trainer.global_step == 1
    to_set = f"beta = 1.5 is too large. Set the optimizer's lr to {guard.advice.beta:g}."
    assert guard.stopping_reason.startswith(f"{to_set} beta = 1.5 is 2.4x beta_c")
    assert math.isfinite(loss_of(trainer))


def test_stop_says_what_the_trainer_reaches_first():
    guard = ConvergenceGuard(every_n_steps=5, action="stop")
    with guard_warns(
        r"Training stops after this step .*\. The Trainer first reaches min_epochs = 1 and min_steps = 8\."
    ):
        trainer = fit(module_at(beta=1.5), BATCH, 500, [guard], min_steps=8, max_epochs=1, limit_train_batches=8)
    assert guard.stopped_step is not None and trainer.global_step == 8
    module, guard = module_at(beta=1.5), ConvergenceGuard(every_n_steps=5, action="stop")
    with guard_warns(r"The Trainer first reaches min_epochs = 2 and min_steps = 3\.$"):
        fit(module, BATCH, 500, [guard], min_epochs=2, max_epochs=4, limit_train_batches=2, min_steps=3)


def test_rescale_finishes_with_a_finite_loss_at_the_critical_rate():
    guard = ConvergenceGuard(every_n_steps=10, action="rescale", margin=0.9)
    with guard_warns(r"Applied from now on: alpha = 0.05, beta = 0.375 .action='rescale'"):
        trainer = fit(module_at(beta=1.5), BATCH, 300, [guard])
    best = float(torch.linalg.lstsq(BATCH.support[0][0], BATCH.support[1][0]).residuals.sum())
    assert loss_of(trainer) == pytest.approx(best, abs=1e-6)
    # The rate whose trial ended lowest, which is below 0.9 times the limit; what is advised has to last without a guard.
    first = guard.history[0]
    (tried,) = [each.beta for each in first.advice.evidence if each.kind is Kind.RATES_TRIED]
    assert first.advice.beta == 0.13 < first.beta_applied == tried < 0.9 * 0.625
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1.5
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_rescale_caps_alpha_and_beta_together():
    module = module_at(alpha=0.4, beta=20.0)
    guard = ConvergenceGuard(every_n_steps=10, action="rescale", margin=0.9)
    with guard_warns("alpha = 0.4 is .*x alpha_c"):
        trainer = fit(module, BATCH, 300, [guard])
    last = guard.history[-1]
    assert last.alpha == pytest.approx(0.4) and last.alpha_applied == pytest.approx(0.9 * 0.25, rel=1e-6)
    assert last.beta_applied <= 0.9 * last.safe_beta_c < math.inf
    assert module.inner_lr == 0.4 and module.rates() == pytest.approx(last.alpha_applied)
    assert loss_of(trainer) < 10


def test_rescale_lets_go_when_the_rates_are_safe_again():
    class Dropping(MetaLearningModule):
        def on_train_batch_start(self, batch, batch_idx):
            self.optimizers().param_groups[0]["lr"] = 1.5 if batch_idx < 4 else 0.2

    module = Dropping(
        nn.Linear(4, 1, bias=False).double(),
        inner_lr=0.05,
        order="simplified",
        optimizer=lambda p: SGD(p, lr=1.5),
    )
    guard = ConvergenceGuard(every_n_steps=2, action="rescale")
    with pytest.warns(GuardWarning):
        fit(module, BATCH, 60, [guard])
    applied = [report.beta_applied for report in guard.history]
    assert guard.advice.beta < applied[0] < 1.5 and applied[-1] == 0.2


def test_log_changes_and_says_nothing():
    guard = ConvergenceGuard(every_n_steps=1, action="log")
    reference, module = module_at(beta=1.5), module_at(beta=1.5)
    fit(reference, BATCH, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuardWarning)
        fit(module, BATCH, 10, [guard])
    assert torch.equal(module.network.weight, reference.network.weight)
    assert {report.status for report in guard.history} == {"unsafe"}


def test_the_numbers_are_logged_at_the_step_they_were_measured(tmp_path):
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    guard = ConvergenceGuard(every_n_steps=7, action="log")
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    trainer = fit(module_at(), BATCH, 20, [guard], logger=loggers, log_every_n_steps=5)
    frame = pd.read_csv(f"{loggers[0].log_dir}/metrics.csv")
    checks = frame[frame["guard/lambda_max"].notna()]
    assert checks["step"].tolist() == [0, 7, 14]
    expected = (
        "alpha alpha_c beta beta_c lambda_max lambda_min alpha_ratio beta_ratio safe hvps seconds adaptation_gain"
    )
    assert {f"guard/{name}" for name in expected.split()} <= set(frame.columns)
    assert checks["guard/beta_ratio"].tolist() == pytest.approx([0.16] * 3, rel=1e-6)
    assert float(trainer.callback_metrics["guard/alpha_ratio"]) == pytest.approx(0.2)
    assert "guard/beta_applied" not in frame.columns  # which would be guard/beta once more
    # Lightning goes over all that is logged through it at every step: without a bar nothing is.
    assert set(trainer.progress_bar_metrics) == {"train/loss"}
    assert list(trainer.fit_loop.epoch_loop._results)
    assert not any("guard" in name for name in trainer.fit_loop.epoch_loop._results)


def test_under_accumulation_a_step_is_checked_once():
    guard = ConvergenceGuard(every_n_steps=1, action="log")
    trainer = fit(
        module_at(),
        BATCH,
        4,
        [guard],
        accumulate_grad_batches=3,
        max_steps=-1,
        max_epochs=1,
        limit_train_batches=4,
    )
    assert trainer.global_step == 2
    assert [report.step for report in guard.history] == [0, 1]


class Foreign(LightningModule):
    """A hand-written MAML module that knows nothing of this package."""

    def __init__(self, broken=None):
        super().__init__()
        self.net = nn.Linear(4, 1, bias=False).double()
        self.broken = broken

    def training_step(self, batch, batch_idx):
        (x, y), _ = batch
        return ((self.net(x) - y) ** 2).mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.7)


def foreign_problem(module, batch):
    if module.broken is not None:
        raise module.broken
    module.log("leak", 1.0)

    def task_loss(params, data):
        x, y = data
        return ((torch.func.functional_call(module, params, (x,)) - y) ** 2).mean()

    Foreign.forward = lambda self, x: self.net(x)
    return MetaProblem(dict(module.named_parameters()), task_loss, batch[0], batch[1], inner_lr=0.05)


def test_a_foreign_module_is_guarded_through_problem():
    guard = ConvergenceGuard(
        every_n_steps=5,
        action="rescale",
        problem=foreign_problem,
        curvature=CurvatureOptions(criterion="simplified"),
        lookahead=LookaheadOptions(steps=0),
    )
    with guard_warns("beta = 0.7 is 1.1x beta_c = 0.625"):
        trainer = fit(Foreign(), BATCH, 10, [guard])
    assert guard.history[-1].beta_applied == pytest.approx(0.625, rel=1e-6)
    assert "leak" not in trainer.callback_metrics


def test_a_keyboard_interrupt_passes_through():
    guard = ConvergenceGuard(problem=foreign_problem)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Foreign(KeyboardInterrupt()), BATCH, 6, [guard])


def test_a_training_step_with_manual_optimisation_is_refused_before_training():
    module = Foreign()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="cannot watch the training_step of Foreign.*problem="):
        fit(module, BATCH, 1, [ConvergenceGuard()])


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint

    batches = DataLoader([BATCH] * 40, batch_size=None)
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }

    def guarded(**arguments):
        guard, module = (
            ConvergenceGuard(every_n_steps=7, action="rescale", margin=0.9),
            module_at(alpha=0.4, beta=20.0),
        )
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=9, save_top_k=-1)
        Trainer(max_epochs=1, callbacks=[guard, keep], **quiet).fit(module, batches, **arguments)
        return guard, module

    with pytest.warns(GuardWarning):
        guard, module = guarded()
    torch.load(tmp_path / "step=18.ckpt", weights_only=True)
    second, rest = guarded(ckpt_path=tmp_path / "step=18.ckpt")
    assert torch.equal(rest.network.weight, module.network.weight)
    assert rest.inner_lr_cap == module.inner_lr_cap == pytest.approx(0.9 * 0.25)

    def plain(history):
        return [(r.step, r.alpha_c, r.beta_c, r.safe_beta, r.status, r.beta_applied, r.spectrum) for r in history]

    assert plain(second.history) == plain(guard.history)


def test_state_of_an_older_guard_loads():
    guard = ConvergenceGuard()
    guard.load_state_dict({"stopped_step": 3})
    assert guard.stopped_step == 3 and guard.history == []


def test_fast_dev_run_measures_once_and_never_acts():
    guard = ConvergenceGuard(every_n_steps=1, action="stop")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuardWarning)
        fit(module_at(beta=1.5), BATCH, 1, [guard], fast_dev_run=True)
    assert len(guard.history) == 1 and guard.stopped_step is None


def test_barebones_makes_it_inert():
    guard = ConvergenceGuard()
    with guard_warns("nothing is done in this run"):
        Trainer(barebones=True, max_steps=2, accelerator="cpu", callbacks=[guard]).fit(
            module_at(), DataLoader([BATCH] * 2, batch_size=None)
        )
    assert guard.history == []


def test_an_optimizer_that_climbs_the_loss_makes_it_inert():
    """A reward that rises is no loss that diverges."""
    module = MetaLearningModule(mlp(), inner_lr=0.01, optimizer=lambda p: Adam(p, lr=1e-3, maximize=True))
    guard = ConvergenceGuard(action="rescale")
    with guard_warns(r"Adam\(maximize=True\) climbs the loss"):
        fit(module, Sinusoid().sample(5, torch.Generator()), 4, [guard])
    assert guard.history == [] and is_free_of_hooks(module.trainer)


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.line(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithoutOptimizer(Line):
    """Moves its parameters by hand, as Reptile often does."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.line.weight -= 0.1 * self.line.weight

    def meta_problem(self, batch):
        raise AssertionError("not asked for")

    def configure_optimizers(self):
        return None


class DrawsItself(Line):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


class ByKeyword(Line):
    def training_step(self, batch, *, scale=2.0):
        return scale * super().training_step(batch, 0)


class AnyNumber(Line):
    def training_step(self, *given):
        batch, batch_idx = given
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter:UserWarning", "ignore:.*configure_optimizers.*None:UserWarning")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (WithoutOptimizer, "configure_optimizers returns no optimizer"),
        (DrawsItself, "training_step takes `dataloader_"),
    ],
)
def test_what_leaves_nothing_to_judge_makes_it_inert(kind, said):
    guard = ConvergenceGuard(action="rescale")
    with guard_warns(f"nothing is done in this run: {said}"):
        fit(kind(), torch.ones(3, 2), 20, [guard], max_epochs=1)  # without an optimizer no step is counted
    assert guard.history == [] and guard.severities == []


@pytest.mark.parametrize("kind", [ByKeyword, AnyNumber])
def test_a_training_step_gets_what_lightning_gives_it(kind):
    guard = ConvergenceGuard(every_n_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuardWarning)
        fit(kind(), torch.ones(3, 2), 4, [guard])
    assert [report.status for report in guard.history] == ["safe", "safe"]


def test_a_run_that_is_fitted_again_is_checked_where_it_begins():
    """Before, the rate was first looked at where the loss jumped, or at a multiple of 100."""
    module, guard, kept = module_at(beta=0.01), ConvergenceGuard(action="rescale"), []
    copies = LambdaCallback(on_train_batch_end=lambda *_: kept.append(guard._run.ring.kept[0].step))
    trainer = fit(module, BATCH, 3, [guard, copies])
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(module, DataLoader([BATCH] * 6, batch_size=None))
    assert [report.step for report in guard.history][:1] == [3]
    assert kept == [0, 0, 0, 3, 3, 3]  # the copy to go back to


def test_adam_is_judged_from_its_second_step_on():
    module = MetaLearningModule(mlp(), inner_lr=0.01, optimizer=lambda p: Adam(p, lr=1e-3))
    guard = ConvergenceGuard(every_n_steps=1, action="log")
    fit(module, Sinusoid().sample(5, torch.Generator()), 4, [guard])
    assert math.isnan(guard.history[0].beta_c)
    assert all(math.isfinite(report.beta_c) for report in guard.history[1:])


def test_pyhessian_runs_inside_a_trainer():
    guard = ConvergenceGuard(
        every_n_steps=2, action="log", curvature=CurvatureOptions(estimator="pyhessian", max_iter=100, tol=1e-6)
    )
    reference, module = module_at(), module_at()
    fit(reference, BATCH, 4)
    fit(module, BATCH, 4, [guard])
    assert guard.history[0].lambda_max == pytest.approx(4.0, rel=1e-2)
    assert torch.equal(reference.network.weight, module.network.weight)


def test_arguments_keep_their_names_and_the_guard_pickles():
    guard = ConvergenceGuard(
        every_n_steps=5,
        action="stop",
        margin=0.9,
        patience=2,
        curvature=CurvatureOptions(max_iter=7, tol=0.1, tasks="worst", data="both"),
    )
    again = pickle.loads(pickle.dumps(guard))
    assert (guard.curvature.max_iter, guard.curvature.tol) == (7, 0.1)
    for name in ("every_n_steps", "action", "margin", "patience", "curvature", "lookahead"):
        assert getattr(again, name) == getattr(guard, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` to be an integer of at least 1 but got 0"),
        ({"every_n_steps": True}, "`every_n_steps` to be an integer of at least 1 but got True"),
        ({"patience": 0}, "`patience` to be an integer of at least 1 but got 0"),
        ({"action": "panic"}, "`action` to be one of .* but got 'panic'"),
        ({"margin": -1}, "`margin` to be a number above 0 and at most 1 but got -1"),
        ({"criterion": "none"}, "`criterion` to be one of"),
        ({"estimator": "magic"}, "`estimator` to be"),
        ({"tol": 2}, "`tol` to be a number between 0 and 1 but got 2"),
        ({"problem": "maml"}, "`problem` to be a function"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvergenceGuard(**grouped(**arguments))


class Scheduled(MetaLearningModule):
    """Sets rates by hand at every batch, as a schedule would."""

    def __init__(self, rate, **arguments):
        network = nn.Linear(4, 1, bias=False).double()
        nn.init.ones_(network.weight)
        super().__init__(
            network, order="simplified", optimizer=lambda p: SGD(p, lr=0.1), **{"inner_lr": 0.05, **arguments}
        )
        self.rate = rate

    def on_train_batch_start(self, batch, batch_idx):
        self.rate(self, batch_idx)


def test_a_schedule_that_rises_between_checks_meets_the_cap():
    def rise(module, index):
        module.optimizers().param_groups[0]["lr"] = 0.1 if index % 10 == 0 else 5.0

    guard = ConvergenceGuard(every_n_steps=10, action="rescale", lookahead=LookaheadOptions(steps=0))
    # The callback sees the rate of the step before; one that has grown is looked at in the next.
    with guard_warns("step 2: beta = 5 is too large"):
        trainer = fit(Scheduled(rise), BATCH, 40, [guard])
    assert loss_of(trainer) < 10 and trainer.optimizers[0].param_groups[0]["lr"] == 5.0


def test_the_inner_cap_is_a_cap_and_not_a_factor():
    def drop(module, index):
        module.inner_lr = 0.4 if index < 3 else 0.01

    module = Scheduled(drop)
    with guard_warns("alpha = 0.4 is .*x alpha_c"):
        fit(module, BATCH, 6, [ConvergenceGuard(every_n_steps=2, action="rescale")])
    assert module.rates() == 0.01


def test_a_cap_survives_for_evaluation_and_not_for_an_unguarded_fit(tmp_path):
    module = module_at(alpha=0.4)
    with pytest.warns(GuardWarning):
        trainer = fit(module, BATCH, 2, [ConvergenceGuard(every_n_steps=1, action="rescale")])
    trainer.save_checkpoint(tmp_path / "capped.ckpt")
    loaded = MetaLearningModule.load_from_checkpoint(
        tmp_path / "capped.ckpt", network=nn.Linear(4, 1, bias=False).double()
    )
    assert loaded.rates() == module.rates() == pytest.approx(0.25)
    loaded._optimizer = lambda p: SGD(p, lr=0.1)
    fit(loaded, BATCH, 1)
    assert loaded.rates() == 0.4


def test_stop_stops_a_resumed_run_too(tmp_path):
    with pytest.warns(GuardWarning):
        trainer = fit(module_at(beta=1.5), BATCH, 50, [ConvergenceGuard(every_n_steps=5, action="stop")])
        trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    again, guard = module_at(beta=1.5), ConvergenceGuard(every_n_steps=5, action="stop")
    trainer = Trainer(
        max_steps=50,
        max_epochs=5,
        **QUIET,
        callbacks=[guard],
    )
    trainer.fit(again, DataLoader([BATCH] * 20, batch_size=None), ckpt_path=tmp_path / "stopped.ckpt")
    assert guard.stopped_step == 5 and trainer.global_step == 6


def test_a_second_fit_starts_over():
    guard = ConvergenceGuard(every_n_steps=5, action="stop")
    for beta in (1.5, 2.0):
        with guard_warns(f"beta = {beta:g} is .*x beta_c"):
            trainer = fit(module_at(beta=beta), BATCH, 20, [guard])
        assert trainer.global_step == 1 and len(guard.history) == 1


class Unknown(SGD):
    pass


def test_an_unknown_optimizer_is_said_once_and_alpha_is_judged_on():
    def alternate(module, index):
        module.inner_lr = 1.0 if index % 4 >= 2 else 0.01

    module = Scheduled(alternate)
    module._optimizer = lambda p: Unknown(p, lr=1e-3)
    guard = ConvergenceGuard(every_n_steps=2, lookahead=LookaheadOptions(steps=0))
    with pytest.warns(GuardWarning) as caught:
        fit(module, BATCH, 10, [guard])
    said = [one_line(w.message) for w in caught if w.category is GuardWarning]
    # Beside every second step, the one after that in which the rate has grown higher than ever.
    assert [(report.step, report.alpha_status) for report in guard.history] == [
        *((0, "safe"), (2, "safe"), (3, "unsafe"), (4, "unsafe"), (6, "safe"), (8, "unsafe")),
    ]
    assert sum("Unknown is not known" in text and "is too large" not in text for text in said) == 1
    assert [text.split(" Why")[0] for text in said if "is too large" in text] == [
        f"ConvergenceGuard: step {step}: alpha = 1 is too large. Set the inner rate (inner_lr) to 0.12."
        for step in (3, 8)
    ]


def test_a_nan_is_said_once():
    def poison(module, index):
        if index == 2:
            with torch.no_grad():
                module.network.weight.fill_(math.nan)

    guard = ConvergenceGuard(every_n_steps=1)
    with guard_warns("step 3: training diverges for a reason that is not known.*Why: The loss is nan") as caught:
        fit(Scheduled(poison), BATCH, 6, [guard])
    assert "curvature could not be measured: The task loss is nan" in guard.history[3].reasons[0]
    assert guard.advice.alpha is guard.advice.beta is None  # the rates learn, where they can
    assert len([w for w in caught if w.category is GuardWarning]) == 1


def test_meta_sgd_is_guarded_throughout():
    module = MetaLearningModule(mlp(), inner_lr=0.003, learn_inner_lr=True)
    guard = ConvergenceGuard(every_n_steps=5, action="log")
    fit(module, Sinusoid().sample(4, torch.Generator().manual_seed(0)), 40, [guard])
    assert any(bool((rate < 0).any()) for rate in module.learned_rates)
    assert len(guard.history) == 8 and all(math.isfinite(r.beta_c) for r in guard.history[1:])


@pytest.mark.parametrize(
    ("tasks", "steps", "status"), [("mean", 0, "safe"), ("worst", 0, "unsafe"), ("mean", 10, "unsafe")]
)
def test_tasks_of_different_sharpness_need_the_worst_task_or_a_lookahead(tasks, steps, status):
    """The limit the README names: curvatures 2 and 18, whose mean is safe while the run diverges."""
    x, y = torch.tensor([[[1.0]], [[3.0]]]), torch.zeros(2, 1, 1)
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    module = MetaLearningModule(network, inner_lr=0.075, order="simplified", optimizer=lambda p: SGD(p, lr=0.1))
    guard = ConvergenceGuard(
        every_n_steps=20,
        action="log",
        curvature=CurvatureOptions(criterion="simplified", tasks=tasks),
        lookahead=LookaheadOptions(steps=steps),
    )
    fit(module, ((x, y), (x, y)), 100, [guard])
    assert {report.status for report in guard.history} == {status}
    assert abs(float(network.weight)) > 1e6


def test_what_is_logged_has_the_reports_names():
    report = measure(
        linear_module(4, 0.1, inner_lr=0.05).meta_problem(quadratic_batch([0.5, 1.0, 2.0, 4.0])),
        beta=0.1,
        curvature=CurvatureOptions(criterion="simplified"),
    )
    report = CheckReport.of(report, findings=report.findings, alpha_applied=report.alpha, beta_applied=report.beta)
    logged = metrics(report, caps_rates=True)
    assert {"guard/alpha_c", "guard/poster_alpha_c", "guard/sgd_beta_c"} <= set(logged)
    for name, value in logged.items():
        field = {"poster_alpha_c": "simplified_alpha_c"}.get(name.removeprefix("guard/"), name.removeprefix("guard/"))
        assert name in {"guard/safe", "guard/limits_age"} or value == getattr(report, field)
