"""Advice: what a run is told at once, over MAML written by hand, and that a run that follows it trains."""

import math
import re
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, GuardWarning, LookaheadOptions, MetaProblem
from lightning_maml_guard.guard.advising import Adviser
from lightning_maml_guard.messages.advice import Cause
from lightning_maml_guard.messages.reasons import Kind
from lightning_maml_guard.utils.lightning_compat import Callback, LightningModule, Trainer
from tests.helpers import QUIET, one_line

TASKS, SHOTS = 4, 10


@cache
def sinusoids(steps, seed=0, shots=SHOTS):
    """Batches of sine curves, drawn anew at each step: (x, y) to adapt on and (x, y) to be judged by."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(steps):
        phase, height = (torch.rand(TASKS, 1, 1, generator=generator) for _ in range(2))
        x = torch.rand(TASKS, 2 * shots, 1, generator=generator) * 10 - 5
        y = (0.1 + 4.9 * height) * torch.sin(x - math.pi * phase)
        batches.append((x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:]))
    return batches


class HandWritten(LightningModule):
    """A loop over the tasks, as users write it; ``warmup``: steps over which lr rises to what is configured."""

    def __init__(self, alpha=0.01, lr=0.01, inner_steps=1, optimizer=SGD, warmup=None, hidden=40):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        self.alpha, self.lr, self.inner_steps, self.optimizer, self.warmup = alpha, lr, inner_steps, optimizer, warmup
        self.losses = []

    def task_loss(self, params, data):
        x, y = data
        return ((functional_call(self.net, params, (x,)) - y) ** 2).mean()

    def training_step(self, batch, batch_idx):
        losses = []
        for xs, ys, xq, yq in zip(*batch, strict=True):
            params = dict(self.net.named_parameters())
            for _ in range(self.inner_steps):
                grads = torch.autograd.grad(self.task_loss(params, (xs, ys)), list(params.values()), create_graph=True)
                params = {n: p - self.alpha * g for (n, p), g in zip(params.items(), grads, strict=True)}
            losses.append(self.task_loss(params, (xq, yq)))
        loss = torch.stack(losses).mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        optimizer = self.optimizer(self.net.parameters(), lr=self.lr)
        if self.warmup is None:
            return optimizer
        rising = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rising, "interval": "step"}}


def problem_of(module, batch):
    xs, ys, xq, yq = batch
    params = dict(module.net.named_parameters())
    return MetaProblem(params, module.task_loss, (xs, ys), (xq, yq), module.alpha, inner_steps=module.inner_steps)


def guarded(module, batches, callbacks=(), **arguments):
    """Run with a guard at its defaults; the guard, and what it said."""
    guard = ConvergenceGuard(**{"problem": problem_of, **arguments})
    trainer = Trainer(max_epochs=1, callbacks=[*callbacks, guard], **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(list(batches), batch_size=None))
    said = [one_line(each.message) for each in caught if issubclass(each.category, GuardWarning)]
    assert not [text for text in said if "failed" in text or ("could not" in text and "curvature" not in text)], said
    return guard, said


def end(module):
    return sum(module.losses[-10:]) / 10


@cache
def healthy():
    """The loss that such a run ends at, and that a healthy run is told nothing."""
    module = HandWritten()
    guard, said = guarded(module, sinusoids(60))
    assert said == [] and guard.advice is None and not guard.events
    return end(module)


def first_line(text):
    return text.split(" Why: ")[0]


def test_a_beta_that_is_too_large_is_named_at_step_0_and_the_run_that_follows_trains():
    module = HandWritten(lr=0.5)
    guard, said = guarded(module, sinusoids(20))
    advice = guard.history[0].advice
    assert advice.cause == Cause.BETA == "beta" and advice.step == 0 and advice.alpha is None
    assert advice.configured_beta == 0.5 and advice.beta < guard.history[0].beta_c
    assert first_line(said[0]) == f"ConvergenceGuard: step 0: {advice}"
    assert str(advice) == f"beta = 0.5 is too large. Set the optimizer's lr to {advice.beta:g}."
    assert not math.isfinite(end(module))
    again = HandWritten(lr=advice.beta)
    guard, said = guarded(again, sinusoids(60))
    assert end(again) < 1.2 * healthy()


def test_where_both_rates_are_too_large_both_are_named_and_the_run_that_follows_trains():
    guard, said = guarded(HandWritten(alpha=0.2, lr=0.3), sinusoids(5))
    advice = guard.history[0].advice
    rates = f"Set the inner rate (inner_lr) to {advice.alpha:g} and the optimizer's lr to {advice.beta:g}."
    assert advice.cause == Cause.BOTH and first_line(said[0]).endswith(rates)
    followed = HandWritten(alpha=advice.alpha, lr=advice.beta)
    guarded(followed, sinusoids(60))
    assert end(followed) < 1.5 * healthy()


def test_where_the_inner_rate_alone_is_named_the_limit_of_the_meta_rate_there_is_no_evidence():
    guard, said = guarded(HandWritten(alpha=0.2, lr=0.01, inner_steps=2), sinusoids(2))
    report = guard.history[0]
    assert report.beta_ratio > 2 and report.advice.cause == Cause.ALPHA and report.advice.beta is None
    assert any("beta_c" in reason for reason in report.reasons) and "beta_c" not in said[0]


def test_where_the_outer_rate_alone_is_named_the_limit_of_the_inner_one_is_no_evidence():
    guard, said = guarded(HandWritten(alpha=0.089, lr=2.0), sinusoids(1))
    assert guard.history[0].alpha_ratio > 1 and guard.advice.cause is Cause.BETA and guard.advice.alpha is None
    assert "alpha" in {each.rate for each in guard.history[0].findings}
    assert "alpha" not in {each.rate for each in guard.advice.evidence} and "alpha_c" not in said[0]


@pytest.mark.parametrize("optimizer", [SGD, pytest.param(Adam, marks=pytest.mark.slow)])
def test_an_alpha_that_takes_the_query_loss_to_nan_at_step_0_is_named_with_a_number(optimizer):
    rates = {"inner_steps": 5, "lr": 0.01 if optimizer is SGD else 1e-3, "optimizer": optimizer}
    module = HandWritten(alpha=0.2, **rates)
    guard, said = guarded(module, sinusoids(12))
    assert math.isnan(module.losses[0])
    advice = guard.history[0].advice
    assert advice.cause == Cause.ALPHA and advice.beta is None and advice.configured_alpha == 0.2
    assert 0.005 < advice.alpha < guard.history[0].alpha_c
    assert first_line(said[0]) == (
        f"ConvergenceGuard: step 0: alpha = 0.2 is too large. Set the inner rate (inner_lr) to {advice.alpha:g}."
    )
    assert "alpha = 0.2 makes the tasks worse" in said[0] and "The inner loop diverges from step" in said[0]
    assert "The loss is nan at these parameters." in said[0] and "rescale" not in said[0]  # it cannot reach alpha
    assert len(said) == 1
    again = HandWritten(alpha=advice.alpha, **rates)
    guard, said = guarded(again, sinusoids(60))
    assert end(again) < 1.2 * healthy() and guard.history[0].status != "unsafe"


def test_several_inner_steps_just_within_their_limit_are_named_under_adam():
    """Nothing diverges, neither the inner loop nor the run: lower inner rates learn more."""
    guard, said = guarded(HandWritten(alpha=0.05, lr=6e-3, inner_steps=5, optimizer=Adam), sinusoids(2))
    first = guard.history[0]
    assert 0.5 < first.alpha_ratio < 1 and abs(first.adaptation_gain) < 0.25
    assert guard.advice.cause == Cause.ALPHA and guard.advice.beta is None and guard.advice.step == 0
    assert guard.advice.alpha < 0.5 * 0.05


def test_several_inner_steps_beyond_their_limit_are_named_although_a_low_meta_rate_learns_more_at_first():
    """The inner loop kills its units: what is left is a constant, which a low meta rate makes the targets' mean."""
    guard, said = guarded(HandWritten(alpha=0.12, lr=3e-3, inner_steps=5), sinusoids(1, seed=1))
    assert 1 < guard.history[0].alpha_ratio < 1.2 and guard.history[0].adaptation_gain < 0
    assert guard.advice.cause == Cause.ALPHA and guard.advice.beta is None and guard.advice.alpha < 0.5 * 0.12


