"""A guard that only logs leaves a run bit for bit as it is: a covering array of runs, and torch.compile."""

import itertools
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR
from torch.utils.data import DataLoader

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    GuardWarning,
    LookaheadOptions,
    MetaLearningModule,
    MetaProblem,
)
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import LightningModule, Trainer, seed_everything
from tests.guard.changing import BATCHES, Changing
from tests.guard.changing import loader as batches_that_change
from tests.guard.changing import problem as problem_of_a_changed_batch
from tests.helpers import left_behind

STEPS = 8
LEVELS = {
    "precision": ("32-true", "bf16-mixed", "bf16-true"),
    "accumulate": (1, 3),
    "net": ("batch norm", "dropout", "layer norm"),
    "kind": ("meta", "foreign", "plain"),
    "scheduler": ("none", "one cycle", "lambda", "warm restarts"),
    "action": ("log", "warn"),
}
RUNS = (
    ("bf16-mixed", 3, "layer norm", "meta", "none", "log"),
    ("bf16-true", 1, "dropout", "foreign", "none", "warn"),
    ("32-true", 3, "batch norm", "plain", "lambda", "warn"),
    ("bf16-mixed", 1, "batch norm", "plain", "warm restarts", "log"),
    ("32-true", 1, "layer norm", "meta", "one cycle", "warn"),
    ("bf16-true", 3, "dropout", "plain", "one cycle", "log"),
    ("32-true", 3, "dropout", "foreign", "warm restarts", "log"),
    ("bf16-mixed", 1, "dropout", "meta", "lambda", "warn"),
    ("bf16-true", 1, "layer norm", "foreign", "lambda", "log"),
    ("bf16-true", 1, "batch norm", "meta", "warm restarts", "warn"),
    ("bf16-mixed", 1, "batch norm", "foreign", "one cycle", "warn"),
    ("32-true", 1, "batch norm", "plain", "none", "log"),
    ("32-true", 1, "layer norm", "plain", "warm restarts", "warn"),
)
SCHEDULERS = {
    "none": None,
    "one cycle": lambda o: OneCycleLR(o, 0.02, total_steps=STEPS + 1),
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "warm restarts": lambda o: CosineAnnealingWarmRestarts(o, 3),
}


class Drawing(nn.Module):
    """Draws from every random state at each call, and leaves its input as it is."""

    def forward(self, x):
        return x + 0.0 * (random.random() + np.random.rand() + torch.rand(()))


NETWORKS = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "dropout": lambda: nn.Dropout(0.3),
    "layer norm": lambda: nn.LayerNorm(8),
}


def network(name, draw=None):
    return nn.Sequential(nn.Linear(1, 8), NETWORKS[name](), draw or Drawing(), nn.Tanh(), nn.Linear(8, 1))


class Scheduled(LightningModule):
    """Adam, and a scheduler that steps with it."""

    def scheduled(self, make):
        self.make = make
        return self

    def configure_optimizers(self):
        optimizer = Adam(self.parameters(), lr=0.01)
        if self.make is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), "interval": "step"}}


class Meta(Scheduled, MetaLearningModule):
    pass


