"""Rollback, snapshots and triggers: in runs, and against plain copies."""

import copy
import math
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, GuardWarning, LookaheadOptions, MetaLearningModule
from lightning_maml_guard.guard.rollback import Rollback
from lightning_maml_guard.guard.state import GuardState, from_checkpoint, to_checkpoint
from lightning_maml_guard.lookahead.divergence import FIRST_LOSSES, RunningStatistics
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.optim.clipping import gradient_norm
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import Callback, Trainer
from tests.helpers import fit, grouped, guard_warns, is_free_of_hooks, linear_module, one_line, quadratic_batch

BATCH = quadratic_batch([0.3, 1.0, 2.0, 4.0], target=1.0)


class Struck(MetaLearningModule):
    """Something goes wrong at some steps."""

    def __init__(self, strike, at, optimizer=None, **arguments):
        network = nn.Linear(4, 1, bias=False).double()
        nn.init.ones_(network.weight)
        super().__init__(
            network,
            inner_lr=0.05,
            order="simplified",
            optimizer=optimizer or (lambda p: SGD(p, lr=0.1, momentum=0.5)),
            **arguments,
        )
        self.strike, self.at = strike, at

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx in self.at:
            with torch.no_grad():
                self.strike(self)


def to_nan(module):
    module.network.weight.fill_(math.nan)


def aside(module):
    """To a loss above twice the running one, which eight times that of the start is not."""
    module.network.weight.add_(1.0)


def far_away(module):
    module.network.weight.add_(100.0)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: Adam(p, lr=0.1)])
def test_a_snapshot_brings_back_parameters_buffers_and_state_and_leaves_the_schedule(make, device):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = make(module.parameters())

    def step():
        optimizer.zero_grad()
        module(torch.randn(5, 3)).pow(3).sum().backward()
        optimizer.step()

    step()
    kept = Snapshot(module, [optimizer], 1, device)
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()["state"]))
    tensors = [value.data_ptr() for value in module.parameters()]
    step()
    step()
    optimizer.param_groups[0]["lr"] = 0.05
    kept.restore(module, [optimizer])
    assert str(before) == str((module.state_dict(), optimizer.state_dict()["state"]))
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert tensors == [value.data_ptr() for value in module.parameters()]
    step()
    kept.restore(module, [optimizer])  # a second time: the copies were not handed out
    assert str(before) == str((module.state_dict(), optimizer.state_dict()["state"]))


