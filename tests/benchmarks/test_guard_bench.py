"""GuardBench's definition of divergence, its figures, and its vmapped runs against the Trainer's."""

import logging
import math

import pytest

from benchmarks.common.options import guard_arguments
from benchmarks.guard_bench.columns import Column
from benchmarks.guard_bench.guarded import WARN, Guarded, run_column
from benchmarks.guard_bench.remedies import REMEDIES, UNGUARDED, Trace, train_column
from benchmarks.guard_bench.score import Run, detection, false_alarms, harm, rescue
from lightning_maml_guard import CurvatureOptions, LookaheadOptions

NO_LOOKAHEAD = LookaheadOptions(steps=0, triggers=False)
COLUMN = Column("linear", "first", 1, "sgd", True, 0, 0)


@pytest.fixture(autouse=True)
def _loggers_as_they_were():
    """The benchmark silences Lightning in its process; the tests after these read what it says."""
    names = ("pytorch_lightning", "lightning.pytorch", "lightning_maml_guard", "pytorch_lightning.utilities.rank_zero")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(
    ("losses", "final", "departure", "outcome"),
    [
        ([1.0] * 10, 1.1, None, "healthy"),
        ([1.0] * 10, 1.3, None, "neither"),
        ([1, 1, 6, 1, 1, 1, 1, 1, 1, 1], 0.5, None, "healthy"),  # one bad batch
        ([1, 1, 6, 7, 8, 9, 10, 11, 12, 13], 20.0, 2, "diverged"),
        ([1, 1, 6, math.nan, math.nan, math.nan, math.nan], math.nan, 2, "diverged"),
        ([1, 6, 6, 6, 1, 1, 1, 1, 1], 0.5, 1, "healthy"),  # exceeded and returned
        ([1, 6, 6, 6, 1, 1, 1, 1, 1], 1.0, 1, "diverged"),  # a network with dead units is no better than its start
    ],
)
def test_outcomes(losses, final, departure, outcome):
    trace = Trace(tuple(losses), (), 1.0, final)
    assert (trace.departure, trace.outcome) == (departure, outcome)


def _run(beta, losses, final, severities, rescued):
    trace = Trace(tuple(losses), tuple(losses), 1.0, final)
    guarded = Guarded(trace, severities, [(0, beta, 0.1)], [0] if severities[0][1] > 1 else [], 1.0, 0, None, 1.0)
    saved = Guarded(Trace((), (), 1.0, rescued), [], [], [], 1.0, 0, None, 1.0)
    return Run(COLUMN, beta, {UNGUARDED: trace}, {WARN: guarded, "guard warn, defaults": guarded, "saved": saved})


def test_figures_by_hand():
    diverged = [1.0] * 6 + [10.0] * 94
    runs = [
        _run(1.0, [1.0] * 100, 0.5, [(0, 0.1), (99, 0.2), (100, 9.0)], 0.6),  # after the reported steps: not counted
        _run(2.0, [1.0] * 100, 0.4, [(0, 2.0)], 0.4),
        _run(3.0, diverged, math.inf, [(0, 0.15), (4, 3.0)], 0.8),
        _run(4.0, diverged, math.inf, [(0, 0.15), (5, math.inf)], math.inf),
    ]
    found = detection(runs)["guard, every 5 steps"]
    # At lead 1 the diverging runs score 3 and infinity against .2 and 2; at lead 5 only step 0 counts.
    assert found[1] == (1.0, 1.0, 2) and found[5] == (0.0, 0.0, 2) and 10 not in found
    assert false_alarms(runs, WARN)[:2] == (1, 200)
    assert rescue(runs, "saved") | {"not finite": 0, "not healthy": 0} == {
        "diverging": 2,
        "finite": 0.5,
        "healthy": 0.5,
        "median ratio": pytest.approx((0.8 / 0.4 + 1e9) / 2),
        "compared": 2,
        "not finite": 0,
        "not healthy": 0,
    }
    hurt = harm(runs, "saved")
    assert hurt["median"] == pytest.approx(1.1) and hurt["made to diverge"] == []


def test_options_with_a_dot_go_into_the_groups():
    assert guard_arguments({"margin": 0.5, "curvature.criterion": "simplified", "lookahead.batches": 4}) == {
        "margin": 0.5,
        "curvature": CurvatureOptions(criterion="simplified"),
        "lookahead": LookaheadOptions(batches=4),
    }


def test_the_vmapped_engine_trains_what_the_trainer_trains():
    vmapped = train_column(COLUMN)
    trained = run_column(COLUMN, (WARN,), every_n_steps=1000, lookahead=NO_LOOKAHEAD)[WARN]
    assert set(vmapped) == set(REMEDIES)
    compared = 0
    for fast, real in zip(vmapped[UNGUARDED], trained, strict=True):
        assert fast.start == pytest.approx(real.trace.start, rel=1e-5)
        assert fast.losses[:10] == pytest.approx(real.trace.losses[:10], rel=1e-3)
        if real.trace.outcome == "healthy":
            assert fast.final == pytest.approx(real.trace.final, rel=1e-3)
            compared += 1
    assert compared >= 2
