"""Plain training: any LightningModule's own training_step, watched for beta_c and left as it was."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, GuardWarning, LookaheadOptions, measure
from lightning_maml_guard.stability.problems import PlainProblem, training_step_problem
from lightning_maml_guard.utils.isolation import isolated
from lightning_maml_guard.utils.lightning_compat import LightningModule, Trainer, seed_everything
from tests.helpers import QUIET, dense_by_differences, dense_hessian, guard_warns, symmetric_top

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)).double()
Y = X.sum(1, keepdim=True).sin()


class Regression(LightningModule):
    """With everything a training_step may touch: a metric, a list, a counter, batch norm, dropout, logging."""

    def __init__(self, lr=0.05, network=None, dropout=0.2):
        super().__init__()
        self.network = network or nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1)
        )
        self.double()
        self.seen, self.calls, self.lr = [], 0, lr
        self.average = MeanMetric()

    def training_step(self, batch):
        x, y = batch
        x.mul_(0.9)  # an augmentation in place
        loss = F.mse_loss(self.network(x), y)
        self.seen.append(float(loss.detach()))
        self.calls += 1
        self.average(loss.detach())
        self.log("loss", loss)
        self.log("average", self.average)
        return {"loss": loss}

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.lr)


def train(module, callbacks=(), steps=12, **arguments):
    trainer = Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        **{**QUIET, **arguments},
    )
    trainer.fit(module, DataLoader([(X.clone(), Y)] * steps, batch_size=None))
    return trainer


def test_beta_c_is_two_over_the_hessians_top():
    module = Regression(dropout=0.0)
    params = dict(module.named_parameters())

    def loss(at):
        return F.mse_loss(torch.func.functional_call(module.network, {n[8:]: p for n, p in at.items()}, (0.9 * X,)), Y)

    true = np.linalg.eigvalsh(dense_hessian(loss, params))
    guard = ConvergenceGuard(every_n_steps=100, action="log", curvature=CurvatureOptions(tol=1e-6, max_iter=40))
    train(module, [guard], steps=1)
    report = guard.history[0]
    assert report.beta_c == pytest.approx(2 / true[-1], rel=1e-6)
    assert report.lambda_max == pytest.approx(true[-1], rel=1e-6)
    assert math.isnan(report.alpha) and math.isnan(report.alpha_c) and math.isnan(report.exact_beta_c)
    assert report.status == "safe" and report.alpha_status == "safe"


def test_only_what_exists_is_logged_and_training_is_as_without_the_guard():
    weights, values = [], []
    for callbacks in ([], [ConvergenceGuard(every_n_steps=3, action="log")]):
        seed_everything(3)
        module = Regression()
        trainer = train(module, callbacks)
        weights.append(torch.cat([v.flatten().double() for v in module.state_dict().values()]))
        values.append((module.seen, module.calls, float(trainer.callback_metrics["average"])))
    assert torch.equal(*weights) and values[0] == values[1]
    logged = {name for name in trainer.callback_metrics if name.startswith("guard/")}
    assert {"guard/beta", "guard/beta_c", "guard/beta_ratio", "guard/predicted_change"} <= logged
    assert not logged & {"guard/alpha", "guard/alpha_c", "guard/exact_beta_c"}


def test_it_warns_and_rescales():
    with guard_warns("beta = 50 is .*x beta_c.*Applied from now on: beta = "):
        guard = ConvergenceGuard(every_n_steps=1, action="rescale", lookahead=LookaheadOptions(steps=0))
        train(Regression(lr=50.0, dropout=0.0), [guard])
    assert guard.history[-1].beta_applied == pytest.approx(guard.history[-1].beta_c)


def test_what_a_training_step_sends_to_its_logger_is_sent_once(tmp_path):
    from pytorch_lightning.loggers import CSVLogger

    class Direct(Regression):
        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"direct": float(batch_idx)}, step=batch_idx)
            self.logger.experiment.log_metrics({"experiment": float(batch_idx)}, step=batch_idx)
            return super().training_step(batch)

    logger = CSVLogger(tmp_path)
    sent = []
    logger.log_metrics = lambda metrics, step: sent.append((dict(metrics), step))
    logger.experiment.log_metrics = lambda metrics, step: sent.append((dict(metrics), step))
    trainer = train(Direct(), [ConvergenceGuard(every_n_steps=2, action="log")], steps=4, logger=logger)
    own = [values for values, _ in sent if not any(name.startswith("guard/") for name in values)]
    assert own == [{name: float(step)} for step in range(4) for name in ("direct", "experiment")]
    assert trainer.loggers == [logger] and len(sent) == 2 * 4 + 2


class Skipping(Regression):
    """Lightning skips a step whose ``training_step`` returns None."""

    def __init__(self, skips, returns=None):
        super().__init__()
        self.skips, self.returns = skips, returns

    def training_step(self, batch, batch_idx):
        return self.returns if self.skips(batch_idx) else super().training_step(batch)


@pytest.mark.parametrize("first", [1, 4])
def test_a_check_of_a_skipped_step_comes_with_the_next_that_has_a_loss(first, recwarn):
    guard = ConvergenceGuard(every_n_steps=100, action="warn")
    train(Skipping(lambda index: index < first), [guard], steps=first + 2)
    assert [each.step for each in guard.history] == [first] and guard.history[0].status == "safe"
    assert guard._run.schedule.state.waits == 0
    assert not [each for each in recwarn if each.category is GuardWarning]


def test_a_lookahead_leaves_skipped_batches_out(recwarn):
    guard = ConvergenceGuard(every_n_steps=3, action="warn")
    train(Skipping(lambda index: index % 3 == 1), [guard], steps=9)
    assert [each.step for each in guard.history] == [0, 3, 6] and [step for step, _ in guard.severities][:1] == [0]
    assert not [each for each in recwarn if each.category is GuardWarning]


def test_a_run_that_never_has_a_loss_hears_so_once():
    guard = ConvergenceGuard(every_n_steps=100)
    with guard_warns("Expected training_step to return a loss tensor.*NoneType"):
        train(Skipping(lambda index: True), [guard], steps=12)


def test_a_step_that_returns_no_tensor_has_nothing_to_measure():
    problem = training_step_problem(Skipping(lambda index: True, 1.0), (X, Y), 0)
    with pytest.raises(ValueError, match="got float"):
        measure(problem, beta=0.1, curvature=CurvatureOptions(criterion="simplified"))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.last = nn.Linear(3, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.last = nn.Linear(3, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("make", [Tied, Shared])
def test_tied_weights_and_shared_submodules_keep_their_live_parameters(make):
    module = Regression(network=make())
    live = {name: id(value) for name, value in module.named_parameters(remove_duplicate=False)}
    problem = training_step_problem(module, (X, Y), 0)
    with isolated(module):
        report = measure(problem, beta=0.1, curvature=CurvatureOptions(criterion="simplified", tol=1e-8, max_iter=60))
    assert {name: id(value) for name, value in module.named_parameters(remove_duplicate=False)} == live

    names, shapes = list(problem.params), [p.shape for p in problem.params.values()]
    centre = torch.cat([p.detach().flatten() for p in problem.params.values()])

    def gradient(theta):
        moved = copy.deepcopy(module.network)
        for value, piece, shape in zip(
            moved.parameters(), theta.split([s.numel() for s in shapes]), shapes, strict=True
        ):
            value.data = piece.reshape(shape)
        grads = torch.autograd.grad(F.mse_loss(moved(0.9 * X), Y), list(moved.parameters()))
        return torch.cat([g.flatten() for g in grads])

    assert len(names) == len(list(module.network.parameters()))
    assert report.lambda_max == pytest.approx(symmetric_top(dense_by_differences(gradient, centre)), rel=1e-6)


def test_a_loss_that_is_flat_is_not_called_safe():
    weight = nn.Parameter(torch.ones(3))
    report = measure(
        PlainProblem({"w": weight}, lambda p: p["w"].sum()),
        beta=0.1,
        curvature=CurvatureOptions(criterion="simplified"),
    )
    assert report.status == "unresolved" and "no curvature" in report.reasons[0]