def test_a_snapshot_from_before_the_first_step_empties_the_state():
    module = nn.Linear(2, 1)
    optimizer = Adam(module.parameters())
    kept = Snapshot(module, [optimizer], 0)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    kept.restore(module, [optimizer])
    assert not optimizer.state_dict()["state"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_state_that_is_put_back_is_where_it_was(device):
    """A look at a state from before the first step takes the optimizer's state away, and puts it back."""
    module = nn.Linear(2, 1).cuda()
    optimizer = Adam(module.parameters())
    start = Snapshot(module, [optimizer], 0, device)
    module(torch.ones(1, 2, device="cuda")).sum().backward()
    optimizer.step()
    before = {key: (value.device, value.tolist()) for key, value in optimizer.state[module.weight].items()}
    now = Snapshot(module, [optimizer], 1, device)
    start.restore(module, [optimizer])
    now.restore(module, [optimizer])
    assert {key: (value.device, value.tolist()) for key, value in optimizer.state[module.weight].items()} == before
    assert before["step"][0].type == "cpu"


@pytest.mark.parametrize("strike", [to_nan, far_away])
def test_a_diverged_run_is_rolled_back_and_goes_on(strike):
    guard = ConvergenceGuard(every_n_steps=10, action="rescale", rollback=True)
    module = Struck(strike, at={14})
    with guard_warns(r"rolled back to step 10 and .* skipped \(rollback 1 of at most 10\)\. 5 of 15 steps are lost\."):
        trainer = fit(module, BATCH, 60, [guard])
    assert float(trainer.callback_metrics["train/loss"]) < 2e-2
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    applied = [report.beta_applied for report in guard.history if report.step == 15]
    assert applied and applied[0] <= 0.05


@pytest.mark.parametrize("steps", [10, 0])
def test_without_rollback_a_nan_ends_the_run_with_the_reason(steps):
    """Lower rates do not bring parameters back that are not finite."""
    guard = ConvergenceGuard(
        every_n_steps=10, action="rescale", rollback=False, lookahead=LookaheadOptions(steps=steps)
    )
    with pytest.warns(GuardWarning) as caught:
        trainer = fit(Struck(to_nan, at={14}), BATCH, 30, [guard])
    said = [one_line(each.message) for each in caught if each.category is GuardWarning]
    at, no_way = (
        (15 if steps else 14),
        "the parameters are not finite, and there are no earlier ones that would stay finite.",
    )
    assert len(said) == (1 if steps else 2) and said[0].startswith(f"ConvergenceGuard: step {at}: ")
    assert "The loss is nan at these parameters." in said[0] and said[-1].endswith(f"Training stops: {no_way}")
    assert guard.stopped_step == trainer.global_step - 1 == at and is_free_of_hooks(trainer)
    assert "The loss is nan at these parameters" in guard.stopping_reason
    assert not steps or guard._run.caps.caps == Caps()


def test_without_rollback_a_loss_that_diverged_at_finite_parameters_is_no_reason_to_stop():
    guard = ConvergenceGuard(every_n_steps=10, action="rescale", rollback=False)
    with guard_warns("Nothing is lowered: a lower rate does not bring the loss down"):
        trainer = fit(Struck(far_away, at={14}), BATCH, 30, [guard])
    assert trainer.global_step == 30 and guard.stopped_step is None


def test_gradients_of_a_half_accumulated_step_do_not_outlive_a_rollback():
    guard = ConvergenceGuard(every_n_steps=10, action="rescale", rollback=True)
    with guard_warns(r"rollback 1 of at most 10") as caught:
        trainer = fit(Struck(to_nan, at={28}), BATCH, 160, [guard], accumulate_grad_batches=2, max_steps=75)
    assert sum("rolled back to" in one_line(each.message) for each in caught) == 1
    assert float(trainer.callback_metrics["train/loss"]) < 1e-2


def test_a_run_rolled_back_to_where_nothing_can_be_measured_goes_on_at_half_the_rate(monkeypatch):
    from lightning_maml_guard.guard import judgement

    def fails_after_the_rollback(problem, *, step, **arguments):
        if step == 15:
            raise RuntimeError("out of luck")
        return measure(problem, step=step, **arguments)

    measure = judgement.measure
    monkeypatch.setattr(judgement, "measure", fails_after_the_rollback)
    guard = ConvergenceGuard(every_n_steps=10, action="rescale", rollback=True)
    with pytest.warns(GuardWarning) as caught:
        trainer = fit(Struck(to_nan, at={14}), BATCH, 60, [guard])
    said = [one_line(each.message) for each in caught if each.category is GuardWarning]
    assert "the check at step 15 failed" in said[0] and "RuntimeError: out of luck" in said[0]
    assert said[1].startswith("ConvergenceGuard: step 15: training diverges for a reason that is not known.")
    assert (
        "rolled back to step 10 and the batches since are skipped (rollback 1 of at most 10)" in said[2]
        and "halved: beta = 0.05." in said[2]
    )
    assert len(said) == 3 and float(trainer.callback_metrics["train/loss"]) < 2e-2


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_whose_first_check_fails_is_rolled_back_to_where_it_started(fails):
    """Its next check comes when the loss has left: that state is no place to go back to."""
    stated = []

    def problem(module, batch):
        stated.append(1)
        if fails and len(stated) == 1:
            raise RuntimeError("out of memory, once")
        return module.meta_problem(batch)

    guard = ConvergenceGuard(every_n_steps=10, action="rescale", rollback=True, problem=problem)
    module = linear_module(4, 1.5, inner_lr=0.05, order="simplified")
    with pytest.warns(GuardWarning):
        trainer = fit(module, BATCH, 80, [guard])
    back = [event.reasons[0].steps for event in guard.events if event.kind == "rolled back"]
    assert back == ([0] if fails else []) and guard.stopped_step is None
    assert float(trainer.callback_metrics["train/loss"]) < 0.05


def test_a_state_whose_lookahead_fails_is_never_one_to_go_back_to():
    """A run that goes on from a checkpoint of a dying state has nothing to go back to until a lookahead passes."""
    module = linear_module(4, 1.5, inner_lr=0.05, order="simplified")
    trainer = fit(module, BATCH, 3)
    guard = ConvergenceGuard(every_n_steps=1, action="rescale", rollback=True, lookahead=LookaheadOptions(steps=3))
    kept = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept.append(
                (guard.severities[-1][1], None if guard._run.ring.latest is None else guard._run.ring.latest.step)
            )

    trainer.callbacks += [guard, Look()]
    trainer.fit_loop.epoch_loop.max_steps = 5
    with pytest.warns(GuardWarning):
        trainer.fit(module, DataLoader([BATCH] * 5, batch_size=None))
    assert kept[0] == (pytest.approx(kept[0][0]), None) and kept[0][0] > math.log(3)


def test_a_copy_that_fails_costs_one_warning(monkeypatch):
    def fails(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("lightning_maml_guard.optim.snapshot.Snapshot", fails)
    guard = ConvergenceGuard(every_n_steps=10, action="rescale", rollback=True)
    with guard_warns(r"at step 0, so there is nothing to roll back to.*MemoryError: no room") as c:
        trainer = fit(linear_module(4, 0.1), BATCH, 30, [guard])
    assert trainer.global_step == 30 and len([each for each in c if each.category is GuardWarning]) == 1


def test_a_gradient_norm_that_fails_costs_one_warning(monkeypatch):
    def fails(_):
        raise NotImplementedError("odd layout")

    monkeypatch.setattr("lightning_maml_guard.guard.run.gradient_norm", fails)
    with guard_warns("a jump of the gradient norm does not: .*NotImplementedError: odd layout") as caught:
        trainer = fit(linear_module(4, 0.1), BATCH, 30, [ConvergenceGuard()])
    assert trainer.global_step == 30 and len([each for each in caught if each.category is GuardWarning]) == 1


def test_a_jump_of_the_gradient_norm_alone_calls_a_check_at_the_next_step(monkeypatch):
    seen = []

    def norm(optimizer):
        seen.append(optimizer)
        return 10.0 if len(seen) == 14 else 1.0  # the loss does not jump

    monkeypatch.setattr("lightning_maml_guard.guard.run.gradient_norm", norm)
    guard = ConvergenceGuard(every_n_steps=1000, action="log")
    fit(linear_module(4, 0.01), BATCH, 18, [guard], accumulate_grad_batches=2)
    assert len(seen) == 18 and [step for step, _ in guard.severities] == [0, 14]


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.float64), (torch.float64,)])
def test_the_gradient_norm_is_that_of_all_gradients_in_a_row(dtypes):
    parameters = [nn.Parameter(torch.randn(3, size, dtype=dtype)) for size, dtype in enumerate(dtypes, 1)]
    assert gradient_norm(SGD(parameters, lr=0.1)) is None
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    expected = torch.cat([parameter.grad.double().flatten() for parameter in parameters]).norm()
    assert float(gradient_norm(SGD(parameters, lr=0.1))) == pytest.approx(float(expected), rel=1e-6)


