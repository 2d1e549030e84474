"""CheckReport: a measurement with what the guard found and applied."""

import math
from dataclasses import fields, replace

import pytest
from torch.optim import Adam

from lightning_maml_guard import CheckReport, CurvatureOptions, StabilityReport, measure
from lightning_maml_guard.guard.report import LatestLimits, latest_limit
from tests.helpers import linear_module, quadratic_batch

SIMPLIFIED = CurvatureOptions(criterion="simplified")


@pytest.fixture
def problem():
    return linear_module(4, 0.1, inner_lr=0.05).meta_problem(quadratic_batch([0.5, 1.0, 2.0, 4.0]))


def checked(measured, **applied):
    rates = {"alpha_applied": measured.alpha, "beta_applied": measured.beta}
    return CheckReport.of(measured, findings=measured.findings, **(rates | applied))


def test_a_report_says_which_rates_were_applied_where_they_were_capped(problem):
    found = measure(problem, beta=2.0, curvature=SIMPLIFIED)
    assert "applied" not in str(found) and "applied" not in str(checked(found))
    assert "applied" not in str(checked(found, alpha_applied=float("nan")))
    lines = str(checked(found, alpha_applied=0.02, beta_applied=0.1)).splitlines()
    assert lines[1].endswith("); applied 0.02") and lines[2].endswith("); applied 0.1")
    blind = measure(problem, optimizer=Adam([*problem.params.values()]), curvature=SIMPLIFIED)
    assert "  beta = 0.001, beta_c not known; applied 0.0001\n" in str(checked(blind, beta_applied=1e-4))


def test_it_keeps_what_was_measured(problem):
    found = measure(problem, beta=2.0, step=7, curvature=SIMPLIFIED)
    report = checked(found, status="edge")
    assert str(report).startswith("CheckReport at step 7: edge (criterion='simplified')")
    kept = [field.name for field in fields(StabilityReport) if field.name != "status"]
    assert [repr(getattr(report, name)) for name in kept] == [repr(getattr(found, name)) for name in kept]


def test_the_limit_at_hand_is_that_of_the_latest_check_that_found_one(problem):
    found = checked(measure(problem, beta=2.0, curvature=SIMPLIFIED))
    unknown, lower = replace(found, beta_c=math.nan), replace(found, beta_c=0.25)
    assert latest_limit([found, lower, unknown], "beta_c") == 0.25 < found.beta_c
    assert latest_limit([lower, found], "beta_c") == found.beta_c
    assert math.isnan(latest_limit([unknown], "beta_c")) and math.isnan(latest_limit([], "alpha_c"))
    limits = LatestLimits()
    history = [found, lower]
    assert limits.of(history)["beta_c"] == lower.beta_c and limits.of(history) is limits.of(history)
    asked = limits.of([*history, unknown])
    assert asked["beta_c"] == lower.beta_c and limits.of([found])["beta_c"] == found.beta_c
