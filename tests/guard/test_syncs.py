"""How often a check makes the host wait for the device."""

import math
import warnings

import pytest
import torch
from torch.optim import SGD

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    LookaheadOptions,
    MetaLearningModule,
    MetaProblem,
    measure,
)
from lightning_maml_guard.guard.check import Check
from lightning_maml_guard.linalg import lanczos
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.stability import krylov_stopping as krylov
from lightning_maml_guard.stability.hvp import MeasurementCache, NetworkFacts
from lightning_maml_guard.stability.problems import AccumulatedProblem
from lightning_maml_guard.tasks.regression import Sinusoid
from tests.helpers import fit
from tests.host_syncs import HostSyncs
from tests.stability.test_basis_kinds import with_moments
from tests.stability.test_measure import sinusoid_problem


@pytest.fixture
def transfers(monkeypatch):
    """How often the Krylov runs since need their coefficients on the host: every four products."""
    lengths = []
    monkeypatch.setattr(lanczos, "_SYNC_ON_HOST", lanczos._SYNC_ON_DEVICE)

    def watched(run):
        def running(*arguments, **options):
            found = run(*arguments, **options)
            lengths.append(found.matvecs)
            return found

        return running

    for name in ("lanczos", "arnoldi"):
        monkeypatch.setattr(krylov, name, watched(getattr(krylov, name)))
    return lambda: sum(math.ceil(length / 4) for length in lengths)


def on_device(problem, optimizer):
    state = [each for held in optimizer.state.values() for each in held.values() if each.dim()]
    return dict(problem.params), problem.support, problem.query, state


@pytest.mark.parametrize(
    ("criterion", "adam", "inner_lr", "order"),
    [
        ("exact", False, 0.03, "exact"),
        ("exact", True, 1.0, "exact"),  # beyond its limit, so that the safe rate is measured as well
        ("exact", False, 1.0, "first"),
        ("simplified", False, 0.03, "exact"),
        ("simplified", True, 0.03, "first"),
    ],
)
def test_a_measurement_waits_for_its_coefficients_and_once_more(transfers, criterion, adam, inner_lr, order):
    torch.manual_seed(0)
    module, _, problem = sinusoid_problem(order=order, inner_lr=inner_lr)
    optimizer = with_moments(module, problem) if adam else SGD(module.parameters(), lr=1e-3)
    cache = MeasurementCache(NetworkFacts(checked={"Hessian", "meta-update"}))
    with HostSyncs(on_device(problem, optimizer)) as syncs:
        report = measure(problem, optimizer=optimizer, cache=cache, curvature=CurvatureOptions(criterion=criterion))
    # Where J is not symmetric, whether the inner rate turned a direction is one more question, at each inner rate.
    turned = {"exact": 0, "first": 2}[order]
    more = criterion == "exact"  # the simplified criterion asks for nothing else
    assert transfers() + more <= syncs.count <= transfers() + 1 + turned
    assert report.hvps > 10 and math.isfinite(report.lambda_max)


def test_a_guards_check_waits_once_for_its_lookahead_and_once_for_adaptation(transfers, monkeypatch):
    counted, check = [], Check.check

    def watched(self, batch, *arguments, **options):
        self.run.state.facts.checked |= {"Hessian", "meta-update"}
        with HostSyncs((dict(self.module.named_parameters()), [batch])) as syncs:
            check(self, batch, *arguments, **options)
        counted.append(syncs.count)

    monkeypatch.setattr(Check, "check", watched)
    guard = ConvergenceGuard(every_n_steps=10, action="log", lookahead=LookaheadOptions(batches=1))
    module = MetaLearningModule(mlp(), optimizer=lambda parameters: SGD(parameters, lr=1e-3))
    fit(module, Sinusoid().sample(4, torch.Generator().manual_seed(0)), 2, [guard])
    # The last one tells once whether batched products give the network's own gradient.
    assert counted == [transfers() + 4] and guard.history[0].severity < 3