def test_the_gradient_norm_counts_sparse_gradients():
    embedding = nn.Embedding(5, 2, sparse=True)
    (embedding(torch.tensor([1, 1, 3])).sum() * 2).backward()
    norm = gradient_norm(SGD(embedding.parameters(), lr=0.1))
    assert norm == pytest.approx(float(embedding.weight.grad.to_dense().norm()))


def test_rollbacks_are_bounded_and_then_the_run_stops_with_the_reason():
    guard = ConvergenceGuard(every_n_steps=10, action="rescale", rollback=True, max_rollbacks=2)
    with pytest.warns(GuardWarning) as caught:
        trainer = fit(Struck(to_nan, at=set(range(5, 60))), BATCH, 60, [guard])
    said = [one_line(each.message) for each in caught if each.category is GuardWarning]
    assert said[0].startswith(
        "ConvergenceGuard: step 6: training diverges for a reason that is not known. Look at the data"
    )
    assert ["rollback 1 of" in said[1], "rollback 2 of" in said[2]] == [True, True] and len(said) == 5
    assert "training stops. The loss was nan at step" in said[3] and "after 2 rollbacks" in said[3]
    assert said[3].endswith("Look at the data, the loss and the precision.")
    assert "the last step made parameters non-finite" in said[4]
    assert trainer.global_step < 20
    assert guard.stopped_step is not None and guard.stopping_reason.startswith("training diverges for a reason")


