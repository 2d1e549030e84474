"""A problem that is not what training descends is one warning that says why; one that is, is none."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    GuardWarning,
    LookaheadOptions,
    MetaProblem,
    measure,
)
from lightning_maml_guard.messages.reasons import Kind
from lightning_maml_guard.stability import training_match
from lightning_maml_guard.stability.problems import PlainProblem
from lightning_maml_guard.utils.lightning_compat import LightningModule
from tests.helpers import QUIET, Trainer, one_line

TASKS, RATE = 4, 0.05


def net(*between):
    return nn.Sequential(nn.Linear(2, 8), *between, nn.Tanh(), nn.Linear(8, 1))


class HandWritten(LightningModule):
    """A user's own MAML: a loop over the tasks, one inner step, the mean over them."""

    def __init__(self, network=None, scale=1.0, steps=1, noise=0.0, first_order=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = network or net()
        self.scale, self.steps, self.noise, self.first_order = scale, steps, noise, first_order

    def adapted(self):
        return {name: value for name, value in self.net.named_parameters() if value.requires_grad}

    def task_loss(self, params, data):
        return F.mse_loss(functional_call(self.net, params, (data[0],)), data[1])

    def one(self, support, query):
        fast = self.adapted()
        for _ in range(self.steps):
            loss = self.task_loss(fast, support)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not self.first_order)
            fast = {name: p - RATE * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        return self.task_loss(fast, query)

    def training_step(self, batch, batch_idx):
        sx, sy, qx, qy = batch
        sx = sx + self.noise * torch.randn_like(sx) if self.noise else sx
        tasks = zip(zip(sx, sy, strict=True), zip(qx, qy, strict=True), strict=True)
        return self.scale * torch.stack([self.one(*task) for task in tasks]).mean()

    def configure_optimizers(self):
        return SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def batches(count, tasks=TASKS):
    made = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(tasks, 6, 2, generator=made),
            torch.randn(tasks, 6, 1, generator=made),
            torch.randn(tasks, 7, 2, generator=made),
            torch.randn(tasks, 7, 1, generator=made),
        )
        for _ in range(count)
    ]


def problem(module, batch, **changed):
    sx, sy, qx, qy = batch
    stated = {
        "params": dict(module.net.named_parameters()),
        "task_loss": module.task_loss,
        "support": (sx, sy),
        "query": (qx, qy),
        "inner_lr": RATE,
    }
    return MetaProblem(**{**stated, **changed})