def test_no_layer_is_called_wrong_where_an_inner_loop_diverges():
    """As little as where a run has been thrown: finite differences of such a loss say nothing of its derivatives."""
    checked = []
    for alpha in (0.01, 1.0):
        module = HandWritten(alpha=alpha, inner_steps=3)
        module.net[1] = module.net[3] = nn.Tanh()
        guard, said = guarded(module, sinusoids(1))
        assert not any("disagrees with finite differences" in each for each in said)
        checked.append(guard._run.cache.facts.checked)
    assert checked[0] and not checked[1]


class Ends(Callback):
    """Ends a run early that was planned for longer."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == 9


def test_a_warmups_peak_is_named_before_it_is_reached():
    module = HandWritten(lr=0.5, warmup=60)
    guard, said = guarded(module, sinusoids(80), [Ends()])
    advice = guard.advice
    assert len(module.losses) == 10 and advice.cause == Cause.SCHEDULE and advice.step == 0 and advice.peak_step == 59
    # What is set is what the peak comes from: the optimizer's lr as it is configured.
    assert advice.configured_beta == 0.5 and 0.01 < advice.beta < guard.history[0].beta_c
    assert first_line(said[0]) == (
        "ConvergenceGuard: step 0: the schedule takes beta to 0.5 at step 59, which is too large. "
        f"Set the optimizer's lr to {advice.beta:g}."
    )
    assert "it is above the current beta_c = " in said[0] and len(said) == 1  # and is not said again on the way
    again = HandWritten(lr=advice.beta, warmup=60)
    guard, said = guarded(again, sinusoids(80))
    assert end(again) < 1.2 * healthy()


def test_an_outlier_is_named_with_the_norm_to_clip_to():
    batches = list(sinusoids(60))
    x, y, x_query, y_query = batches[30]
    batches[30] = x, 30 * y, x_query, 30 * y_query
    guard, said = guarded(HandWritten(), batches)
    advice = guard.advice
    assert advice.cause == Cause.BATCH and advice.alpha is advice.beta is None and advice.step == 31
    assert "a batch is an outlier; the rates are not to blame" in first_line(said[0])
    assert f"Set Trainer(gradient_clip_val={advice.gradient_clip_val:g}), or fix the batch." in first_line(said[0])
    assert "the batch of step 30 has a loss of " in said[0]
    module = HandWritten()
    clipped = Trainer(max_epochs=1, gradient_clip_val=advice.gradient_clip_val, **QUIET)
    clipped.fit(module, DataLoader(batches, batch_size=None))
    assert end(module) < 1.2 * healthy()


@pytest.mark.parametrize("optimizer", [SGD, Adam])
@pytest.mark.parametrize(("part", "bad"), [(0, math.nan), (1, math.inf), (3, 1e30)])
def test_a_batch_without_a_finite_gradient_is_named_and_not_to_be_clipped(part, bad, optimizer):
    """Evaluated one after another at the same parameters: what it does to them must not spoil the others' losses."""
    batches = list(sinusoids(60))
    batches[30] = tuple(each.clone() for each in batches[30])
    batches[30][part][1, 0] = bad
    guard, said = guarded(HandWritten(lr=0.003, optimizer=optimizer), batches)
    advice = guard.advice
    assert advice.cause == Cause.BATCH and advice.alpha is advice.beta is advice.gradient_clip_val is None
    assert first_line(said[0]).endswith("gradients that are not finite cannot be clipped.")
    assert "the batch of step 30 has a loss of " in said[0]


