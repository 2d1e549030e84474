"""Training that a guard sees only in part: no loss per step, clipping of its own, several optimizers, accumulation."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    GuardWarning,
    LookaheadOptions,
    MetaProblem,
    measure,
)
from lightning_maml_guard.guard import judgement as of_guard
from lightning_maml_guard.optim.linearized_step import linearized_step
from lightning_maml_guard.optim.lr_cap import LRCap
from lightning_maml_guard.optim.shadow import ShadowOptimizer, next_update
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem
from lightning_maml_guard.utils.lightning_compat import LightningModule, MisconfigurationException
from tests.helpers import QUIET, Trainer, dense_hessian, one_line

INNER = 0.1


def task(generator):
    """Support and query of a linear regression with noise: a quadratic, whose limit is one number."""
    x = torch.randn(2, 20, 4, generator=generator)
    y = x @ torch.ones(4, 1) + torch.randn(2, 20, 1, generator=generator)
    return x[0], y[0], x[1], y[1]


def episodes(count, tasks=4):
    made = torch.Generator().manual_seed(0)
    return [[torch.stack(each) for each in zip(*[task(made) for _ in range(tasks)], strict=True)] for _ in range(count)]


class Maml(LightningModule):
    """One inner step on a linear model, by a loop."""

    def __init__(self, lr, manual=False, returns=True, clip=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 1, bias=False)
        self.rate, self.returns, self.clip = lr, returns, clip
        self.automatic_optimization = not manual
        self.losses = []

    def task_loss(self, params, data):
        return F.mse_loss(functional_call(self.net, params, (data[0],)), data[1])

    def meta_loss(self, batch):
        losses = []
        for sx, sy, qx, qy in zip(*batch, strict=True):
            params = dict(self.net.named_parameters())
            (gradient,) = torch.autograd.grad(
                self.task_loss(params, (sx, sy)), list(params.values()), create_graph=True
            )
            losses.append(self.task_loss({"weight": params["weight"] - INNER * gradient}, (qx, qy)))
        return torch.stack(losses).mean()

    def training_step(self, batch, batch_idx):
        loss = self.meta_loss(batch)
        self.losses.append(float(loss.detach()))
        if not self.automatic_optimization:
            self.take(loss, batch_idx)
        return loss if self.returns else None

    def take(self, loss, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.clip:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
        optimizer.step()

    def configure_optimizers(self):
        return SGD(self.net.parameters(), lr=self.rate)


def problem(module, batch):
    sx, sy, qx, qy = batch
    return MetaProblem(dict(module.net.named_parameters()), module.task_loss, (sx, sy), (qx, qy), INNER)


def run(module, guard, data, steps, **options):
    """Train, and return the guard's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(max_steps=steps, callbacks=[guard], **{**QUIET, **options})
        trainer.fit(module, DataLoader(data, batch_size=None))
    return [one_line(each.message) for each in caught if each.category is GuardWarning]


# Manual optimisation whose step returns nothing.


class LosesItself(Maml):
    """It multiplies the rate within some steps between two checks, so that the guard sees no rate that has grown."""

    def take(self, loss, batch_idx):
        group = self.optimizers().param_groups[0]
        group["lr"] = 6.0 if 7 <= batch_idx < 10 else 0.2
        super().take(loss, batch_idx)
        group["lr"] = 0.2


class Raises(Maml):
    """Its own schedule multiplies the rate between two checks, where everybody can see it."""

    def take(self, loss, batch_idx):
        self.optimizers().param_groups[0]["lr"] = 6.0 if 7 <= batch_idx < 10 else 0.2
        super().take(loss, batch_idx)


def test_without_a_loss_per_step_the_first_lookahead_tells_the_start_and_checks_roll_back():
    module = LosesItself(0.2, manual=True, returns=False)
    guard = ConvergenceGuard(every_n_steps=5, action="rescale", rollback=True, problem=problem)
    told = run(module, guard, episodes(20), 20)
    assert sum("training_step returns no loss" in each for each in told) == 1
    assert max(module.losses) > 100 and module.losses[10] < 3
    assert [event.kind for event in guard.events].count("rolled back") == 1
    assert guard._run.state.statistics.start == pytest.approx(module.losses[0], rel=1e-5)


