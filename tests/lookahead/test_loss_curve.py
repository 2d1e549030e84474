"""The losses of a run in a few hundred points."""

import math

import numpy as np
import pytest

from lightning_maml_guard.lookahead.loss_curve import LossCurve


def of(losses):
    curve = LossCurve()
    for step, loss in enumerate(losses):
        curve.end = step + 1
        curve.add(loss)
    return curve


@pytest.mark.parametrize("steps", [1, 399, 400, 1000, 12345])
def test_however_long_a_run_its_points_are_few_and_hold_every_loss(steps):
    losses = np.random.default_rng(0).normal(size=steps)
    curve = of(losses)
    assert len(curve.points) < 400 and curve.stride == 2 ** max(0, math.ceil(math.log2((steps + 1) / 400)))
    starts = [point.step for point in curve.points]
    assert starts == list(range(0, steps, curve.stride))
    for point in curve.points:
        held = losses[point.step : point.step + curve.stride]
        assert (point.low, point.high, point.finite) == (held.min(), held.max(), len(held))
        assert point.mean == pytest.approx(held.mean(), abs=1e-12)


def test_a_loss_that_is_not_finite_is_seen_and_leaves_the_mean_alone():
    curve = of([1.0] * 400 + [math.nan, 3.0])
    last = curve.points[-1]
    assert (last.mean, last.low, last.high, last.finite) == (3.0, 3.0, math.inf, 1)
    assert math.isinf(curve.final) and of([2.0, 4.0]).final == 3.0 and math.isnan(LossCurve().final)
    assert of([math.inf, 4.0]).final == 4.0


def test_what_adaptation_does_is_kept_for_the_latest_checks():
    curve = LossCurve()
    for step in range(1000):
        curve.note_adaptation(step, 2.0, 1.0)
    assert len(curve.adapted) == 400 and curve.adapted[-1] == (999, 2.0, 1.0)