@pytest.mark.parametrize(("lr", "inner_steps"), [(0.005, 1), (0.005, 2), (0.01, 2)])
def test_an_outlier_is_named_although_what_it_did_shows_only_later(lr, inner_steps):
    """Adam's momentum goes on for some ten steps, so the batch has left the lookahead's when the loss is lost."""
    batches = list(sinusoids(160))
    x, y, x_query, y_query = batches[120]
    batches[120] = x, 30 * y, x_query, 30 * y_query
    guard, said = guarded(HandWritten(lr=lr, inner_steps=inner_steps, optimizer=Adam), batches)
    advice = guard.advice
    assert advice.cause == Cause.BATCH and advice.alpha is advice.beta is None and advice.step > 128
    assert "the batch of step 120 has a loss of " in said[-1]
    assert guard._run.state.statistics.start < 5  # and is not what later losses are compared with


def test_adaptation_that_makes_tasks_worse_is_said_once():
    """The run itself learns to live with it: no lookahead would call it diverging."""
    module = HandWritten(alpha=0.12, lr=1e-3, optimizer=Adam)
    guard, said = guarded(module, sinusoids(60))
    assert len(said) == 1 and "alpha = 0.12 makes the tasks worse: the query loss is" in said[0]
    assert guard.advice.cause == Cause.ALPHA and guard.advice.step == 0
    assert guard.history[0].adaptation_gain < 0
    assert first_line(said[0]).endswith(f"Set the inner rate (inner_lr) to {guard.advice.alpha:g}.")