def test_a_last_step_that_diverges_is_rolled_back():
    guard = ConvergenceGuard(every_n_steps=10, action="rescale", rollback=True)
    module = Struck(to_nan, at={19})
    with guard_warns("last step made parameters non-finite.*rolled back to step 18"):
        fit(module, BATCH, 20, [guard])
    assert bool(torch.isfinite(module.network.weight).all())


def test_a_last_step_whose_loss_diverged_is_rolled_back_and_one_whose_loss_did_not_is_left(recwarn):
    """No check comes after it: the loss of the parameters it leaves is looked at, on its batch."""
    guards = [
        ConvergenceGuard(
            every_n_steps=10, action="rescale", rollback=True, lookahead=LookaheadOptions(divergence_ratio=8.0)
        )
        for _ in range(2)
    ]
    modules = [Struck(strike, at={19}) for strike in (far_away, aside, aside)]
    with guard_warns(r"after the last step the loss was 1.*e\+0. \(training started at.*rolled back to step 18"):
        fit(modules[0], BATCH, 20, guards[:1])
    assert float(modules[0].network.weight.detach().abs().max()) < 3
    assert [event.kind for event in guards[0].events] == ["rolled back"]
    recwarn.clear()
    fit(modules[1], BATCH, 20, guards[1:])
    fit(modules[2], BATCH, 20)
    assert guards[1]._run.schedule.state.spiked and not guards[1].events
    assert not [each for each in recwarn if each.category is GuardWarning]
    torch.testing.assert_close(modules[1].network.weight, modules[2].network.weight, rtol=0, atol=0)


def to_the_start(module):
    nn.init.ones_(module.network.weight)


@pytest.mark.parametrize("action", ["warn", "stop", "rescale"])
def test_an_excursion_from_which_the_rates_lead_back_is_no_collapse(action):
    """All that was learned is lost at step 60, and is learned again at the same rates as fast as before."""
    plain, module = Struck(to_the_start, {60}), Struck(to_the_start, {60})
    alone, guarded = [], []

    def keep(losses):
        class Keep(Callback):
            def on_train_batch_end(self, trainer, module, outputs, *_):
                losses.append(float(outputs["loss"]))

        return Keep()

    fit(plain, BATCH, 100, [keep(alone)])
    guard = ConvergenceGuard(action=action)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, BATCH, 100, [keep(guarded), guard])
    said = [one_line(each.message) for each in caught if issubclass(each.category, GuardWarning)]
    assert alone[59] < 1e-3 < 1 < alone[61]
    assert guard.advice is None and guard.stopped_step is None
    if action != "rescale":
        assert said == [] and guarded == alone
        return
    (event,) = guard.events  # going back saves the steps that learning again takes
    (message,) = said
    assert event.kind == "rolled back" and "Applied from now on: alpha = 0.05, beta = 0.1." in message
    assert guarded[62] < 1e-3 < alone[75] and guarded[-1] < alone[-1]


def test_a_spike_between_checks_calls_one():
    guard = ConvergenceGuard(every_n_steps=100, action="log")
    fit(Struck(far_away, at={14}), BATCH, 30, [guard])
    assert [report.step for report in guard.history][:2] == [0, 15]
    quiet = ConvergenceGuard(every_n_steps=100, action="log", lookahead=LookaheadOptions(triggers=False))
    fit(Struck(far_away, at={14}), BATCH, 30, [quiet])
    assert [report.step for report in quiet.history] == [0]


def test_a_triggered_check_stands_for_no_scheduled_one():
    guard = ConvergenceGuard(every_n_steps=10, action="log")
    fit(Struck(far_away, at={27}), BATCH, 45, [guard])
    steps = [report.step for report in guard.history]
    assert 28 in steps and 30 in steps and 40 in steps


