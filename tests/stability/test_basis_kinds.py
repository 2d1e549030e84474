"""measure() and the guard with Lanczos vectors off the device and in bfloat16, against dense matrices."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.optim import Adam
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, LookaheadOptions, measure, suggest_rates
from lightning_maml_guard.linalg import krylov_basis as kept
from lightning_maml_guard.linalg.operators import Jacobian
from lightning_maml_guard.stability.measurement import Measurement
from lightning_maml_guard.theory.critical_rates import critical_rates
from tests.helpers import fit, grouped_measure, linear_module, quadratic_batch
from tests.stability.test_exact_criterion import dense_jacobian
from tests.stability.test_measure import dense_spectrum, sinusoid_problem


def with_moments(module, problem):
    optimizer = Adam(module.parameters(), lr=1e-3)
    loss = problem.loss(problem.params, tuple(part[0] for part in problem.support))
    loss.backward()
    optimizer.step()
    module.zero_grad()
    return optimizer


def numbers(report):
    return {name: value for name, value in asdict(report).items() if name != "seconds"}


@pytest.mark.parametrize(("order", "tasks"), [("exact", "worst"), ("first", "mean")])
def test_off_the_device_a_report_has_the_same_bits(monkeypatch, order, tasks):
    monkeypatch.setattr(kept, "_HOST_PANEL", 16)
    monkeypatch.setattr(kept, "_HOST_GROUP", 64)
    module, _, problem = sinusoid_problem(order=order)
    options = {"optimizer": with_moments(module, problem), "criterion": "exact", "tasks": tasks}
    measure(problem, **grouped_measure(**options))  # with the self-check, which counts
    here, there = (measure(problem, **grouped_measure(basis=basis, **options)) for basis in ("device", "cpu"))
    assert repr(numbers(here)) == repr(numbers(there)) and math.isfinite(here.beta_c)


@pytest.mark.parametrize("order", ["exact", "first", "simplified"])
def test_intervals_of_a_rounded_basis_hold_for_networks(order):
    for seed in range(2):
        torch.manual_seed(seed)
        module, batch, problem = sinusoid_problem(seed, inner_lr=0.03, order=order)
        values = dense_spectrum(module, batch)
        report = measure(problem, beta=0.01, curvature=CurvatureOptions(criterion="simplified", basis="bfloat16"))
        # A tolerance at which no run ends early.
        exact, sharp = (
            measure(problem, beta=0.01, curvature=CurvatureOptions(tol=9e-3, basis=basis))
            for basis in ("bfloat16", "device")
        )
        truth = critical_rates(values, 0.03)
        for (low, high), true in (
            (report.lambda_max_interval, values[-1]),
            (report.alpha_c_interval, 1 / values[-1]),
            (report.beta_c_interval, truth.beta_c),
        ):
            assert low <= true <= high and high - low < 0.05 * true
        mu = np.linalg.eigvals(dense_jacobian(problem))
        mu = mu[(mu.real > 0) & (np.abs(mu) > 0.02 * np.abs(mu).max())]
        low, high = exact.exact_beta_c_interval
        assert low <= min(2 * mu.real / np.abs(mu) ** 2) <= high
        # What goes along the binding direction: task noise and the predicted step.
        assert exact.beta_c_noise == pytest.approx(sharp.beta_c_noise, rel=2e-2)
        assert exact.predicted_change == pytest.approx(sharp.predicted_change, rel=1e-9)


@pytest.mark.parametrize("criterion", ["exact", "simplified"])
@pytest.mark.parametrize("inner_lr", [0.03, 1.0])  # 1.0: beyond alpha_c, so that the safe rate is measured as well
def test_a_measurement_holds_one_graph_at_a_time(monkeypatch, criterion, inner_lr):
    module, _, problem = sinusoid_problem(inner_lr=inner_lr)
    optimizer, made, init = with_moments(module, problem), [], Jacobian.__init__

    def watched(self, *arguments):
        assert all(each._gradients is None for each in made)
        made.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Jacobian, "__init__", watched)
    report = measure(problem, optimizer=optimizer, curvature=CurvatureOptions(criterion=criterion))
    assert len(made) == (1 if criterion == "simplified" else 3 if inner_lr == 1.0 else 2)
    assert all(each._gradients is None for each in made)
    assert criterion == "simplified" or (report.predicted_change < 0 and report.beta_c_noise > 0)


def test_a_rate_within_the_rounded_interval_is_not_judged():
    module = linear_module(4, 1.0, inner_lr=0.0, order="simplified")
    problem = module.meta_problem(quadratic_batch([0.3, 1.0, 2.0, 4.0]))
    sharp, rounded = (
        measure(problem, beta=0.499, curvature=CurvatureOptions(criterion="simplified", basis=basis))
        for basis in ("device", "bfloat16")
    )
    assert sharp.status == "safe" and rounded.status == "unresolved"
    low, high = rounded.beta_c_interval
    assert low <= 0.499 and high >= 0.5


def test_the_guard_and_suggest_rates_measure_with_it(monkeypatch):
    seen, init = [], Measurement.__init__

    def watched(self, objective, optimizer, beta, options, cache, **more):
        seen.append(options.krylov.basis)
        init(self, objective, optimizer, beta, options, cache, **more)

    monkeypatch.setattr(Measurement, "__init__", watched)
    module, batch = linear_module(4, 0.1, inner_lr=0.05), quadratic_batch([0.3, 1.0, 2.0, 4.0])
    guard = ConvergenceGuard(
        every_n_steps=1,
        action="log",
        curvature=CurvatureOptions(basis="cpu"),
        lookahead=LookaheadOptions(triggers=False, steps=0),
    )
    fit(module, batch, 1, [guard])
    suggest_rates(
        linear_module(4, 0.1, inner_lr=0.05),
        DataLoader([batch], batch_size=None),
        batches=1,
        accelerator="cpu",
        curvature=CurvatureOptions(basis="bfloat16", tasks="worst"),
        lookahead=LookaheadOptions(steps=0),
    )
    assert seen[0] == "cpu" and set(seen[1:]) == {"bfloat16"} and guard.history[0].beta_c > 0