@pytest.mark.parametrize(
    "run", [{}, {"lr": 1e-3, "optimizer": Adam}, {"warmup": 30}, {"inner_steps": 3, "alpha": 0.005}]
)
def test_a_healthy_run_gets_no_advice(run):
    guard, said = guarded(HandWritten(**run), sinusoids(60))
    assert said == [] and guard.advice is None and guard._run.state.advised == []
    assert {report.status for report in guard.history} <= {"safe", "edge", "unresolved"}
    assert all(report.adaptation_gain > -0.1 for report in guard.history)


def test_tasks_that_are_harder_than_the_first_ones_are_no_divergence():
    """The start is known of one easy batch, whose loss the others exceed four times and more."""
    (xs, ys, xq, yq), *harder = sinusoids(12)
    module = HandWritten(lr=1e-4, optimizer=Adam)
    guard, said = guarded(module, [(xs, 0.3 * ys, xq, 0.3 * yq), *harder])
    assert max(module.losses) > 4 * module.losses[0]
    assert said == [] and guard.advice is None and all(report.status != "unsafe" for report in guard.history)


def test_advice_survives_a_checkpoint(tmp_path):
    module = HandWritten(lr=0.5)
    guard = ConvergenceGuard(problem=problem_of)
    trainer = Trainer(max_epochs=1, callbacks=[guard], **QUIET)
    with pytest.warns(GuardWarning):
        trainer.fit(module, DataLoader(list(sinusoids(4)), batch_size=None))
    torch.save(guard.state_dict(), tmp_path / "state.pt")
    again = ConvergenceGuard(problem=problem_of)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.advice.cause is guard.advice.cause is Cause.BETA
    assert repr(again.advice) == repr(guard.advice) == repr(again.history[0].advice)  # nan is not equal to itself
    assert str(again.advice) == str(guard.advice) and len(again.advice.evidence) == len(guard.advice.evidence) > 1
    assert (again._run.state.advised, again._run.state.searches) == ([], 1)


class Raised(HandWritten):
    """Its meta rate is raised far beyond its limit at step 10."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx >= 10:
            self.optimizers().param_groups[0]["lr"] = 0.5


def test_advice_for_a_run_thrown_away_rests_on_where_it_was_sane():
    """Where it was thrown to, alpha_c is far below alpha: that is not the rate to blame."""
    module = Raised()
    guard, said = guarded(module, sinusoids(20))
    first, last = guard.history[0], guard.history[-1]
    assert last.step == 11 and last.alpha_c < module.alpha / 2 < first.alpha_c and last.beta_c < 0.1 * first.beta_c
    advice = guard.advice
    assert advice.cause == Cause.BETA and advice.alpha is None and advice.configured_beta == 0.5
    assert 0.005 < advice.beta < first.beta_c and len(said) == 1
    assert not any(reason.rate == "alpha" for reason in advice.evidence) and "alpha_c" not in said[0]


def test_rates_that_learn_where_the_run_was_sane_are_not_blamed():
    class Thrown(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 11:
                with torch.no_grad():
                    for value in module.net.parameters():
                        value.mul_(3.0)

    guard, said = guarded(HandWritten(), sinusoids(20), [Thrown()])
    advice = guard.advice
    assert advice.cause == Cause.UNKNOWN and advice.alpha is advice.beta is advice.gradient_clip_val is None
    assert first_line(said[0]) == (
        "ConvergenceGuard: step 13: training diverges for a reason that is not known. "
        "Look at the data, the loss and the precision."
    )


def test_the_parameters_of_a_run_thrown_away_are_as_they_were_after_the_look():
    """The guard goes back to sane parameters to see what is to blame there, and comes back, to the bit."""
    batches, left = list(sinusoids(20)), []
    for guards in ([], [ConvergenceGuard(problem=problem_of, action="log")]):
        module = HandWritten(lr=0.2, optimizer=lambda p, lr: Adam(p, lr=lr, betas=(0.9, 0.99)))
        trainer = Trainer(max_epochs=1, callbacks=guards, **QUIET)
        trainer.fit(module, DataLoader(batches, batch_size=None))
        state = trainer.optimizers[0].state_dict()["state"]
        left.append([*module.parameters(), *[value for each in state.values() for value in each.values()]])
    (guard,) = guards
    assert guard._run.state.searches >= 1 and guard.advice is not None
    assert all(torch.equal(one, other) for one, other in zip(*left, strict=True))


class Poisoned(HandWritten):
    """Its parameters are not finite from step 12 on."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 12:
            with torch.no_grad():
                self.net[0].weight.fill_(math.nan)