def test_the_counter_counts():
    device, host = torch.arange(4.0), torch.arange(4.0)
    with HostSyncs([device]) as syncs:
        made = (device * 2 + host).sum()
        assert syncs.count == 0
        assert float(made) == 18 and bool(made > 1) and made.tolist() == 18
        assert syncs.count == 3
        copied = made.cpu()
        assert syncs.count == 4 and float(copied) == 18 and host.tolist() == host.cpu().tolist()
        assert syncs.count == 4
        assert len(device[device > 1]) == 2 and torch.equal(device, host)
        assert syncs.count == 6


@pytest.mark.parametrize("estimator", ["lanczos", "pyhessian", lambda matvec, start: [1.0]])
def test_a_loss_that_is_not_finite_is_named_by_every_estimator(estimator):
    data = (torch.ones(1, 1),)
    problem = MetaProblem({"w": torch.ones(3)}, lambda p, d: (p["w"] ** 2).sum() + math.inf, data, data)
    report = measure(problem, beta=0.1, curvature=CurvatureOptions(criterion="simplified", estimator=estimator))
    assert report.status == "unresolved" and "The task loss is inf at these parameters" in report.reasons[0]


@pytest.mark.parametrize("order", ["exact", "first"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("alpha", [0.1, 3.0])
def test_a_query_loss_that_is_not_finite_is_named(order, known, alpha):
    """The inner rate's limit is known all the same: the support loss is finite."""
    support, query = (torch.zeros(2, 1),), (torch.ones(2, 1),)
    loss = lambda p, d: (p["w"] ** 2).sum() + torch.where(d[0] > 0, math.inf, 0.0).sum()  # noqa: E731
    problem = MetaProblem({"w": torch.ones(3, requires_grad=True)}, loss, support, query, alpha, order=order)
    optimizer = (SGD if known else torch.optim.Adamax)(problem.params.values(), lr=0.1)
    report = measure(problem, optimizer=optimizer)
    assert report.status == ("unresolved" if alpha < 1 else "unsafe") and report.beta_status == "unresolved"
    assert report.reasons[-1].startswith("beta is not judged: The query loss after adaptation is inf")
    assert report.alpha_c == pytest.approx({"exact": 1.0, "first": 0.5}[order], rel=0.02) and len(
        report.reasons
    ) == 1 + (alpha > 1)
    assert (report.advice is None) == (alpha < 1)


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_query_set_that_holds_nan_is_named(accumulated):
    """Its own loss is nan at any inner rate: the data is to be mended first."""
    query = (torch.tensor([[1.0], [math.nan]]),)
    params = {"w": torch.ones(3, requires_grad=True)}
    loss = lambda p, d: (p["w"] ** 2).sum() + d[0].sum()  # noqa: E731
    problem = MetaProblem(params, loss, (torch.zeros(2, 1),), query, 0.1)
    stated = AccumulatedProblem((problem, problem)) if accumulated else problem
    report = measure(stated, optimizer=SGD(params.values(), lr=0.1))
    assert report.status == "unresolved" and math.isnan(report.alpha_c)
    assert "The data holds nan" in report.reasons[0]
    assert "The query loss after adaptation is nan" in report.reasons[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ["exact", "first"])
def test_cuda_says_so_itself(transfers, order):
    module = MetaLearningModule(mlp(), order=order).cuda()
    batch = Sinusoid().sample(4, torch.Generator().manual_seed(0))
    problem = module.meta_problem(tuple(tuple(part.cuda() for part in pair) for pair in batch))
    optimizer, cache = SGD(module.parameters(), lr=1e-3), MeasurementCache()
    measure(problem, optimizer=optimizer, cache=cache)
    before = transfers()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            measure(problem, optimizer=optimizer, cache=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if "synchroniz" in str(each.message)]
    assert len(waits) <= transfers() - before + 1 + {"exact": 0, "first": 2}[order]