def warned(module, stated=problem, data=None, action="log", **options):
    """The guard's warnings of a short run."""
    guard = ConvergenceGuard(
        every_n_steps=2,
        action=action,
        problem=stated,
        curvature=CurvatureOptions(max_iter=3),
        lookahead=LookaheadOptions(steps=2),
    )
    accumulated = options.get("accumulate_grad_batches", 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(callbacks=[guard], **{**QUIET, "max_steps": 3, **options})
        trainer.fit(module, DataLoader(data or batches(3 * accumulated), batch_size=None))
    assert guard.history
    return [one_line(each.message) for each in caught if each.category is GuardWarning]


class Wave(nn.Module):
    def forward(self, x):
        return torch.sin(10 * x)


class Chaotic(HandWritten):
    """An inner loop at many times its limit, in which rounding grows from step to step."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(2, 8), Wave(), nn.Linear(8, 1)), steps=5)

    def task_loss(self, params, data):
        return 30 * super().task_loss(params, data)


def test_what_rounding_makes_of_a_diverging_inner_loop_is_no_mismatch(monkeypatch):
    def differs():
        stated = lambda module, batch: problem(module, batch, inner_steps=5)  # noqa: E731
        return any("is not what training_step trains" in each for each in warned(Chaotic(), stated))

    assert not differs()
    monkeypatch.setattr(training_match, "_LAST_PLACES", 0)
    assert differs()


def frozen_first():
    network = net()
    network[0].requires_grad_(False)
    return network


class HeadMoves(HandWritten):
    """All layers lie in ``params``, and the first one is neither adapted nor moved."""

    def adapted(self):
        return dict(self.net[2].named_parameters(prefix="2"))

    def configure_optimizers(self):
        return SGD(self.net[2].parameters(), lr=0.01)


def shots_for_tasks(module, batch):
    sx, sy, qx, qy = (each.transpose(0, 1)[:6] for each in batch)
    return problem(module, (sx, sy, qx, qy))


def only(name):
    def stated(module, batch):
        return problem(module, batch, params={n: p for n, p in module.net.named_parameters() if name in n})

    return stated


WRONG = {
    "sum for mean": (lambda: HandWritten(scale=TASKS), problem, "4 times larger, and the batch has 4 tasks"),
    "mean for sum": (lambda: HandWritten(scale=1 / TASKS), problem, "4 times smaller, and the batch has 4 tasks"),
    "frozen": (lambda: HandWritten(frozen_first()), problem, "frozen (requires_grad=False): 0.weight, 0.bias"),
    "not held": (HeadMoves, problem, "no optimizer moves: 0.weight, 0.bias"),
    "lacking": (HandWritten, only("weight"), "The optimizer moves parameters that `params` lacks"),
    "inner steps": (lambda: HandWritten(steps=5), problem, "usual causes are another inner_lr, number of inner steps"),
    "shots": (HandWritten, shots_for_tasks, "The problem has 6 tasks"),
    "query": (HandWritten, lambda m, b: problem(m, b, query=(b[0], b[1])), "support for query"),
    "order": (lambda: HandWritten(first_order=True), problem, "another `order` (first-order for exact MAML)"),
    "nan": (
        HandWritten,
        lambda m, b: problem(m, (b[0], b[1] / 0 * 0, b[2], b[3])),
        "Training's loss is finite and the problem's is not",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_problem_that_is_not_the_trainings_is_one_warning_with_the_cause(case):
    make, stated, said = WRONG[case]
    told = [each for each in warned(make(), stated) if "is not what training_step trains" in each]
    assert len(told) == 1 and said in told[0]


def buffers_apart(module, batch):
    def task_loss(params, data):
        buffers = {name: value.clone() for name, value in module.net.named_buffers()}
        return F.mse_loss(functional_call(module.net, {**params, **buffers}, (data[0],)), data[1])

    return problem(module, batch, task_loss=task_loss)


class ByHand(HandWritten):
    """Manual optimisation that clips and returns nothing."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()


class BodyAndHead(HandWritten):
    """An optimizer each for body and head, whose gradients are clipped apart: together they have another direction."""

    def __init__(self, longest=(0.1, 0.1), first_order=False):
        super().__init__(first_order=first_order)
        self.automatic_optimization, self.longest = False, longest

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer, length in zip(optimizers, self.longest, strict=True):
            self.clip_gradients(optimizer, gradient_clip_val=length, gradient_clip_algorithm="norm")
            optimizer.step()

    def configure_optimizers(self):
        return [SGD(self.net[0].parameters(), lr=0.01), SGD(self.net[2].parameters(), lr=0.01)]


@pytest.mark.parametrize(("longest", "known"), [((0.1, 0.1), 0.1), ((100.0, 0.1), 0.1), ((0.1, 0.02), math.nan)])
def test_what_several_optimizers_clip_to_is_known_where_it_is_one_length(longest, known, monkeypatch):
    guards = []
    monkeypatch.setattr(ConvergenceGuard, "on_train_end", lambda guard, *_: guards.append(guard._run.state.clipped_to))
    assert not [each for each in warned(BodyAndHead(longest)) if "training_step trains" in each]
    assert guards == pytest.approx([known], rel=1e-3, nan_ok=True)


RIGHT = {
    "plain": (HandWritten, {}),
    "dropout": (lambda: HandWritten(net(nn.Dropout(0.5))), {}),
    "batch norm": (lambda: HandWritten(net(nn.BatchNorm1d(8))), {}),
    "augmentation": (lambda: HandWritten(noise=0.3), {}),
    "bfloat16": (HandWritten, {"precision": "bf16-mixed"}),
    "accumulation": (HandWritten, {"accumulate_grad_batches": 4}),
    "clipped by the Trainer": (HandWritten, {"gradient_clip_val": 0.01}),
    "by hand": (ByHand, {}),
    "body and head": (BodyAndHead, {}),
    "head alone": (HeadMoves, {}),
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_problem_that_is_the_trainings_is_no_warning(case):
    make, options = RIGHT[case]
    stated = {"batch norm": buffers_apart, "head alone": only("2.")}.get(case, problem)
    assert not [each for each in warned(make(), stated, **options) if "training_step trains" in each]


def test_an_accumulated_loss_that_is_divided_twice_is_named():
    told = warned(HandWritten(scale=1 / 3), accumulate_grad_batches=3)
    assert any("3 times smaller, and 3 batches are accumulated" in each for each in told)


def test_measure_compares_with_the_loss_it_is_given():
    module, batch = HandWritten(), batches(1)[0]
    loss = module.training_step(batch, 0).detach()
    same, other = (measure(problem(module, batch), beta=0.1, check_against=given) for given in (loss, TASKS * loss))
    assert same.notes == () and same.beta_c == other.beta_c
    (note,) = other.notes
    assert note.kind is Kind.PROBLEM_DIFFERS and note.effect == "tasks"
    assert note.value == pytest.approx(TASKS) and note.losses[:2] == pytest.approx((float(loss), TASKS * float(loss)))
    assert "sums over the tasks" in other.notices[0] and math.isnan(note.losses[2])
    with pytest.raises(TypeError, match="check_against"):
        measure(problem(module, batch), beta=0.1, check_against="3")


class Adversaries(LightningModule):
    """Two optimizers in turn, of which training_step returns the second one's loss."""

    def __init__(self, missing=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization, self.missing = False, missing
        self.maker, self.judge = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def makes(self, noise):
        return F.softplus(-self.judge(self.maker(noise))).mean()

    def judges(self, noise, params=None):
        judge = (lambda x: functional_call(self.judge, params, (x,))) if params else self.judge
        told = F.softplus(judge(self.maker(noise).detach())) + F.softplus(-judge(noise + 1))
        return told.mean() + (0.0 if params else self.missing * sum(p.square().sum() for p in self.judge.parameters()))

    def training_step(self, batch, batch_idx):
        for optimizer, loss in zip(self.optimizers(), (self.makes, self.judges), strict=True):
            optimizer.zero_grad()
            value = loss(batch)
            self.manual_backward(value)
            optimizer.step()
        return value

    def configure_optimizers(self):
        return [SGD(self.maker.parameters(), lr=0.001), SGD(self.judge.parameters(), lr=0.001)]


def adversaries(missing, batches):
    def of_maker(module, batch):
        names = dict(module.maker.named_parameters())
        loss = lambda params: F.softplus(-module.judge(functional_call(module.maker, params, (batch,)))).mean()  # noqa: E731
        return PlainProblem(names, loss)

    def of_judge(module, batch):
        return PlainProblem(dict(module.judge.named_parameters()), lambda params: module.judges(batch, params))

    guards = [ConvergenceGuard(problem=each) for each in (of_maker, of_judge)]
    data = [torch.randn(16, 2, generator=torch.Generator().manual_seed(0))] * batches
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(max_epochs=1, callbacks=guards, **QUIET).fit(Adversaries(missing), DataLoader(data, batch_size=None))
    return [one_line(each.message) for each in caught if issubclass(each.category, GuardWarning)]


@pytest.mark.parametrize(("missing", "told"), [(0.0, 0), (5.0, 1)])
def test_the_loss_of_another_optimizer_is_no_mismatch_where_the_gradients_agree(missing, told):
    said = adversaries(missing, 3)
    assert len(said) == told
    assert all("that of another optimizer" in each and "task" not in each for each in said)


def test_a_loss_that_another_optimizer_works_against_need_not_fall():
    assert adversaries(0.0, 70) == []


def test_later_advice_recalls_that_the_problem_is_not_the_trainings():
    def at_a_high_rate():
        module = HandWritten(scale=TASKS)
        module.configure_optimizers = lambda: SGD(module.parameters(), lr=0.5)
        return module

    said = warned(at_a_high_rate(), action="warn", data=batches(12), max_steps=12)
    assert "is not what training_step trains: the same batch has" in said[0]
    recalled = [each for each in said[1:] if "is not what training_step trains, as was said" in each]
    assert recalled and all("Why: The problem that is measured" in each for each in recalled)