@pytest.mark.parametrize(("steps", "stopped"), [(10, 13), (0, 12)])
def test_stop_stops_in_the_step_after_the_first_loss_that_is_not_finite(steps, stopped):
    module = Poisoned()
    guard, said = guarded(module, sinusoids(40), action="stop", lookahead=LookaheadOptions(steps=steps))
    assert len(module.losses) == stopped + 1 and math.isnan(module.losses[12]) and guard.stopped_step == stopped
    assert sum("The loss is nan at these parameters." in text for text in said) == 1
    assert "The loss is nan at these parameters." in guard.stopping_reason


@pytest.mark.parametrize("steps", [10, 0])
def test_the_first_loss_that_is_not_finite_is_said_once_in_the_next_step(steps):
    module = Poisoned()
    guard, said = guarded(module, sinusoids(40), lookahead=LookaheadOptions(steps=steps))
    lost = [text for text in said if "The loss is nan at these parameters." in text]
    assert len(lost) == 1 and len(module.losses) == 40
    assert lost[0].startswith(f"ConvergenceGuard: step {13 if steps else 12}: ")


@pytest.mark.parametrize(("seconds", "action", "told"), [(0.0, "warn", [0]), (0.0, "log", []), (60.0, "warn", [])])
def test_a_check_that_takes_long_says_once_what_training_waits_for(seconds, action, told, monkeypatch, caplog):
    monkeypatch.setattr("lightning_maml_guard.guard.report.LONG", seconds)
    with caplog.at_level("INFO"):
        guarded(HandWritten(lr=1.0), sinusoids(2), action=action)
    waits = [one_line(each.message) for each in caplog.records if "training waits" in each.message]
    assert [int(re.search(r"step (\d+): training waits while lower rates", text)[1]) for text in waits] == told


class Rising(HandWritten):
    """Its inner rate rises by a share a step, from a step on."""

    growth, since = 1.1, 70

    def on_train_batch_start(self, batch, batch_idx):
        self.alpha = 0.02 * max(1.0, self.growth ** (batch_idx - self.since))


def test_a_run_that_an_inner_rate_out_of_reach_throws_off_is_left_as_it_is_and_advised_for_the_rate_of_now():
    """Lower meta rates, and older parameters, only keep such a run from following the inner rate."""
    alone, module = (Rising(alpha=0.02, lr=0.01, optimizer=Adam, hidden=16) for _ in range(2))
    batches = sinusoids(4, shots=10) * 27
    Trainer(max_epochs=1, **QUIET).fit(alone, DataLoader(list(batches), batch_size=None))
    guard, said = guarded(module, batches, action="rescale")
    assert module.losses == alone.losses and module.losses[-1] > 2 * module.losses[0]
    (advised,) = [text for text in said if "is too large" in text]
    at, alpha, lower = re.search(r"step (\d+): alpha = (\S+) is too .* \(inner_lr\) to (\S+)\. ", advised).groups()
    now = 0.02 * 1.1 ** (int(at) - 71)  # the module sets the rate after the check
    assert float(alpha) == pytest.approx(now, rel=0.01) and now / 64 < float(lower) < now / 2
    assert (
        "Nothing is lowered: a lower lr does not bring" in advised
        and "cannot lower this module's inner rate" in advised
    )
    assert not [text for text in said if "fallen" in text] and not guard.events
    assert {each.beta_applied for each in guard.history} == {0.01}


def test_a_rollback_names_the_attribute_by_which_the_inner_rate_could_be_lowered():
    guard, said = guarded(HandWritten(alpha=1e15), sinusoids(2), action="rescale")
    advised = next(text for text in said if "is too large" in text)
    assert "alpha = 1e+15 is too large" in advised and advised.endswith(
        'it could by an attribute inner_lr_cap (docs/guide.md, "A MAML module of your own").'
    )
    assert any("rolled back to step 0" in text for text in said)


class Capped(Rising):
    """The same with an attribute that lets a guard lower it."""

    inner_lr_cap, configured = None, 0.02

    @property
    def alpha(self):
        return self.configured if self.inner_lr_cap is None else min(self.configured, self.inner_lr_cap)

    @alpha.setter
    def alpha(self, rate):
        self.configured = rate


