"""Limits of inner loops with rates of each step or an optimizer of their own, beside training by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, MetaLearningModule, MetaProblem, measure
from lightning_maml_guard.maml import inner_updates
from lightning_maml_guard.stability.inner_limit import inner_loop_limit
from lightning_maml_guard.theory.multiplier import inner_limit
from tests.helpers import bisect, fit, grouped

SPECTRUM = torch.tensor([0.3, 1.0, 2.0, 4.0], dtype=torch.float64)
ROTATION = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
SUPPORT_AT, QUERY_AT = torch.randn(2, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).unbind()
STRETCH = (1.0, 1.3)
SHARP = CurvatureOptions(max_iter=40, tol=1e-4)


def loss(params, data):
    """``1/2 (w - centre) . H (w - centre)``, of one task."""
    centre, stretch = data
    error = ROTATION @ (params["w"] - centre)
    return 0.5 * stretch * (SPECTRUM * error * error).sum()


def problem(rate, steps, tasks=2, at=None, apart=True, **arguments):
    support = (
        SUPPORT_AT[:tasks] if apart else torch.zeros(tasks, 4, dtype=torch.float64),
        torch.tensor(STRETCH)[:tasks],
    )
    query = (QUERY_AT[:tasks] if apart else support[0], support[1])
    start = torch.ones(4, dtype=torch.float64) if at is None else at
    return MetaProblem({"w": start}, loss, support, query, rate, steps, **arguments)


def slope(w, centre, stretch):
    return stretch * (((w - centre) @ ROTATION.T) * SPECTRUM) @ ROTATION


def descent(rates):
    def run(w, centre, stretch):
        for rate in rates:
            w = w - rate * slope(w, centre, stretch)
        return w

    return run


def momentum(rate, steps, m=0.9):
    def run(w, centre, stretch):
        buffer = torch.zeros_like(w)
        for _ in range(steps):
            buffer = m * buffer + slope(w, centre, stretch)
            w = w - rate * buffer
        return w

    return run


def adam(rate, steps):
    def run(w, centre, stretch):
        first = second = torch.zeros_like(w)
        for k in range(1, steps + 1):
            g = slope(w, centre, stretch)
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            w = w - rate * (first / (1 - 0.9**k)) / ((second / (1 - 0.999**k)).sqrt() + 1e-8)
        return w

    return run


def meta_slopes(inner, ws):
    """The exact meta-gradient of many runs at once, shape ``(runs, 4)``, by hand."""
    ws = ws.detach().requires_grad_()
    value = 0.0
    for support, query, stretch in zip(SUPPORT_AT, QUERY_AT, STRETCH, strict=True):
        error = (inner(ws, support, stretch) - query) @ ROTATION.T
        value = value + 0.25 * stretch * (SPECTRUM * error * error).sum()
    return torch.autograd.grad(value, ws)[0]


def minimum(inner):
    """Where outer training at a small rate ends, to the last digits by Newton's method on the meta-gradient."""
    w = torch.zeros(1, 4, dtype=torch.float64)
    for _ in range(300):
        w = w - 0.2 * meta_slopes(inner, w)
    steps = 1e-5 * torch.eye(4, dtype=torch.float64)
    for _ in range(5):
        jacobian = (meta_slopes(inner, w + steps) - meta_slopes(inner, w - steps)) / 2e-5
        w = w - torch.linalg.solve(jacobian.T, meta_slopes(inner, w)[0])
    return w[0]


def largest_outer_rate(inner, centre, around):
    """The largest outer rate that comes back to a minimum, trained side by side, 0.25 % apart."""
    rates = around * np.arange(0.9, 1.1, 0.0025)
    ws = centre + 1e-7 * torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ws = ws.expand(len(rates), 4)
    for step in range(600):
        if step == 300:
            half = (ws - centre).norm(dim=1)
        ws = ws - torch.from_numpy(rates)[:, None] * meta_slopes(inner, ws)
    end = (ws - centre).norm(dim=1)
    comes_back = ((end < half) | (end < 1e-11)).numpy()  # the rest is rounding
    assert comes_back[0] and not comes_back[-1]
    return rates[comes_back.argmin()]


