"""What a report advises: half of the limits, on quadratics whose limits are known."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_maml_guard import CurvatureOptions, MetaProblem, measure
from lightning_maml_guard.messages.advice import Cause
from lightning_maml_guard.stability.problems import PlainProblem
from lightning_maml_guard.stability.verdict import VerdictContext, from_limits, judge
from lightning_maml_guard.theory.limits import Limit
from tests.helpers import linear_module, quadratic_batch

SHARPEST, FLATTEST = 5.0, 1.0


def measured(alpha, beta, criterion="exact", **options):
    module = linear_module(2, beta, inner_lr=alpha)
    problem = module.meta_problem(quadratic_batch([SHARPEST, FLATTEST]))
    return measure(problem, beta=beta, curvature=CurvatureOptions(criterion=criterion), **options)


# By hand: exact MAML with one inner step has alpha_c = 2/5; its update's curvature is l(1 - alpha*l)^2, which is 1.25 and
# .81 at alpha = .1, and 5 and .36 at alpha_c. The simplified criterion: alpha_c = 1/5, and l - alpha*l^2.
@pytest.mark.parametrize(
    ("criterion", "alpha", "beta", "cause", "to_set"),
    [
        ("exact", 0.1, 0.1, None, None),
        ("exact", 0.1, 3.0, "beta", (None, 0.8)),  # 2/1.25/2
        ("exact", 0.6, 0.05, "alpha", (0.2, None)),  # 2/5/2
        ("exact", 0.6, 9.0, "both", (0.2, 0.2)),  # 2/5/2 at alpha_c
        ("simplified", 0.1, 0.1, None, None),
        ("simplified", 0.1, 3.0, "beta", (None, 0.4)),  # 2/(5 - .1*25)/2
        ("simplified", 0.6, 0.05, "alpha", (0.1, None)),
        ("simplified", 0.6, 900.0, "both", (0.1, 0.2)),  # 2/5/2: beta_c is 2.5 at alpha_c, but .8 at half of it
        ("simplified", 0.6, 1.5, "both", (0.1, 0.2)),
    ],
)
def test_the_rate_beyond_its_limit_is_to_be_set_to_half_of_it(criterion, alpha, beta, cause, to_set):
    report = measured(alpha, beta, criterion, step=7)
    if cause is None:
        assert report.advice is None and report.status == "safe"
        return
    advice = report.advice
    assert report.status == "unsafe" and advice.cause == cause and (advice.alpha, advice.beta) == to_set
    assert (advice.step, advice.configured_alpha, advice.configured_beta) == (7, alpha, beta)
    assert advice.evidence == report.findings and advice.gradient_clip_val is advice.peak_step is None
    assert measured(advice.alpha or alpha, advice.beta or beta, criterion).status == "safe"


def test_half_of_what_the_margin_allows_is_advised():
    assert measured(0.1, 3.0, margin=0.5).advice.beta == 0.4
    assert measured(0.6, 0.05, margin=0.5).advice.alpha == 0.1


def test_a_rate_within_its_interval_is_not_advised_on():
    report = measured(0.2, 0.1, "simplified")
    assert report.alpha_status == "unresolved" and report.advice is None


def test_plain_training_is_advised_on_its_only_rate():
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    problem = PlainProblem({"w": weight}, lambda p: 5.0 * (p["w"] ** 2).sum())
    report = measure(problem, optimizer=SGD([weight], lr=0.7, momentum=0.5))
    # 2(1 + momentum)/10, the half of it
    assert (report.advice.cause, report.advice.alpha, report.advice.beta) == ("beta", None, 0.15)
    assert str(report.advice) == "beta = 0.7 is too large. Set the optimizer's lr to 0.15."
    assert measure(problem, optimizer=SGD([weight], lr=0.1, momentum=0.5)).advice is None


def limit(value, critical):
    return Limit(value, critical, (critical, critical))


@pytest.mark.parametrize("safe_beta_c", [math.nan, math.inf, 10.0])
def test_a_meta_rate_not_known_to_be_too_large_below_alpha_c_is_left_alone(safe_beta_c):
    """Beyond alpha_c no meta rate is stable, so that beta is always above its limit of 0."""
    alpha, beta = limit(0.3, 0.2), limit(0.5, 0.0)
    verdict = judge(alpha, beta, VerdictContext())
    assert verdict.beta_status == "unsafe"
    advice = from_limits(verdict, alpha=alpha, beta=0.5, safe_beta_c=safe_beta_c, margin=1.0, step=None)
    assert (advice.cause, advice.alpha, advice.beta) == (Cause.ALPHA, 0.1, None)


def test_numbers_have_two_digits():
    beta = limit(0.5, 0.123456)
    verdict = judge(None, beta, VerdictContext())
    advice = from_limits(verdict, alpha=limit(math.nan, math.nan), beta=0.5, safe_beta_c=0.123456, margin=1.0, step=3)
    assert advice.beta == 0.062 and str(advice).endswith("Set the optimizer's lr to 0.062.")


@pytest.mark.parametrize("criterion", ["exact", "simplified"])
def test_a_query_loss_that_overflows_keeps_the_inner_rates_limit(criterion):
    """The support's curvature is finite at unchanged parameters: alpha_c is there to be told."""
    weight = nn.Parameter(torch.full((2,), 3.0))
    curvature = torch.tensor([SHARPEST, FLATTEST])
    data = (torch.tensor([[-1.0, -1.0], [1.0, 1.0]]),)

    def loss(params, task):
        return 0.5 * (curvature * (params["w"] - task[0]) ** 2).sum()

    problem = MetaProblem({"w": weight}, loss, data, data, inner_lr=50.0, inner_steps=20)  # (1 - 50*5)^40 > 1e38
    report = measure(problem, beta=0.1, curvature=CurvatureOptions(criterion=criterion))
    alpha_c = {"exact": 2.0, "simplified": 1.0}[criterion] / SHARPEST
    assert report.alpha_c == pytest.approx(alpha_c, rel=1e-3) and report.alpha_status == "unsafe"
    assert report.advice.cause == "alpha" and report.advice.alpha == pytest.approx(alpha_c / 2, rel=0.051)
    assert report.lambda_max == pytest.approx(SHARPEST, rel=1e-3)
    # What could not be measured is said, where it was asked for.
    said = " ".join((*report.reasons, *report.notices))
    assert math.isnan(report.exact_beta_c)
    assert ("The query loss after adaptation is nan" in said) == (criterion == "exact")