def test_an_attribute_inner_lr_cap_puts_the_inner_rate_of_a_hand_written_module_within_reach():
    """The run of the test above, which ends at more than twice its start without the attribute."""
    module = Capped(alpha=0.02, lr=0.01, optimizer=Adam, hidden=16)
    guard, said = guarded(module, sinusoids(4, shots=10) * 27, action="rescale")
    assert module.losses[-1] < module.losses[0]
    assert module.inner_lr_cap < 0.25 * module.configured and guard.history[-1].alpha_applied == module.alpha
    assert not [text for text in said if "Nothing is lowered" in text or "inner_lr_cap" in text]


@pytest.mark.parametrize("action", ["rescale", "log"])
def test_a_cap_that_an_earlier_run_left_ends_where_a_guard_that_lowers_rates_begins(action):
    module = Capped(alpha=0.001, lr=0.001, optimizer=Adam, hidden=16)
    module.inner_lr_cap = 1e-4
    guarded(module, sinusoids(4, shots=10), action=action)
    assert module.inner_lr_cap == (None if action == "rescale" else 1e-4)  # `log` changes nothing


def test_an_inner_rate_that_does_not_keep_to_the_modules_cap_is_told_once_and_left_alone():
    module = Rising(alpha=0.02, lr=0.01, optimizer=Adam, hidden=16)
    module.inner_lr_cap = None
    guard, said = guarded(module, sinusoids(4, shots=10), action="rescale")
    (told,) = [text for text in said if "under a cap" in text]
    assert (
        "the module has an attribute inner_lr_cap, but under a cap of 0.01 the inner rate of its problem is 0.02, so the "
        "guard does not lower it. To do: Where the cap is not None, use the smaller of both in the inner loop and in the "
        "problem that is given to the guard, or remove the attribute."
    ) in told
    assert module.inner_lr_cap is None and not guard._run.caps.reaches_alpha(module)


def test_no_batch_is_blamed_where_an_inner_rate_beyond_its_limit_makes_batches_unlike_one_another():
    module = Rising(alpha=0.02, lr=0.003, optimizer=Adam, hidden=16)
    module.growth, module.since = 1.06, 10
    guard, _ = guarded(module, sinusoids(90, seed=2, shots=5), action="warn")
    (report,) = [each for each in guard.history if each.advice is not None]
    assert report.advice.cause == Cause.ALPHA and report.alpha_ratio > 2


def test_an_inner_rate_beyond_its_limit_that_makes_tasks_worse_is_named_although_no_rate_learns_soon():
    module = Rising(alpha=0.02, lr=0.003, optimizer=Adam, hidden=16)
    module.growth, module.since = 1.08, 40
    _, said = guarded(module, sinusoids(98))
    (advised,) = [text for text in said if "step 96" in text]
    assert "alpha = 1.38 is too large. Set the inner rate (inner_lr) to 0." in advised
    assert "x alpha_c = " in advised and "makes the tasks worse" in advised


class Steady(Capped):
    """Its inner rate stays what it is."""

    def on_train_batch_start(self, batch, batch_idx):
        pass


def test_a_cap_on_the_rate_of_several_inner_steps_is_what_is_advised_and_the_run_trains():
    """The next steps survive at the limit of the inner rate, at which three inner steps do not lead down."""
    batches = sinusoids(60)
    healthy, module = (Steady(alpha=alpha, lr=0.003, inner_steps=3, optimizer=Adam) for alpha in (0.01, 0.4))
    Trainer(max_epochs=1, **QUIET).fit(healthy, DataLoader(list(batches), batch_size=None))
    guard, said = guarded(module, batches, action="rescale")
    assert guard.advice.cause is Cause.ALPHA and guard.history[0].alpha_applied <= guard.advice.alpha
    assert sum(module.losses[-20:]) < 1.1 * sum(healthy.losses[-20:])
    # What is compared with the training step, and judged as adaptation, is at the rate that is applied.
    assert not [text for text in said if "is not what training_step trains" in text]
    assert guard.history[0].adaptation_gain < 0 < guard.history[-1].adaptation_gain
    assert guard.history[-1].beta_applied == 0.003


def test_a_problem_that_is_not_the_steps_is_told_also_where_the_inner_rate_is_capped():
    def other(module, batch):
        return replace(problem_of(module, batch), task_loss=lambda p, data: 3 * module.task_loss(p, data))

    module = Steady(alpha=0.4, lr=0.003, inner_steps=3, optimizer=Adam)
    _, said = guarded(module, sinusoids(12), action="rescale", problem=other)
    assert [text for text in said if "is not what training_step trains" in text]