def test_the_edge_is_logged_and_not_warned_about():
    """beta comes to 1.02 of its limit: it grows, but not within the next steps."""

    class Rising(MetaLearningModule):
        def on_train_batch_start(self, batch, batch_idx):
            self.optimizers().param_groups[0]["lr"] = 0.625 * (0.8 if batch_idx < 3 else 1.02)

    for options in ({}, {"curvature": CurvatureOptions(criterion="simplified")}):
        network = nn.Linear(4, 1, bias=False).double()
        nn.init.ones_(network.weight)
        module = Rising(network, inner_lr=0.05, order="simplified", optimizer=lambda p: SGD(p, lr=0.5))
        guard = ConvergenceGuard(every_n_steps=5, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", GuardWarning)
            fit(module, BATCH, 15, [guard])
        assert [report.status for report in guard.history] == ["safe", "edge", "edge"]
        assert all(report.beta_ratio > 1 for report in guard.history[1:]) and guard.advice is None
        # There is nothing to do, so nothing to lower.
        assert all(
            "beta = 0.637 is" in (said := " ".join(each.reasons)) and "Lower" not in said for each in guard.history[1:]
        )


def test_a_run_that_begins_at_the_edge_is_told_of_the_rates_that_learn():
    """beta at 1.02 of its limit from the start: the next 10 steps survive, but 30 show that half of it learns."""
    guard = ConvergenceGuard(every_n_steps=5)
    with guard_warns(r"step 0: beta = 0\.637 is too large.*30 steps tried on copies end at a loss of 3\.") as caught:
        fit(linear_module(4, 0.625 * 1.02, inner_lr=0.05, order="simplified"), BATCH, 15, [guard])
    assert len([each for each in caught if each.category is GuardWarning]) == 1
    assert guard.history[0].status == "unsafe" and guard.advice.beta < 0.625 / 2 and guard.advice.alpha is None


def test_caps_are_released_when_the_region_widens():
    milder = quadratic_batch([0.1, 0.1, 0.1, 0.2], target=1.0)
    guard = ConvergenceGuard(every_n_steps=5, action="rescale", lookahead=LookaheadOptions(batches=1))
    module = linear_module(4, 3.0, inner_lr=0.05, order="simplified")
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[guard])
    with guard_warns("beta = 3 is .*x beta_c"):
        trainer.fit(module, DataLoader([BATCH] * 6 + [milder] * 100, batch_size=None))
    path = [report.beta_applied for report in guard.history]
    assert path[0] < 0.5 and path[-1] > 1.0  # beyond that the loss is 0 within a lookahead, at any rate
    assert path == sorted(path)


def test_the_lookahead_of_adam_judges_its_first_step():
    guard = ConvergenceGuard(action="stop")
    module = MetaLearningModule(mlp(), inner_lr=0.01, optimizer=lambda p: Adam(p, lr=3.0))
    with guard_warns("step 0: beta = 3 is too large.*tried on copies at alpha = 0.01 and beta = 3"):
        fit(module, Sinusoid().sample(4, torch.Generator().manual_seed(0)), 20, [guard])
    assert guard.stopped_step == 0


def test_the_start_is_the_median_of_the_first_losses_and_not_of_a_run_that_left():
    seen = RunningStatistics()
    assert math.isnan(seen.start)
    for loss in (1.0, 1.2, 0.8, 50.0, math.nan, 1.1):
        seen.update(loss)
    assert seen.start == pytest.approx(1.05)
    for _ in range(3 * FIRST_LOSSES):
        seen.update(0.1)
    assert len(seen.first) == FIRST_LOSSES


def test_what_is_a_spike():
    seen = RunningStatistics()
    assert not seen.update(1.0, 1.0)
    assert not seen.update(1.9, 3.9)
    assert seen.update(3.0) and seen.update(1.0, 9.0) and seen.update(math.nan)
    # repr: since Python 3.13, dataclasses that hold the same nan are not equal.
    assert repr(from_checkpoint(to_checkpoint(GuardState(statistics=seen))).statistics) == repr(seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence_ratio": 1.0}, "`divergence_ratio` to be a finite number above 1 but got 1.0"),
        ({"divergence_ratio": math.inf}, "`divergence_ratio` to be a finite number above 1 but got inf"),
        ({"steps": -1}, "`steps`"),
        ({"batches": 0}, "`batches`"),
        ({"max_rollbacks": 0}, "max_rollbacks"),
        ({"rollback": True}, "needs action='rescale' and lookahead steps of at least 1 but got 'warn' and 10"),
        ({"rollback": True, "action": "rescale", "steps": 0}, "but got 'rescale' and 0"),
    ],
)
def test_arguments_that_are_not_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvergenceGuard(**grouped(**arguments))