class Plain(Scheduled):
    """Any LightningModule; as a foreign MAML module it is told to the guard by `problem`."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        (x, y), _ = batch
        loss = F.mse_loss(self(x.flatten(0, 1)), y.flatten(0, 1))
        self.log("train/loss", loss)
        return loss


def problem(module, batch):
    def task_loss(params, data):
        x, y = data
        buffers = {name: value.clone() for name, value in module.net.named_buffers()}
        return F.mse_loss(torch.func.functional_call(module.net, {**params, **buffers}, (x,)), y)

    return MetaProblem(dict(module.net.named_parameters()), task_loss, *batch, inner_lr=0.01)


def episodes():
    return [Sinusoid().sample(2, torch.Generator().manual_seed(seed)) for seed in range(STEPS)]


def trained(module, guards, folder, epochs=2, **options):
    from pytorch_lightning.callbacks import LearningRateMonitor
    from pytorch_lightning.loggers import CSVLogger

    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=CSVLogger(folder, flush_logs_every_n_steps=1), log_every_n_steps=1,
        callbacks=[*guards, LearningRateMonitor(logging_interval="step")], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    data = episodes()[: STEPS // epochs]
    validation = DataLoader(data[:2], batch_size=None) if isinstance(module, MetaLearningModule) else None
    trainer.fit(module, DataLoader(data, batch_size=None, shuffle=True), validation)
    return trainer


def assert_invisible(make, guard, folder, **options):
    found = []
    for guards in ([], [guard]):
        seed_everything(3, verbose=False)
        module = make()
        found.append(left_behind(module, trained(module, guards, folder / str(len(guards)), **options)))
    unguarded, guarded = found
    for what, value in unguarded.items():
        assert value == guarded[what], what
    assert len(unguarded["log"]) >= STEPS
    return unguarded


def assert_measured(guard):
    """Adam is judged from its second step on."""
    first, *later = [math.isnan(report.beta_c) for report in guard.history]
    assert first and later and not any(later)


def test_the_runs_cover_every_pair():
    for (i, first), (j, second) in itertools.combinations(enumerate(LEVELS.values()), 2):
        assert {(run[i], run[j]) for run in RUNS} == set(itertools.product(first, second))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: " ".join(map(str, run)))
def test_a_guard_that_does_not_act_leaves_no_trace(run, tmp_path):
    precision, accumulate, net, kind, scheduler, action = run

    def make():
        module = Meta(network(net), inner_lr=0.01) if kind == "meta" else Plain(network(net))
        return module.scheduled(SCHEDULERS[scheduler])

    guard = ConvergenceGuard(
        every_n_steps=3,
        action=action,
        problem=problem if kind == "foreign" else None,
        curvature=CurvatureOptions(max_iter=5),
        lookahead=LookaheadOptions(steps=3),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ConvergenceGuard", GuardWarning)
        warnings.filterwarnings("ignore", "The tasks of a batch cannot be vectorised")
        assert_invisible(make, guard, tmp_path, precision=precision, accumulate_grad_batches=accumulate)
    assert_measured(guard)


# Every type of batch that its step changes, with every way to step.
CHANGED = tuple(itertools.product(BATCHES, ("every batch", "four batches a step", "manual")))


@pytest.mark.parametrize("run", CHANGED, ids=" ".join)
def test_a_step_that_changes_its_batch_leaves_no_trace(run, tmp_path):
    from pytorch_lightning.loggers import CSVLogger

    kind, stepping = run
    accumulate, manual = 4 if stepping == "four batches a step" else 1, stepping == "manual"
    found = []
    guard = ConvergenceGuard(
        every_n_steps=2,
        action="log",
        problem=problem_of_a_changed_batch if manual else None,
        curvature=CurvatureOptions(max_iter=3),
        lookahead=LookaheadOptions(steps=2, batches=3),
    )
    for guards in ([], [guard]):
        seed_everything(3, verbose=False)
        module = Changing(kind, manual=manual)
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", callbacks=guards, accumulate_grad_batches=accumulate, log_every_n_steps=1,
            logger=CSVLogger(tmp_path / str(len(guards)), flush_logs_every_n_steps=1), enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "ConvergenceGuard", GuardWarning)
            trainer.fit(module, batches_that_change(kind, 3 * accumulate))
        found.append(left_behind(module, trainer))
    for what, value in found[0].items():
        assert value == found[1][what], what
    assert [report.step for report in guard.history] == [0, 2, 4] and guard.severities
    assert all(report.lambda_max > 0 for report in guard.history)


class Noisy(Adam):
    """Slow weights in a list, noise from generators of its own: all of it outside `state`."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.fast = [value for group in self.param_groups for value in group["params"]]
        self.slow = {"weights": [value.detach().clone() for value in self.fast]}
        self.torch, self.numpy, self.python = (
            torch.Generator().manual_seed(1),
            np.random.default_rng(1),
            random.Random(1),
        )
        self.norms = []

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for fast, slow in zip(self.fast, self.slow["weights"], strict=True):
            noise = torch.rand((), generator=self.torch) + self.numpy.random() + self.python.random()
            slow.lerp_(fast, 0.5).add_(1e-3 * float(noise))
            fast.copy_(slow)
        self.norms.append(float(self.slow["weights"][0].norm()))
        return loss


def test_an_optimizers_own_attributes_are_left_alone_by_lookaheads(tmp_path):
    optimizers = []

    class Own(Plain):
        def configure_optimizers(self):
            optimizers.append(Noisy(self.parameters(), lr=0.01))
            return optimizers[-1]

    guard = ConvergenceGuard(
        every_n_steps=3, action="log", curvature=CurvatureOptions(max_iter=5), lookahead=LookaheadOptions(steps=3)
    )
    assert_invisible(lambda: Own(network("dropout")), guard, tmp_path)
    assert optimizers[0].norms == optimizers[1].norms and len(guard.severities) >= 3


class Compiled(Plain):
    """Logs after its step: Lightning's `log` cannot be compiled."""

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0][0].flatten(0, 1)), batch[0][1].flatten(0, 1))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("train/loss", outputs["loss"])


class Network(nn.Module):
    """`compile` in place passes torch's own containers over."""

    def __init__(self):
        super().__init__()
        self.layers = network("dropout", nn.Identity())

    def forward(self, x):
        return self.layers(x)


def compiled_network_in_place(backend):
    module = Plain(Network()).scheduled(None)
    module.net.compile(backend=backend)
    return module


def compiled_network(backend):
    return Plain(torch.compile(Network(), backend=backend)).scheduled(None)


def compiled_module(backend):
    module = Plain(Network()).scheduled(None)
    module.compile(backend=backend)
    return module


def compiled_training_step(backend):
    return torch.compile(Compiled(Network()).scheduled(None), backend=backend)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (compiled_network_in_place, None),
        (compiled_network, problem),
        (compiled_module, None),
        (compiled_training_step, None),
    ],
)
def test_compiled_code_stays_compiled_and_as_it_is(make, told, backend, tmp_path):
    counters, captured = torch._dynamo.utils.counters, []

    def fresh():
        captured.append(dict(counters["stats"]))
        torch._dynamo.reset()
        counters.clear()
        return make(backend)

    guard = ConvergenceGuard(
        every_n_steps=3,
        action="log",
        problem=told,
        curvature=CurvatureOptions(max_iter=5),
        lookahead=LookaheadOptions(steps=3),
    )
    assert_invisible(fresh, guard, tmp_path)
    assert captured[1] == dict(counters["stats"]) and captured[1]["unique_graphs"] == 1
    assert_measured(guard)
