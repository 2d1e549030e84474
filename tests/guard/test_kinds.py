"""Other kinds of parameters, gradients and activations: the same run without them is the truth."""

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import nn
from torch.optim import SGD, Adagrad, Adam, RMSprop, SparseAdam
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, LookaheadOptions
from lightning_maml_guard.lookahead.lookahead import Lookahead
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.stability.problems import training_step_problem
from lightning_maml_guard.utils.lightning_compat import Trainer
from tests.helpers import QUIET, dense_hessian, fit, symmetric_top
from tests.utils.test_double_backward import Checkpointed

BATCH = torch.randn(6, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Spectral(LightningModule):
    """A filter with complex weights, or the same with their real and imaginary parts as two real tensors."""

    def __init__(self, optimizer, split=False):
        super().__init__()
        weight = torch.randn(3, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
        self.gain, self.make = nn.Parameter(torch.ones(3, 1, dtype=torch.float64)), optimizer
        if split:
            self.real, self.imaginary = nn.Parameter(weight.real.clone()), nn.Parameter(weight.imag.clone())
        else:
            self.weight = nn.Parameter(weight)

    def training_step(self, batch, batch_idx):
        weight = self.weight if hasattr(self, "weight") else torch.complex(self.real, self.imaginary)
        filtered = torch.fft.irfft(torch.fft.rfft(batch) * weight, n=8)
        return F.mse_loss(torch.tanh(self.gain * filtered), batch.roll(1, -1))

    def configure_optimizers(self):
        return self.make(self.parameters())


class Embedded(LightningModule):
    """An embedding whose gradients are sparse, or dense."""

    def __init__(self, optimizer, sparse=True):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.make = nn.Embedding(12, 4, sparse=sparse).double(), optimizer
        self.register_buffer("head", torch.randn(4, 3, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(torch.tanh(self.table(batch).mean(1)) @ self.head, batch[:, 0] % 3)

    def configure_optimizers(self):
        return self.make(self.parameters())


WORDS = torch.arange(10).reshape(5, 2)
OPTIMIZERS = [
    lambda p: SGD(p, lr=0.3),
    lambda p: SGD(p, lr=0.1, momentum=0.9),
    lambda p: Adam(p, lr=0.03),
    lambda p: RMSprop(p, lr=0.01),
    lambda p: Adagrad(p, lr=0.1),
]


def really(module, optimizer, batch, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return [*losses, float(module.training_step(batch, 0).detach())]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_complex_weights_are_measured_as_pairs_of_real_ones(make):
    """beta_c, curvature and preconditioner beside those of the split network; the lookahead beside training itself."""
    found = []
    for split in (False, True):
        module = Spectral(make, split)
        optimizer = module.configure_optimizers()
        really(module, optimizer, BATCH, 2)
        problem = training_step_problem(module, BATCH, 0)
        report = measure(problem, optimizer=optimizer)
        seen = Lookahead([problem], optimizer, 4).run().losses
        assert seen == pytest.approx(really(module, optimizer, BATCH, 4), rel=1e-6)
        found.append((report.lambda_max, report.beta_c, report.predicted_change, seen))
    assert found[0][:3] == pytest.approx(found[1][:3], rel=1e-2)  # Lanczos starts from other vectors
    assert found[0][3] == pytest.approx(found[1][3], rel=1e-9)


def test_the_curvature_of_complex_weights_is_the_dense_hessians():
    module = Spectral(OPTIMIZERS[0], split=True)
    params = {name: value.detach() for name, value in module.named_parameters()}

    def loss(at):
        return torch.func.functional_call(
            _Step(module), {f"module.{name}": value for name, value in at.items()}, (BATCH,)
        )

    top = symmetric_top(dense_hessian(loss, params))
    report = measure(training_step_problem(Spectral(OPTIMIZERS[0]), BATCH, 0), beta=0.1)
    low, high = report.lambda_max_interval
    assert low * (1 - 1e-9) <= top <= high * (1 + 1e-9) and report.lambda_max == pytest.approx(top, rel=1e-2)


class _Step(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.training_step(batch, 0)


@pytest.mark.parametrize("make", [*OPTIMIZERS[:2], OPTIMIZERS[4]])
def test_sparse_gradients_are_those_of_the_dense_embedding(make):
    found = []
    for sparse in (True, False):
        module = Embedded(make, sparse)
        optimizer = module.configure_optimizers()
        really(module, optimizer, WORDS, 2)
        assert module.table.weight.grad.is_sparse == sparse
        problem = training_step_problem(module, WORDS, 0)
        report = measure(problem, optimizer=optimizer)
        seen = Lookahead([problem], optimizer, 4).run().losses
        assert seen == pytest.approx(really(module, optimizer, WORDS, 4), rel=1e-6) and not report.notes
        found.append((report.lambda_max, report.beta_c, *seen))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_an_optimizer_of_sparse_gradients_alone_is_looked_ahead_with():
    module = Embedded(lambda p: SparseAdam(p, lr=0.05))
    optimizer = module.configure_optimizers()
    really(module, optimizer, WORDS[:2], 2)
    seen = Lookahead([training_step_problem(module, WORDS, 0)], optimizer, 4).run().losses
    assert seen == pytest.approx(really(module, optimizer, WORDS, 4), rel=1e-6)


@pytest.mark.parametrize(("kind", "batch"), [(Spectral, BATCH), (Embedded, WORDS)])
def test_such_a_run_is_judged_and_left_alone(kind, batch, recwarn):
    def trained(callbacks):
        module = kind(lambda p: SGD(p, lr=0.1))
        Trainer(max_steps=6, callbacks=callbacks, **QUIET).fit(module, DataLoader([batch] * 6, batch_size=None))
        return module

    guard = ConvergenceGuard(every_n_steps=3, action="log", lookahead=LookaheadOptions(steps=3))
    guarded, plain = trained([guard]), trained([])
    assert [report.status for report in guard.history] == ["safe"] * 2
    assert not [each for each in recwarn if "failed" in str(each.message)]
    for one, other in zip(guarded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


class Recomputed(LightningModule):
    """A network whose activations are recomputed in the backward pass: ``reentrant`` or not; None: kept."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.net = Checkpointed(reentrant)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch), 3 * batch[:, :2])

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=10.0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_run_with_checkpoints_of_activations_is_judged_as_one_without(reentrant, recwarn):
    """Steps on copies are of the copies' parameters; the module's own would be recomputed from."""
    seen = []
    for kind in (None, reentrant):
        guard = ConvergenceGuard()
        fit(Recomputed(kind), torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), 3, [guard])
        assert guard.history[0].advice.beta < 5
        seen.append([(each.lambda_max, str(each.advice), each.severity) for each in guard.history])
    assert seen[0] == seen[1]