def test_a_rate_that_was_raised_is_looked_at_before_the_next_step():
    module = Raises(0.2, manual=True, returns=False)
    guard = ConvergenceGuard(every_n_steps=5, action="rescale", rollback=True, problem=problem)
    run(module, guard, episodes(20), 20)
    assert [step for step, _ in guard.severities] == [0, 5, 8, 10, 15]
    assert max(module.losses) < 20 and max(module.losses[10:]) < 5


def test_a_lost_last_step_is_rolled_back_without_a_loss_per_step():
    module = LosesItself(0.2, manual=True, returns=False)
    guard = ConvergenceGuard(every_n_steps=5, action="rescale", rollback=True, problem=problem)
    run(module, guard, episodes(10), 10)
    assert max(module.losses) > 100 and float(module.meta_loss(episodes(1)[0]).detach()) < 5


# Several optimizers.


class Halves(LightningModule):
    """Body and head with an optimizer each; both step along one gradient, or take turns."""

    def __init__(self, body, head, turns=False):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.rates, self.turns, self.applied = (body, head), turns, []

    task_loss = Maml.task_loss

    def training_step(self, batch, batch_idx):
        both = self.optimizers()
        for turn in [[each] for each in both] if self.turns else [both]:
            stated = problem(self, batch)
            fast = [self.one(stated.params, *task) for task in zip(*batch, strict=True)]
            loss = torch.stack(fast).mean()
            self.zero_grad()
            self.manual_backward(loss)
            for each in turn:
                each.step()
        return loss

    def one(self, params, sx, sy, qx, qy):
        gradients = torch.autograd.grad(self.task_loss(params, (sx, sy)), list(params.values()), create_graph=True)
        adapted = {n: p - INNER * g for (n, p), g in zip(params.items(), gradients, strict=True)}
        return self.task_loss(adapted, (qx, qy))

    def configure_optimizers(self):
        return SGD(self.net[0].parameters(), lr=self.rates[0]), SGD(self.net[2].parameters(), lr=self.rates[1])


def dense_beta_c(module, batch, ratio):
    """2 over the largest eigenvalue of D J, D = diag(1, ..., ratio, ...), J the dense Hessian of the meta loss."""
    params = {name: value.detach() for name, value in module.net.named_parameters()}
    tasks = list(zip(*batch, strict=True))
    matrix = dense_hessian(lambda at: sum(module.one(at, *each) for each in tasks) / len(tasks), params)
    scale = torch.cat([torch.full((v.numel(),), 1.0 if n[0] == "0" else ratio) for n, v in params.items()])
    values = torch.linalg.eigvals(torch.diag(scale).double() @ torch.as_tensor(matrix).double())
    return 2 / float(values.real.max())


@pytest.mark.parametrize("ratio", [1.0, 0.2])
def test_all_optimizers_that_move_the_problem_shape_its_limit(ratio):
    data = episodes(3)
    module = Halves(0.05, 0.05 * ratio)
    truth = dense_beta_c(module, data[0], ratio)
    guard = ConvergenceGuard(every_n_steps=10, problem=problem)
    assert run(module, guard, data, 4) == []  # each optimizer's step counts
    low, high = guard.history[0].beta_c_interval
    assert low * 0.999 <= truth <= high * 1.001 and guard.history[0].beta == 0.05


def test_one_optimizer_or_several_are_the_same_update():
    module, batch = Halves(0.1, 0.1), episodes(1)[0]
    params = dict(module.net.named_parameters())
    gradient = {name: torch.randn_like(value) for name, value in params.items()}
    halves, whole = (
        [SGD(module.net[0].parameters(), 0.1), SGD(module.net[2].parameters(), 0.1)],
        SGD(params.values(), 0.1),
    )
    one, two = (next_update(each, params, gradient) for each in (whole, halves))
    assert all(torch.equal(one[name], two[name]) for name in params)
    one, two = (measure(problem(module, batch), optimizer=each) for each in (whole, halves))
    assert (one.beta, one.beta_c, one.predicted_change) == (two.beta, two.beta_c, two.predicted_change)