@pytest.mark.parametrize(("killed", "action"), [(True, "warn"), (False, "warn"), (True, "log")])
def test_a_network_that_collapsed_is_not_just_called_stable(killed, action):
    class Dying(MetaLearningModule):
        def on_train_batch_start(self, batch, batch_idx):
            if killed and batch_idx == 10:
                with torch.no_grad():
                    self.network[0].bias.fill_(-1e3)

    torch.manual_seed(0)
    module = Dying(mlp(hidden=(8,)), inner_lr=0.01, optimizer=lambda p: SGD(p, lr=1e-4))
    guard = ConvergenceGuard(every_n_steps=15, action=action)
    batch = Sinusoid().sample(4, torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GuardWarning)
        fit(module, batch, 46, [guard])
    said = [text for text in (one_line(each.message) for each in caught) if "the network may have died" in text]
    assert len(guard.history) == 4 and {report.status for report in guard.history} == {"safe"}
    assert len(said) == (killed and action == "warn")
    if said:
        first, then = (guard.history[at].lambda_max for at in (0, 1))
        assert said[0].startswith("ConvergenceGuard: step 15 is stable, but")
        assert f"lambda_max = {then:.3g} is {then / first:.2g} of what it was, while the loss" in said[0]
        assert "8 of 8 ReLU units are 0 on the whole batch" in said[0]
        assert "Start again with lower rates" in said[0]
    again = ConvergenceGuard()
    again.load_state_dict(guard.state_dict())
    assert again._run.state.sharpest == guard._run.state.sharpest == guard.history[0].lambda_max


class Saturated(MetaLearningModule):
    """Its first layer's units are driven out of reach before a step."""

    def __init__(self, activation):
        super().__init__(mlp(activation=activation), inner_lr=0.01, optimizer=lambda p: SGD(p, lr=1e-4))

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 10:
            with torch.no_grad():
                self.network[0].bias.fill_(-1e3)


@pytest.mark.parametrize(("activation", "said"), [("relu", True), ("tanh", False)])
def test_a_lost_network_is_one_whose_units_died(activation, said):
    """A tanh network is as flat then, but nothing in it has died."""
    guard = ConvergenceGuard(every_n_steps=15)
    batch = Sinusoid().sample(4, torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GuardWarning)
        fit(Saturated(activation), batch, 31, [guard])
    lost = [text for text in (one_line(each.message) for each in caught) if "the network may have died" in text]
    assert len(lost) == said and all(re.search(r"[4-7]\d of 80 ReLU units are 0", text) for text in lost)


@pytest.mark.parametrize(("dead", "said"), [(1, False), (39, True)])
@pytest.mark.parametrize(("status", "loss"), [("safe", 57.0), ("edge", 57.0), ("safe", 1.95e11), ("safe", 20.0)])
def test_a_network_is_called_lost_only_where_it_is_safe_and_back_where_it_began(dead, said, status, loss):
    """Curvature may be gone for another reason, such as a sharp start: most units are alive then."""
    torch.manual_seed(0)
    module = MetaLearningModule(mlp(hidden=(40,)), inner_lr=0.01)
    with torch.no_grad():
        module.network[0].bias[:] = 20.0
        module.network[0].bias[:dead] = -1e3
    problem = module.meta_problem(Sinusoid().sample(4, torch.Generator().manual_seed(0)))
    guard = ConvergenceGuard()
    run, trainer = guard._run, SimpleNamespace(loggers=[])
    for _ in range(8):
        run.state.statistics.update(57.6)
    run.state.statistics.loss, run.state.sharpest = loss, 100.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GuardWarning)
        report = measure(problem, beta=1e-4)
        Rollback(run, trainer, module).warn_of_collapse(problem, replace(report, lambda_max=1.0), status, 100)
    assert any(f"{dead} of 40 ReLU units" in one_line(each.message) for each in caught) == (
        said and status == "safe" and loss == 57.0
    )
