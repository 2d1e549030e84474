"""How a run came out, in one sentence and in a few lines."""

import math
from dataclasses import replace

import pytest

from lightning_maml_guard import LookaheadOptions
from lightning_maml_guard.guard.state import Event
from lightning_maml_guard.lookahead.loss_curve import LossCurve
from lightning_maml_guard.messages.advice import Advice, Cause
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.messages.spelling import IN_PYTHON
from lightning_maml_guard.pages.events import Rollback, parameters_of, rollbacks, why
from lightning_maml_guard.pages.outcome import outcome, summary
from lightning_maml_guard.pages.record import RunRecord
from tests.plots.test_plots import checks

nan = math.nan


def curve(*losses):
    found = LossCurve()
    for step, loss in enumerate(losses):
        found.end = step + 1
        found.add(loss)
    return found


def record(*losses, **changes):
    settings = {"margin": 1.0, "lookahead": LookaheadOptions()}
    values = {"history": [], "severities": [], "events": [], "losses": curve(*losses), "start": losses[0]}
    return RunRecord(settings=settings, spelling=IN_PYTHON, **{**values, **changes})


def rolled_back(at, to, kind=Kind.ROLLED_BACK):
    return Event(at, "rolled back", (Reason(kind, step=at, steps=to, losses=(9.0, 7.0, 1.0)),))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (record(3.5, 1.0, 0.5), "Trained 3 steps; the loss went from 3.5 to 0.75"),
        (record(3.5), "Trained 1 step; the loss is 3.5"),
        (record(1.0, 9.0, 9.0), "Diverged within 3 steps; the loss went from 1 to 9"),
        (record(1.0, 2.0, nan), "Diverged within 3 steps; the loss is not finite"),
        (record(-2.0, -4.0, -4.0), "Trained 3 steps; the loss went from -2 to -4"),
        (record(1.0, stopped_step=1), "Stopped by the guard at step 1; the loss is 1"),
        (
            record(1.0, 0.5, 0.5, events=[rolled_back(148, 140)]),
            "Diverged at step 148; rolled back to 140; the loss went from 1 to 0.5",
        ),
        (
            record(1.0, 1.0, events=[rolled_back(8, 4), rolled_back(9, 4)], stopped_step=9),
            "Diverged at step 9; rolled back to 4 (rollback 2); stopped by the guard at step 9; the loss went from 1 to 1",
        ),
    ],
)
def test_an_outcome_is_one_sentence(found, said):
    assert outcome(found) == said


def test_a_run_without_losses_is_summed_up_too():
    assert summary(replace(record(1.0), losses=LossCurve(end=7))) == (
        "ConvergenceGuard: Trained 7 steps.\nNo check was made."
    )


def test_a_summary_has_states_cost_rates_and_advice():
    advice = Advice(cause=Cause.BETA, beta=0.025, configured_alpha=0.1, configured_beta=0.4)
    found = record(1.0, 0.5, history=checks(), advice=advice, check_seconds=0.25, seconds=10.0)
    outcome_line, checked, rates, to_do = summary(found).splitlines()
    assert outcome_line == "ConvergenceGuard: Trained 100 steps; the loss went from 1 to 0.75."
    assert checked == "2 checks: 2 safe; 0.25 s of 10 s (2.5 %)."
    assert rates.startswith("At the last check, step 100: alpha = 0.05 is 0.2x alpha_c = 0.25, applied as 0.02, beta")
    assert rates.endswith("applied as 0.05.") and to_do == f"Advice: {advice}"


def test_a_long_run_is_summed_up_without_exponents():
    report = replace(checks()[0], beta=72.0, beta_c=0.1)
    _, checked, rates = summary(record(1.0, history=[report], check_seconds=131.4, seconds=5432.1)).splitlines()
    assert checked == "1 check: 1 safe; 131 s of 5432 s (2.4 %)." and "beta = 72 is 720x beta_c = 0.1" in rates


def test_a_rollback_tells_whose_parameters_were_measured():
    made = rollbacks([rolled_back(10, 5), Event(3, "notice", ()), rolled_back(20, 15, Kind.ROLLED_BACK_AT_END)])
    assert made == [Rollback(10, 5, 9.0), Rollback(20, 15, 7.0)]
    said = {step: parameters_of(step, made) for step in (5, 7, 10, 15, 18)}
    assert said == {
        5: "", 7: "rolled back at step 10", 10: "after the rollback to step 5", 15: "", 18: "rolled back at step 20",
    }  # fmt: skip


@pytest.mark.parametrize("applied", [0.4, 0.1])
def test_trials_of_rates_are_told_as_the_reason_once_whether_or_not_the_guard_acted(applied):
    tried = Reason(Kind.RATES_TRIED, steps=30, alpha=0.1, beta=0.1, losses=(0.7, 0.4, nan))
    advice = Advice(cause=Cause.BETA, beta=0.1, configured_alpha=0.1, configured_beta=0.4, evidence=(tried,))
    report = replace(checks()[0], alpha=0.1, alpha_applied=0.1, beta=0.4, beta_applied=applied, advice=advice)
    trials = "30 steps tried on copies end at a loss of 0.7; with alpha = 0.1, beta = 0.1 they end at 0.4."
    first, *_, last = why(replace(report, findings=()), IN_PYTHON)
    assert first == trials and last.startswith("To do: beta = 0.4" if applied == 0.4 else "Applied instead: ")
    assert why(replace(report, findings=(tried,)), IN_PYTHON).count(trials) == 1