class Saturating(LightningModule):
    """Plain training of a classifier whose outputs are bounded: a step that is too large leaves it without gradient."""

    def __init__(self, lr):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4), nn.Tanh())
        self.loss, self.lr, self.losses = nn.CrossEntropyLoss(), lr, []

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.net(batch), batch[:, :4].argmax(1))
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=self.lr)


def points(steps):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(32, 8, generator=generator) for _ in range(steps)]


def test_a_run_that_its_rate_has_killed_is_advised_from_where_it_began(monkeypatch):
    """From its parameters no rate learns. The first look, whose trials see it as a rule, is left out."""
    monkeypatch.setattr(Adviser, "look_further", lambda self, report: None)
    killed, healthy = Saturating(5.0), Saturating(0.01)
    guard, said = guarded(killed, points(80), problem=None)
    advice = guard.advice
    assert advice.step == 64 and advice.cause is Cause.BETA and advice.alpha is None
    assert any("steps tried on copies of the parameters of step 0 end" in text for text in said)
    # What is measured at the parameters that were killed is no reason.
    assert all(each.kind in (Kind.NOT_LEARNING, Kind.RATES_TRIED) for each in advice.evidence)
    followed = Saturating(advice.beta)
    assert guarded(followed, points(80), problem=None)[1] == []
    guarded(healthy, points(80), problem=None)
    assert end(followed) < 1.2 * end(healthy) < 0.6 * end(killed)


def test_a_run_that_does_not_learn_is_advised_whatever_was_spent_before(monkeypatch):
    """Else one of 100 steps, whose first measurement took a conv4 some 200 steps, ends without a word."""
    monkeypatch.setattr(Adviser, "look_further", lambda self, report: None)

    class Spends(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 40:
                (guard,) = (each for each in trainer.callbacks if isinstance(each, ConvergenceGuard))
                guard._run.schedule.state.spent = 1000.0

    guard, _ = guarded(Saturating(5.0), points(80), [Spends()], problem=None)
    assert guard.advice.step == 64 and guard.advice.cause is Cause.BETA


def test_rescale_takes_a_run_that_its_rate_has_killed_back_to_where_it_began(monkeypatch):
    monkeypatch.setattr(Adviser, "look_further", lambda self, report: None)
    killed, advised = Saturating(5.0), Saturating(0.01)
    guard, said = guarded(killed, points(300), action="rescale", problem=None)
    mean = sum(killed.losses[:64]) / 64
    assert any(f"the loss hardly falls: it is {mean:.2g}" in text for text in said)  # not nan
    assert any("rolled back to step 0" in text and "64 of 64 steps are lost" in text for text in said)
    assert [each.step for each in guard.events if each.kind == "rolled back"] == [64]
    guarded(advised, points(300), problem=None)
    assert end(killed) < 1.2 * end(advised)


def test_a_run_that_only_begins_slowly_is_not_tried_at_length_from_where_it_began():
    guard, said = guarded(HandWritten(lr=2e-5, optimizer=Adam), sinusoids(70))
    assert 64 in [step for step, _ in guard.severities] and guard.advice is None
    assert len(said) == 1 and "the loss has not fallen" in said[0]
    # The trials from there would be another 700 steps' work.
    assert guard._run.schedule.state.spent < 600


def test_a_run_that_something_else_has_killed_is_not_told_to_lower_its_rate():
    class Kills(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 0:
                with torch.no_grad():
                    module.net[-2].bias.copy_(torch.tensor([100.0, -100.0, -100.0, -100.0]))

    guard, said = guarded(Saturating(0.01), points(80), [Kills()], problem=None)
    assert guard.advice is None and "after 64 steps its mean is" in said[-1]


class Smooth(Saturating):
    """Regression by a small network."""

    def __init__(self, lr):
        super().__init__(lr)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.losses.append(float(loss.detach()))
        return loss


@pytest.mark.parametrize("times", [30, 1000])
def test_an_outlier_is_named_although_adams_state_holds_it_and_the_next_loss_is_usual(times):
    """From the state that holds it, no rate survives."""
    batches = [(x, torch.sin(x[:, :4].sum(1, keepdim=True))) for x in points(140)]
    batches[100] = (batches[100][0], times * batches[100][1])
    module = Smooth(0.03)
    guard, said = guarded(module, batches, problem=None)
    assert module.losses[101] < module.losses[0]
    assert guard.advice.cause is Cause.BATCH and "the batch of step 100 has a loss of " in said[0]


class FixedPoint(torch.autograd.Function):
    """Iterates to ``z = tanh(W z + x)``; the gradient by a second iteration."""

    @staticmethod
    def forward(ctx, weight, x):
        z = torch.zeros_like(x)
        for _ in range(30):
            z = torch.tanh(z @ weight.T + x)
        ctx.save_for_backward(weight, z)
        return z

    @staticmethod
    def backward(ctx, gradient):
        weight, z = ctx.saved_tensors
        slope, total = 1 - z * z, gradient
        for _ in range(30):
            total = gradient + (total * slope) @ weight
        return (total * slope).T @ z, total * slope


class Equilibrium(LightningModule):
    """A deep equilibrium network."""

    def __init__(self, lr):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 24), nn.Linear(24, 1)
        self.weight, self.lr = nn.Parameter(torch.randn(24, 24) * 0.1), lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.last(FixedPoint.apply(self.weight, self.first(x))) - y).square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.lr, momentum=0.9)


