"""What checks may cost: counted, and kept."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.func import functional_call
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    LookaheadOptions,
    MetaLearningModule,
    TaskDataModule,
)
from lightning_maml_guard.guard.schedule import SCHEDULED, TRIGGERED, Schedule
from lightning_maml_guard.lookahead.divergence import RunningStatistics
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.stability.hvp import HESSIAN_PRICE, UPDATE_PRICE, MeasurementCache, make_operator
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.stability.problems import PlainProblem
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import Callback, LightningModule, Trainer
from tests.helpers import QUIET, fit, one_line


@given(st.floats(0.005, 0.5), st.integers(1, 40), st.floats(0, 100), st.integers(1, 50))
def test_no_more_than_the_share_and_a_fixed_credit_is_spent(share, gradients, measured, every):
    schedule, cost = Schedule(every, share), 1.2 * gradients + measured
    made = []
    for step in range(2000):
        if schedule.due(step) is not None:
            schedule.charge(lookahead_gradients=gradients, measured=measured)
            made.append(step)
            # The first and two looks at a run that has just begun are on credit.
            paid = [each for each in made if each not in {0, 2, 8}]
            assert step in {0, 2, 8} or max(len(paid) * cost, len(made) * cost - 300) <= share * step + 1e-6
    assert schedule.state.spent == pytest.approx(len(made) * cost)


def test_a_long_run_is_measured_again_as_its_steps_pay_for_it_whatever_was_spent_on_credit():
    """The sinusoid example: lower rates are tried on credit at step 64, and 2 % of 2500 steps pay for a measurement."""
    schedule, made = Schedule(100, 0.02), []
    for step in range(15_000):
        if (kind := schedule.due(step, stalled=step == 64)) is not None:
            schedule.charge(lookahead_gradients=0, measured={0: 50, 64: 200}.get(step, 50 if kind == SCHEDULED else 15))
            made.append((step, kind))
    assert made[:4] == [(0, SCHEDULED), (2, TRIGGERED), (8, TRIGGERED), (64, TRIGGERED)]
    assert made[4:] == [(step, SCHEDULED) for step in (2500, 5000, 7500, 10_000, 12_500)]


def test_without_a_share_every_check_comes():
    schedule = Schedule(10)
    found = []
    for step in range(50):
        if schedule.due(step) is not None:
            found.append(step)
            schedule.charge(lookahead_gradients=1000, measured=1000)
    assert found == [0, 10, 20, 30, 40]


def test_a_jump_of_the_loss_calls_a_check_at_any_cost():
    schedule = Schedule(100, 0.01)
    assert schedule.due(0) == SCHEDULED
    schedule.charge(lookahead_gradients=1000, measured=1000)
    statistics = RunningStatistics()
    for step in range(20):
        take(schedule, statistics, 1.0 if step < 19 else 50.0, 3.0)
    assert schedule.due(20) == TRIGGERED
    assert schedule.due(100) is None  # too early still for a scheduled one


def test_what_was_spent_survives_a_restart():
    schedule = Schedule(10, 0.02)
    assert schedule.due(0) == SCHEDULED
    schedule.charge(lookahead_gradients=11, measured=35)
    again = Schedule(10, 0.02, replace(schedule.state))
    assert [step for step in range(1, 6000) if again.due(step)] == [
        step for step in range(1, 6000) if schedule.due(step)
    ]


@pytest.mark.parametrize(
    ("unjudged", "found"),
    [
        (True, [(0, SCHEDULED), (2, SCHEDULED), (8, TRIGGERED)]),
        (False, [(0, SCHEDULED), (2, TRIGGERED), (8, TRIGGERED)]),
    ],
)
def test_the_check_after_one_that_could_not_judge_beta_measures_although_it_is_not_paid_for(unjudged, found):
    """Of the two looks on credit the first is a whole check then."""
    schedule = Schedule(100, 0.001)
    steps = []
    for step in range(1000):
        if (kind := schedule.due(step)) is not None:
            schedule.charge(lookahead_gradients=10, measured=20)
            schedule.state.unjudged = unjudged and not steps
            steps.append((step, kind))
        if step == 1:
            schedule = Schedule(100, 0.001, replace(schedule.state))
    assert steps == found


def test_adams_rate_is_not_judged_by_the_second_moment_of_a_single_gradient():
    schedule = Schedule(100, 0.02)
    schedule.planned, found = 100_000, []
    for step in range(5):
        found.append(schedule.due(step))
        schedule.state.unjudged = schedule.state.unjudged or step == 0
    assert found == [SCHEDULED, TRIGGERED, SCHEDULED, None, TRIGGERED]


def test_adams_rate_is_judged_at_the_second_check_and_that_comes_soon():
    guard = ConvergenceGuard(
        action="log", curvature=CurvatureOptions(max_iter=4), lookahead=LookaheadOptions(steps=1, triggers=False)
    )
    assert run(guard, 301) == [0, 2]
    assert [report.beta_status for report in guard.history] == ["unresolved", "safe"]


def run(guard, steps):
    torch.manual_seed(0)
    module = MetaLearningModule(mlp(hidden=(4,)), inner_lr=0.01)
    data = TaskDataModule(Sinusoid(shots=3), meta_batch_size=4)
    Trainer(max_steps=steps, callbacks=[guard], **QUIET).fit(module, data)
    return [report.step for report in guard.history]


def test_a_number_of_steps_is_taken_at_its_word_and_the_default_is_paid_for():
    assert run(
        ConvergenceGuard(every_n_steps=40, action="log", lookahead=LookaheadOptions(steps=1, triggers=False)), 121
    ) == [0, 40, 80, 120]
    guard = ConvergenceGuard(
        action="log",
        max_cost=0.25,
        curvature=CurvatureOptions(max_iter=4),
        lookahead=LookaheadOptions(steps=1, triggers=False),
    )
    steps = run(guard, 301)
    assert steps[:2] == [0, 2] and 1 < len(steps) < 5 and all(step % 100 == 0 for step in steps[2:])


@pytest.mark.filterwarnings("ignore:ConvergenceGuard. the problem that is measured is not")  # a part of its tasks
def test_the_curvature_is_that_of_the_first_tasks():
    guard = ConvergenceGuard(
        every_n_steps=1,
        action="log",
        curvature=CurvatureOptions(max_tasks=2, tol=1e-6, max_iter=50),
        lookahead=LookaheadOptions(steps=0),
    )
    few = ConvergenceGuard(
        every_n_steps=1,
        action="log",
        curvature=CurvatureOptions(tol=1e-6, max_iter=50),
        lookahead=LookaheadOptions(steps=0),
    )
    run(guard, 1)
    torch.manual_seed(0)
    module = MetaLearningModule(mlp(hidden=(4,)), inner_lr=0.01)
    data = TaskDataModule(Sinusoid(shots=3), meta_batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    few.problem = lambda module, batch: module.meta_problem(batch).part(2)
    Trainer(max_steps=1, callbacks=[few], **QUIET).fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    assert guard.history[0].lambda_max == pytest.approx(few.history[0].lambda_max, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan"), "2 %"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises((ValueError, TypeError), match=r"`max_cost` to be"):
        ConvergenceGuard(max_cost=share)


def take(schedule, statistics, loss, ratio):
    """What the guard does with a step's loss."""
    if statistics.update(loss, 1.0):
        schedule.spike(diverged=statistics.scale.diverged(loss, ratio))