CASES = {
    "rates of each step": (descent([0.2, 0.1, 0.02]), {"rate": torch.tensor([0.2, 0.1, 0.02], dtype=torch.float64)}),
    "momentum": (momentum(0.1, 3), {"rate": 0.1, "inner_update": inner_updates.Momentum(0.9)}),
    "adam": (adam(0.05, 3), {"rate": 0.05, "inner_update": inner_updates.Adam()}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_meta_rates_limit_is_that_of_bisected_training(name):
    inner, arguments = CASES[name]
    centre = minimum(inner)
    assert float(meta_slopes(inner, centre[None]).abs().max()) < 1e-9
    report = measure(problem(steps=3, at=centre, **arguments), beta=0.1, curvature=SHARP)
    assert report.exact_beta_c == pytest.approx(largest_outer_rate(inner, centre, report.exact_beta_c), rel=0.01)


@pytest.mark.parametrize("ratios", [(1.0, 0.5, 0.1), (1.0, 0.9, 0.1), (0.3, 1.0, 0.6, 0.6, 0.0), (1.0, 1.0, 1.0)])
def test_the_inner_limit_of_rates_of_each_step_is_that_of_the_loop(ratios):
    """Round and round the steps, from the sharpest direction on."""

    def contracts(alpha):
        w = ROTATION[3].clone()
        for _ in range(200):
            w = descent([alpha * r for r in ratios])(w, 0.0, 1.0)
        return float(w.norm()) < 1

    limit = bisect(contracts, 0.25, 2.0)
    rates = 0.1 * torch.tensor(ratios, dtype=torch.float64)
    report = measure(problem(rates, len(ratios), tasks=1, apart=False), beta=0.1)
    assert report.alpha == pytest.approx(0.1) and report.alpha_c == pytest.approx(limit, rel=0.01)
    assert report.alpha_status == "safe" and 4 * limit == pytest.approx(inner_limit("exact", ratios), rel=1e-3)


@pytest.mark.parametrize("order, limit", [("first", 0.25), ("simplified", 1 / (4 * 1.6))])
def test_the_other_orders_have_their_own_limit(order, limit):
    rates = torch.tensor([0.1, 0.05, 0.01], dtype=torch.float64)
    report = measure(problem(rates, 3, tasks=1, apart=False, order=order), beta=0.1)
    assert report.alpha_c == pytest.approx(limit, rel=0.01) and report.alpha_status == "safe"


def test_beyond_the_limit_is_unsafe_and_said_of_the_steps():
    rates = 0.9 * torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
    report = measure(problem(rates, 3, tasks=1, apart=False), beta=0.1)
    assert report.alpha_status == "unsafe"
    assert "the inner loop itself diverges: the error grows along the sharpest direction" in report.reasons[0]
    assert report.safe_alpha == pytest.approx(inner_limit("exact", (1.0, 0.5, 0.1)) / 4, rel=0.01)


def test_rates_by_parameter_that_share_a_profile_have_a_limit_and_others_a_lower_bound():
    profile = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
    entries = torch.tensor([0.1, 0.2, 0.1, 0.05], dtype=torch.float64)
    shared = {"w": profile[:, None] * entries}
    report = measure(problem(shared, 3, tasks=1, apart=False), beta=0.1)
    hessian = ROTATION.T @ torch.diag(SPECTRUM) @ ROTATION
    top = float(torch.linalg.eigvals(torch.diag(entries) @ hessian).real.max())
    assert report.alpha_c == pytest.approx(0.2 * inner_limit("exact", profile.tolist()) / top, rel=0.01)
    own = {"w": torch.stack([entries, entries.flip(0)])}
    below = measure(problem(own, 2, tasks=1, apart=False), beta=0.1)
    assert below.alpha_status == "safe" and below.alpha_c_interval[1] == math.inf
    steps = [torch.eye(4) - below.alpha_c / 0.2 * torch.diag(each) @ hessian for each in own["w"]]
    assert float(torch.linalg.eigvals(steps[1] @ steps[0]).abs().max()) <= 1
    above = measure(problem({"w": 10 * own["w"]}, 2, tasks=1, apart=False), beta=0.1)
    assert above.alpha_status == "unresolved" and "only a lower bound" in above.reasons[0]


@pytest.mark.parametrize("nesterov, limit", [(False, 3.8), (True, 3.8 / 2.8)])
def test_momentums_inner_limit_is_that_of_long_inner_training(nesterov, limit):
    def contracts(alpha):
        w, buffer = ROTATION[3].clone(), 0.0
        for _ in range(2000):
            g = slope(w, 0.0, 1.0)
            buffer = 0.9 * buffer + g
            w = w - alpha * (g + 0.9 * buffer if nesterov else buffer)
            if not float(w.norm()) < 1e6:
                return False
        return float(w.norm()) < 1

    found = bisect(contracts, 0.01 * limit, limit, relative=1e-3)
    update = inner_updates.Momentum(0.9, nesterov=nesterov)
    report = measure(problem(0.1, 5, tasks=1, apart=False, inner_update=update), beta=0.1)
    assert report.alpha_c == pytest.approx(found, rel=0.01) == pytest.approx(limit / 4, rel=0.01)
    assert report.alpha_status == "safe" and math.isnan(report.sgd_beta_c)


def test_first_order_maml_with_momentum_turns_where_the_inner_loop_overshoots():
    update = inner_updates.Momentum(0.9)
    limit = inner_loop_limit(problem(0.1, 2, order="first", inner_update=update)).limit
    # Two steps leave 1 - 2z - 0.9z + z^2 of an error.
    assert limit == pytest.approx(2.9 / 2 - math.sqrt(2.9**2 / 4 - 1), rel=1e-6)


@pytest.mark.parametrize("update", [inner_updates.Adam(), inner_updates.RMSprop(), lambda p, g, s: (p, s)])
def test_where_no_inner_limit_is_known_that_is_said(update):
    report = measure(problem(0.05, 3, inner_update=update), beta=1e-4)
    assert report.status == report.alpha_status == "unresolved" and math.isnan(report.alpha_c)
    assert report.reasons[0].startswith("alpha is not judged: ") and "exact_beta_c is measured" in report.reasons[0]
    assert report.notices == report.reasons and report.beta_status == "safe"


def test_the_simplified_criterion_refuses_an_inner_optimizer():
    with pytest.raises(ValueError, match="about an inner loop of gradient descent"):
        measure(problem(0.1, 3, inner_update=inner_updates.Adam()), curvature=CurvatureOptions(criterion="simplified"))


def test_dead_units_give_adams_curvature_no_nan():
    """Their gradient and second moment are 0, where torch's root has an infinite derivative."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    nn.init.constant_(net[2].bias, -0.5)
    x = torch.randn(3, 10, 1, dtype=torch.float64)
    for order in ("exact", "first"):
        module = MetaLearningModule(net, inner_lr=0.01, inner_steps=5, order=order, inner_update=inner_updates.Adam())
        report = measure(module.meta_problem(((x, x.sin()), (x, x.cos()))), beta=1e-4)
        assert report.exact_beta_c > 0 and math.isfinite(report.exact_beta_c)
    hidden = torch.relu(functional_call(net[:3], dict(net[:3].named_parameters()), (x,)))
    assert bool((hidden == 0).all(1).all(0).any())


def test_a_guard_caps_rates_of_each_step_by_one_factor():
    linear = nn.Linear(4, 1, bias=False).double()
    x = (torch.diag((2 * SPECTRUM).sqrt()) @ ROTATION)[None]
    batch = ((x, torch.zeros(1, 4, 1, dtype=torch.float64)),) * 2
    module = MetaLearningModule(
        linear, inner_lr=[0.9, 0.45, 0.09], inner_steps=3, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)
    )
    guard = ConvergenceGuard(**grouped(every_n_steps=1, action="rescale", steps=0))
    with pytest.warns(UserWarning, match=r"inner loop\s+itself diverges"):
        fit(module, batch, 2, [guard])
    limit = inner_limit("exact", (1.0, 0.5, 0.1)) / 4
    assert guard.history[0].alpha_applied == pytest.approx(limit, rel=0.02)
    rates = module.rates()
    torch.testing.assert_close(rates / rates[0], torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))
    assert float(rates[0]) == pytest.approx(limit, rel=0.02)