def test_optimizers_of_different_kinds_keep_their_own_preconditioner():
    module = Halves(0.1, 0.1)
    params = dict(module.net.named_parameters())
    adam, sgd = Adam(module.net[0].parameters(), lr=0.01), SGD(module.net[2].parameters(), lr=0.1, momentum=0.5)
    assert "no second moment" in linearized_step([adam, sgd], params).note
    for value in params.values():
        value.grad = torch.full_like(value, 2.0)
    adam.step()
    step = linearized_step([adam, sgd], params)
    assert step.scale["2.weight"].unique() == 1
    assert step.scale["0.weight"] == pytest.approx(torch.full((5, 4), 0.01 / 0.1 / 2.0))
    assert step.responses[0].limit == pytest.approx(3.0)  # SGD's 2(1+m), not Adam's 38


def test_a_cap_scales_all_optimizers_by_one_factor():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    fast, slow = SGD([weights[0]], lr=0.4), SGD([weights[1]], lr=0.1)
    cap = LRCap([fast, slow], 0.2)
    for weight, optimizer in zip(weights, (fast, slow), strict=True):
        weight.grad = torch.ones(1)
        optimizer.step()
    cap.remove()
    assert [weight.item() for weight in weights] == pytest.approx([0.8, 0.95])


def test_optimizers_that_take_turns_end_the_checks_with_what_to_do():
    guard = ConvergenceGuard(every_n_steps=2, problem=problem)
    told = run(Halves(0.05, 0.05, turns=True), guard, episodes(6), 12)
    (said,) = [each for each in told if "take turns" in each]
    assert "a ConvergenceGuard(problem=...) for each" in said and "PlainProblem(params, loss)" in said
    assert len(guard.history) == 1
    # What the optimizers do is no mistake in the problem.
    assert not any("is not what training_step trains" in each for each in told)


class Gan(LightningModule):
    """Generator and discriminator in turns, as Lightning's example has them; the step returns nothing."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator, self.discriminator = nn.Linear(3, 2), nn.Linear(2, 1)

    def loss(self, which, params, batch):
        if which == "generator":
            made = functional_call(self.generator, params, (torch.randn(16, 3),))
            return F.softplus(-self.discriminator(made)).mean()
        scores = [
            functional_call(self.discriminator, params, (x,)) for x in (batch, self.generator(torch.randn(16, 3)))
        ]
        return F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()

    def training_step(self, batch, batch_idx):
        for optimizer, which in zip(self.optimizers(), ("generator", "discriminator"), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(which, dict(getattr(self, which).named_parameters()), batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return SGD(self.generator.parameters(), lr=0.01), SGD(self.discriminator.parameters(), lr=0.02)


def of_generator(module, batch):
    params = dict(module.generator.named_parameters())
    return PlainProblem(params, lambda at: module.loss("generator", at, batch))


def of_discriminator(module, batch):
    params = dict(module.discriminator.named_parameters())
    return PlainProblem(params, lambda at: module.loss("discriminator", at, batch))


def test_what_the_refusal_says_works():
    guards = [
        ConvergenceGuard(every_n_steps=4, action="log", problem=each) for each in (of_generator, of_discriminator)
    ]
    module = Gan()
    trainer = Trainer(max_steps=20, callbacks=guards, **QUIET)
    trainer.fit(module, DataLoader(torch.randn(10, 16, 2), batch_size=None))  # GuardWarnings are errors here
    assert [guard.history[0].beta for guard in guards] == [0.01, 0.02]
    assert all(len(guard.history) > 1 for guard in guards)


def test_manual_optimisation_without_a_problem_names_one_per_optimizer():
    with pytest.raises(MisconfigurationException, match=r"take turns \(a GAN\).*PlainProblem\(params, loss\)"):
        run(Halves(0.05, 0.05, turns=True), ConvergenceGuard(), episodes(1), 1)


# Clipping of the user's own.


class Clipping(Maml):
    """Clips in Lightning's hook: through the optimizer, through its own parameters, or by something a copy lacks."""

    def __init__(self, lr, how):
        super().__init__(lr)
        self.how = how

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if self.how == "optimizer":
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        elif self.how == "parameters":
            nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        elif self.how == "replaced":
            for parameter in self.parameters():
                parameter.grad = parameter.grad * min(1.0, 0.5 / float(parameter.grad.norm()))
        else:
            assert optimizer is self.optimizers(use_pl_optimizer=False)
            nn.utils.clip_grad_norm_(self.parameters(), 0.5)