def noisy(schedule, steps, height=10.0, ratio=1e9, cost=20, statistics=None):
    statistics = statistics or RunningStatistics()
    for step in range(steps):
        if (kind := schedule.due(step)) is not None:
            schedule.charge(lookahead_gradients=0, measured=cost)
            yield step, kind
        take(schedule, statistics, 1.0 if step % 3 else height, ratio)


@pytest.mark.parametrize(("share", "checks"), [(0.02, 6), (None, 30)])
def test_a_noisy_loss_calls_few_checks_on_credit_where_they_are_to_be_paid_for(share, checks):
    found = list(noisy(Schedule(100, share), 2000))
    assert checks <= len(found) <= 2 * checks


@given(st.integers(1, 60), st.sampled_from([3.0, 1e9]))
def test_a_number_of_steps_is_kept_whatever_a_noisy_loss_calls_in_between(every, ratio):
    found = list(noisy(Schedule(every), 600, ratio=ratio))
    assert [step for step, kind in found if kind == SCHEDULED] == list(range(0, 600, every))
    assert len(found) <= 600 / every + 600 / max(every // 2, 2) + 12  # and what is called stays as rare as it was


def test_a_noisy_run_is_measured_at_every_nth_step():
    """One task of one shot per step: the loss jumps all the time."""
    torch.manual_seed(0)
    guard = ConvergenceGuard(
        every_n_steps=10, action="log", curvature=CurvatureOptions(max_iter=2), lookahead=LookaheadOptions(steps=1)
    )
    module = MetaLearningModule(mlp(hidden=(4,)), inner_lr=0.01)
    data = TaskDataModule(Sinusoid(shots=1), meta_batch_size=1)
    Trainer(max_steps=101, callbacks=[guard], **QUIET).fit(module, data)
    looks = {step for step, _ in guard.severities}
    assert set(range(0, 101, 10)) <= {report.step for report in guard.history}
    assert len(looks - set(range(0, 101, 10))) > 5  # quick looks in between, most of which find nothing


def test_what_a_noisy_loss_calls_leaves_the_share_of_a_measurement():
    """Such looks cost a third of a measurement: paid for as soon as possible, they would use up the share before it."""
    schedule, measured = Schedule(100, 0.02), []
    schedule.state.gap = 10**6  # nothing is on credit any more
    for step in range(15_000):
        if (kind := schedule.due(step)) is not None:
            schedule.charge(lookahead_gradients=0, measured=46 if kind == SCHEDULED else 15)
            measured += [step] if kind == SCHEDULED else []
        if step % 500 == 499:
            schedule.spike(diverged=False)
    assert measured == [0, 2300, 4600, 6900, 9200, 11_500, 13_800]


@given(st.floats(0.005, 0.5), st.integers(1, 60), st.integers(4, 200))
def test_a_noisy_loss_spends_its_share_and_a_bounded_credit(share, cost, every):
    on_credit = sum(2**power <= max(every // 2, 2) for power in range(1, 20)) + 2  # and the early looks
    for number, (step, _) in enumerate(noisy(Schedule(every, share), 3000, cost=cost)):
        assert (number + 1) * cost <= share * step + (1 + on_credit) * cost + 1e-6


def test_a_jump_after_quiet_steps_is_looked_at_once_they_have_paid():
    schedule = Schedule(100, 0.02)
    statistics = RunningStatistics()
    calm = list(noisy(schedule, 4000, height=1.0, statistics=statistics))
    # A measurement and one more check are paid for, three steps after the last.
    schedule.state.spent = schedule.state.paid = 0.02 * 3950 - 40
    schedule.state.last, schedule.state.gap = 3998, 1024
    take(schedule, statistics, 50.0, 1e9)
    assert {kind for step, kind in calm if step not in {2, 8}} == {SCHEDULED}
    assert schedule.due(4001) == TRIGGERED
    schedule.charge(lookahead_gradients=0, measured=35)
    take(schedule, statistics, 50.0, 1e9)
    assert schedule.due(4010) is None


def test_a_diverged_loss_waits_for_no_payment():
    schedule = Schedule(100, 0.02)
    seen = [step for step, _ in noisy(schedule, 2000, ratio=3.0)]
    assert max(later - earlier for earlier, later in pairwise(seen)) <= 53
    assert len(seen) <= 60  # and where nothing is found, the loss is noisy


def test_a_diverged_loss_is_looked_at_in_the_next_step_and_one_that_is_not_finite_always():
    schedule, found = Schedule(100, 0.02), []
    for step in range(400):
        if schedule.due(step) is not None:
            found.append(step)
            schedule.charge(lookahead_gradients=0, measured=35)
        if 20 <= step < 40:
            schedule.spike(diverged=True)
        if step in {200, 203, 206}:
            schedule.spike(diverged=True)
            schedule.confirm_divergence()  # each is found to be right
        if 210 <= step < 220:
            schedule.spike(diverged=True, lost=True)
    assert found == [0, 2, 8, 21, 23, 27, 35, 51, 201, 204, 207, *range(211, 221)]


@pytest.mark.parametrize("share", [0.02, None])
def test_a_rate_that_has_grown_by_half_is_looked_at(share):
    """A warm-up from 0 to 1 over 100 steps, with a limit that is known from step 40 on, then a cosine that restarts."""
    schedule, found = Schedule(1000, share), []
    for step in range(101):
        if schedule.due(step, rate=step / 100, beta_c=2.0 if step >= 40 else math.nan):
            found.append(step)
    assert [step for step in found if step < 40] == (
        [0, 1, 2, 4, 7, 8, 13, 20, 31] if share else [0, 1, 2, 4, 7, 11, 17, 26]
    )
    assert [step for step in found if step >= 40] == [50, 76]  # from a quarter of the limit on
    again = [step for step in range(101, 2101) if schedule.due(step, rate=0.5 + 0.5 * math.cos(step / 100 * math.pi))]
    again = [step for step in again if step % 1000]
    assert 2 <= len(again) <= 4  # it comes back to 1 ten times
    assert all(later - earlier >= 500 for earlier, later in pairwise([step for step in again if step > 200]))


def test_a_rate_far_below_its_limit_may_grow():
    schedule = Schedule(1000, 0.02)
    assert [step for step in range(101) if schedule.due(step, rate=step / 100, beta_c=10.0)] == [0, 2, 8]
    assert schedule.due(101, rate=2.6, beta_c=10.0) == TRIGGERED


def test_a_run_that_pays_for_it_is_looked_at_early_and_often():
    def looks(planned, **options):
        schedule = Schedule(100, 0.02)
        schedule.planned, found = planned, []
        for step in range(min(planned or 400, 400)):
            if schedule.due(step, **options) is not None:
                schedule.charge(lookahead_gradients=10, measured=3)
                found.append(step)
        return found

    assert looks(100_000) == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    assert looks(None) == looks(300) == [0, 2, 8]
    assert looks(None, stalled=True) == [0, 2, 8, 64]


@pytest.mark.parametrize("kind", ["plain", "meta"])
def test_a_measurement_is_counted_by_what_its_graphs_and_products_are_of(kind, monkeypatch):
    made = []

    def noted(name, *given):
        made.append((name, make_operator(name, *given)[0]))
        return made[-1][1], 1e-5

    monkeypatch.setattr("lightning_maml_guard.stability.hvp.make_operator", noted)
    network = nn.Linear(2, 1)
    task = torch.ones(3, 4, 2), torch.zeros(3, 4, 1)
    if kind == "plain":
        loss = lambda params: sum((value**2).sum() for value in params.values())  # noqa: E731
        problem = PlainProblem(dict(network.named_parameters()), loss)
        prices = {"Hessian": UPDATE_PRICE}
    else:
        problem = MetaLearningModule(network, inner_lr=1e-3).meta_problem((task, task))
        prices = {"Hessian": HESSIAN_PRICE, "meta-update": UPDATE_PRICE}
    cache = MeasurementCache()
    for self_check in (6, 0):  # gradients of the self-check, in the first measurement
        made.clear()
        report = measure(problem, beta=1e-3, cache=cache)
        assert {name for name, _ in made} == set(prices)
        paid = [prices[name].graph * (1 + self_check) + prices[name].product * each.matvecs for name, each in made]
        # Beside the products, the gradient after the coming step.
        assert report.cost == pytest.approx(sum(paid) + UPDATE_PRICE.graph)
        assert report.hvps == sum(each.matvecs for _, each in made)


@given(st.floats(0, 1000), st.floats(0, 1000), st.integers(1, 10**6))
def test_a_run_affords_what_its_plan_pays_and_a_fixed_credit(spent, cost, planned):
    schedule = Schedule(100, 0.02)
    schedule.charge(lookahead_gradients=0, measured=spent)
    schedule.planned = planned
    assert schedule.affords(cost, 0) == (spent + cost <= 0.02 * planned + 300)
    schedule.planned = None
    assert schedule.affords(cost, planned) == (spent + cost <= 0.02 * planned + 300)  # as far as it has come
    assert Schedule(100).affords(1e9, 0)


def test_an_inner_rate_that_has_grown_by_half_is_looked_at_too():
    """Set by hand in a hook: no schedule tells of it."""
    schedule = Schedule(100, 0.02)
    steps = [step for step in range(100) if schedule.due(step, rate=0.1, alpha=0.01 * 1.05**step, alpha_c=0.1)]
    assert steps == [0, 2, 8, 19, 28, 37, 46, 55, 64, 73, 82, 91]
    far = Schedule(100, 0.02)
    assert [step for step in range(30) if far.due(step, rate=0.1, alpha=0.01 * 1.05**step, alpha_c=9.0)] == [0, 2, 8]


def test_a_loss_that_leaves_its_best_is_looked_at_once_without_payment():
    schedule = Schedule(100, 0.02)
    schedule.state.spent, schedule.state.last = 1e6, 0
    found = []
    for step in range(101, 160):
        schedule.note_left_best(110 <= step < 130 or step >= 150)
        if schedule.due(step) is not None:
            found.append(step)
    assert found == [110, 150]


@pytest.mark.parametrize("begin", [0, 37, 160])
def test_a_run_is_checked_where_it_begins(begin):
    """It may be resumed without the guard's state, or fitted again."""
    schedule = Schedule(100, 0.02)
    assert schedule.due(begin) == SCHEDULED and schedule.due(begin + 1) is None


def test_capped_rates_that_could_not_be_tried_are_looked_at_when_they_may_be():
    schedule = Schedule(100, 0.02)
    schedule.note_caps_checked(0, changed=True)
    assert schedule.state.ease_at == 8
    schedule.note_caps_checked(8, changed=False, until=32)
    assert schedule.state.ease_at == 32
    schedule.note_caps_checked(32, changed=False)  # they stay, as was tried
    assert schedule.state.ease_at == 32 + 24
    schedule.note_caps_checked(56, changed=False, until=40)  # a time that is past is no time to wait for
    assert schedule.state.ease_at == 56 + 24


def test_capped_rates_are_looked_at_where_the_mean_loss_reaches_no_new_low():
    schedule, found = Schedule(10_000, 0.02), []
    schedule.note_caps_checked(0, changed=True)
    schedule.state.ease_at = 10_000  # the look that comes in any case
    for step in range(1, 600):
        schedule.note_mean_loss(1.0 - min(step, 200) / 400, step)
        stagnates = schedule.stagnates(step)
        if schedule.due(step, capped=True) is not None and stagnates:
            found.append(step)
            schedule.note_caps_checked(step, changed=False, until=10_000)
    # After 48 steps, or a fifth of the steps so far; then it waits as long again.
    assert found == [250, 314, 394, 494]
    assert Schedule(10_000, 0.02, schedule.state).due(900, capped=False) is None


def test_rates_that_were_raised_have_to_prove_themselves():
    schedule = Schedule(100, 0.02)
    schedule.note_mean_loss(0.5, 40)
    schedule.note_caps_checked(50, changed=True, raised_from=0.1)
    schedule.note_mean_loss(0.5, 51)
    assert schedule.raised and not schedule.stagnates(82) and schedule.stagnates(83)
    schedule.note_mean_loss(0.4, 60)  # not yet their doing
    assert schedule.raised and not schedule.stagnates(83)
    schedule.note_mean_loss(0.3, 70)
    assert not schedule.raised and not schedule.stagnates(70 + 47) and schedule.stagnates(70 + 48)
    schedule.note_caps_checked(120, changed=False)
    assert not schedule.raised


def test_rates_are_not_raised_where_the_run_ends_before_that_is_seen_to_help():
    schedule = Schedule(100, 0.02)
    assert not schedule.ends_before(10**6)  # no end is known
    schedule.planned = 300
    assert [step for step in range(300) if schedule.ends_before(step)] == list(range(269, 300))
    schedule.planned = 3000
    assert schedule.ends_before(2800) and not schedule.ends_before(2700)


class Descent(LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.lr, self.weight = lr, nn.Parameter(torch.ones(4))

    def training_step(self, batch, batch_idx):
        return ((batch * self.weight).square()).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("action", ["warn", "rescale"])
def test_a_guard_that_joins_a_run_checks_before_its_first_step(action, tmp_path, recwarn):
    batch = torch.tensor([0.3, 1.0, 2.0, 4.0])
    before = fit(Descent(0.05), batch, 41)
    before.save_checkpoint(tmp_path / "before.ckpt")
    loss = float(before.lightning_module.training_step(batch, 0))

    class Raise(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].param_groups[0]["lr"] = 1.0

    module, guard = Descent(0.05), ConvergenceGuard(action=action)
    trainer = Trainer(max_steps=60, max_epochs=-1, callbacks=[Raise(), guard], **QUIET)
    trainer.fit(module, DataLoader([batch] * 100, batch_size=None), ckpt_path=tmp_path / "before.ckpt")
    assert (guard.history[0].step, guard.history[0].status, guard.advice.step) == (41, "unsafe", 41)
    assert guard.advice.beta < 0.5
    assert (float(module.training_step(batch, 0)) <= loss) == (action == "rescale")


@pytest.mark.parametrize("ruined", [math.nan, math.inf])
def test_a_guard_that_joins_a_run_with_ruined_parameters_ends_it(ruined, tmp_path, recwarn):
    before = fit(Descent(0.05), torch.ones(4), 41)
    with torch.no_grad():
        before.lightning_module.weight[0] = ruined
    before.save_checkpoint(tmp_path / "before.ckpt")
    module, guard = Descent(0.05), ConvergenceGuard(action="rescale")
    trainer = Trainer(max_steps=60, max_epochs=-1, callbacks=[guard], **QUIET)
    trainer.fit(module, DataLoader([torch.ones(4)] * 100, batch_size=None), ckpt_path=tmp_path / "before.ckpt")
    assert trainer.global_step == 42 and guard.stopped_step == 41
    assert any("the parameters are not finite, and there are no earlier ones" in one_line(w.message) for w in recwarn)


class Halves(LightningModule):
    """Weight and bias, each with an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.line, self.automatic_optimization = nn.Linear(2, 1), False

    def training_step(self, batch, batch_idx):
        loss = self.line(batch).square().mean()
        self.zero_grad()
        self.manual_backward(loss)
        for each in self.optimizers():
            each.step()
        return loss

    def configure_optimizers(self):
        return [SGD([each], lr=0.01) for each in self.line.parameters()]


class Whole(Halves):
    """The same with one."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch, batch_idx):
        return self.line(batch).square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.01)


def of_line(module, batch):
    def loss(params):
        return functional_call(module.line, params, (batch,)).square().mean()

    return PlainProblem(dict(module.line.named_parameters()), loss)


@pytest.mark.parametrize(
    ("make", "options", "planned"),
    [
        (Whole, {"max_epochs": 3}, 24),
        (Whole, {"max_epochs": 3, "accumulate_grad_batches": 3}, 9),
        (Whole, {"max_steps": 20}, 20),
        (Halves, {"max_epochs": 3}, 24),
        (Halves, {"max_steps": 40}, 40),
    ],
)
@pytest.mark.parametrize("at", [4, 8, 10])  # within an epoch, at its end
def test_a_resumed_run_is_planned_as_the_whole_one_was(tmp_path, make, options, planned, at):
    """Lightning has not counted a checkpoint's last step before the first one of the resumed run."""

    def run(**given):
        guard = ConvergenceGuard(action="log", problem=of_line)
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=at, save_top_k=-1)
        trainer = Trainer(callbacks=[guard, keep], **{**QUIET, "enable_checkpointing": True, **options})
        trainer.fit(make(), DataLoader(torch.ones(8, 4, 2), batch_size=None), **given)
        return guard._run.schedule.planned

    assert run() == planned
    if kept := [*tmp_path.glob(f"step={at}.ckpt")]:
        assert run(ckpt_path=kept[0]) == planned
    else:
        assert at > 9 and planned == 9