class LearnedRates(LightningModule):
    """Meta-SGD: one learned inner rate per entry."""

    def __init__(self, lr):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        self.rates = nn.ParameterList([torch.full_like(each, 0.03) for each in self.net.parameters()])
        self.lr = lr

    def task_loss(self, params, data):
        return (functional_call(self.net, params, (data[0],)) - data[1]).square().mean()

    def inner_lr(self):
        return dict(zip([name for name, _ in self.net.named_parameters()], self.rates, strict=True))

    def training_step(self, batch, batch_idx):
        losses, rates = [], self.inner_lr()
        for xs, ys, xq, yq in zip(*batch, strict=True):
            params = dict(self.net.named_parameters())
            for _ in range(2):
                grads = torch.autograd.grad(self.task_loss(params, (xs, ys)), params.values(), create_graph=True)
                params = {n: v - rates[n] * g for (n, v), g in zip(params.items(), grads, strict=True)}
            losses.append(self.task_loss(params, (xq, yq)))
        return torch.stack(losses).mean()

    def meta_problem(self, batch):
        params = dict(self.net.named_parameters())
        return MetaProblem(params, self.task_loss, batch[:2], batch[2:], self.inner_lr(), inner_steps=2)

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=self.lr)


class StopsAtAdvice(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.callbacks[-1].advice is not None


def first_advice(module, batches):
    guard = ConvergenceGuard(action="log")
    options = {**QUIET, "max_epochs": 1, "callbacks": [StopsAtAdvice(), guard]}
    Trainer(**options).fit(module, DataLoader(batches, batch_size=None))
    return guard.advice


def waves(count):
    """Points of one wave, drawn anew at each step."""
    direction, batches = torch.randn(4, 1, generator=torch.Generator().manual_seed(1)), []
    for step in range(1, count + 1):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
        batches.append((x, torch.sin(2 * x @ direction)))
    return batches


def few_curves(count):
    """Six sine curves a batch, eight points each to adapt on and to be judged by."""
    batches = []
    for step in range(1, count + 1):
        generator = torch.Generator().manual_seed(step)
        height, phase = (torch.rand(6, 1, 1, generator=generator) for _ in range(2))
        x = torch.rand(6, 16, 1, generator=generator) * 6 - 3
        y = (2 * height + 0.5) * torch.sin(x + 3 * phase)
        batches.append((x[:, :8], y[:, :8], x[:, 8:], y[:, 8:]))
    return batches


def test_parameters_that_a_high_rate_has_damaged_are_not_where_rates_are_tried():
    """Its loss was still low when it began to diverge, but from there only a hundred times lower rates last."""
    advice = first_advice(Equilibrium(lr=0.1), waves(200))
    assert advice.step > 10 and advice.cause is Cause.BETA
    assert 0.001 < advice.beta < 0.02  # 0.01 learns most, 0.03 diverges in the end


def test_learned_inner_rates_that_rise_with_the_outer_rate_are_not_blamed():
    """Within two steps they are eight times what is configured: no lower `inner_lr` keeps them from rising."""
    advice = first_advice(LearnedRates(lr=0.1), few_curves(200))
    assert (advice.cause, advice.step) == (Cause.BETA, 0) and 0.003 < advice.beta < 0.02  # 0.01 learns most
    assert advice.configured_alpha == pytest.approx(0.03)