@pytest.mark.parametrize("how", ["optimizer", "parameters", "replaced"])
def test_the_modules_own_clipping_is_done_in_a_lookahead(how):
    data = episodes(40)
    module = Clipping(1.2, how)  # far above the critical rate; clipped steps stay bounded
    guard = ConvergenceGuard(every_n_steps=5, action="stop", problem=problem)
    assert run(module, guard, data, 20) == [] and guard.stopped_step is None
    assert {report.status for report in guard.history} <= {"edge", "safe"}
    unclipped = ConvergenceGuard(every_n_steps=5, action="stop", problem=problem)
    run(Maml(1.2), unclipped, data, 20)
    assert unclipped.stopped_step == 0


def test_a_hook_that_fails_on_a_copy_is_told_once_and_a_lookahead_alone_stops_nothing():
    guard = ConvergenceGuard(every_n_steps=5, action="stop", problem=problem)
    told = run(Clipping(0.3, "live"), guard, episodes(20), 20)
    assert sum("configure_gradient_clipping could not be called on copies" in each for each in told) == 1
    assert guard.stopped_step is None


def test_where_clipping_is_not_seen_a_lookahead_alone_stops_nothing(monkeypatch):
    """The curvature is said to be fine, the lookahead is not: only the second can be clipping's doing."""

    def fine(*args, **kwargs):
        return replace(measure(*args, **kwargs), status="safe", beta_status="safe", alpha_status="safe", findings=())

    monkeypatch.setattr(of_guard, "measure", fine)
    guard = ConvergenceGuard(every_n_steps=5, action="stop", problem=problem, lookahead=LookaheadOptions(steps=5))
    module = Maml(2.0, manual=True, clip=0.05)
    # Before the first step nothing is known of its clipping.
    told = run(module, guard, episodes(11), 11)
    (notice,) = [" ".join(each.split()) for each in told if "Gradients that training_step clips by itself" in each]
    lower = re.search(r"If they are not clipped, set the optimizer's lr to ([\d.]+)\.$", notice)
    assert lower is not None and 0 < float(lower[1]) < 1
    assert guard.advice is None and guard.stopped_step is None and guard.history[0].status == "safe"
    # Afterwards the lookahead clips as the first step did.
    assert guard._run.state.clipped_to == pytest.approx(0.05, rel=1e-3) and guard.history[1].severity < 0.5


# Accumulation as the meta-batch.


def test_accumulated_batches_are_judged_as_the_one_batch_they_make_up():
    whole = episodes(7, tasks=4)
    apart = [[each[i : i + 1] for each in batch] for batch in whole for i in range(4)]
    histories = []
    for data, accumulated in ((whole, 1), (apart, 4)):
        guard = ConvergenceGuard(every_n_steps=1, problem=problem)
        assert run(Maml(0.5), guard, data, 7, accumulate_grad_batches=accumulated) == []
        histories.append(guard.history[1:])  # at the first step one batch is known
    statuses = [[report.status for report in history] for history in histories]
    one, many = (sum(report.beta_c for report in history) for history in histories)
    assert statuses[0] == statuses[1] == ["safe"] * 6
    assert many == pytest.approx(one, rel=0.1)


@pytest.mark.parametrize("tasks", ["mean", "worst"])
def test_the_curvature_of_an_accumulated_batch_is_that_of_all_its_tasks(tasks):
    module, batch = Maml(0.1), episodes(1, tasks=4)[0]
    parts = [problem(module, [each[first : first + 2] for each in batch]) for first in (0, 2)]
    options = CurvatureOptions(tasks=tasks)
    one = measure(problem(module, batch), beta=0.1, curvature=options)
    two = measure(AccumulatedProblem(tuple(parts)), beta=0.1, curvature=options)
    for name in ("alpha_c", "beta_c", "lambda_max", "beta_c_noise", "predicted_change"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-4), name


def test_shadows_of_several_optimizers_share_parameters():
    module = Halves(0.1, 0.2)
    params = dict(module.net.named_parameters())
    shadow = ShadowOptimizer([SGD(params.values(), lr=0.1), SGD(module.net[2].parameters(), lr=0.2)], params)
    shadow.step({name: torch.ones_like(value) for name, value in params.items()})
    moved = {name: float((params[name] - shadow.params[name]).mean()) for name in params}
    assert moved == pytest.approx({"0.weight": 0.1, "0.bias": 0.1, "2.weight": 0.3, "2.bias": 0.3}, rel=1e-5)
