import math

import pytest

from lightning_maml_guard.theory.limits import Limit, check_margin


def limit(value, critical):
    return Limit(value, critical, (critical, critical))


def test_ratios():
    assert limit(0.3, 0.6).ratio == 0.5
    assert limit(0.3, 0.0).ratio == math.inf
    assert limit(0.0, 0.0).ratio == 0.0
    assert limit(0.3, math.inf).ratio == 0.0


@pytest.mark.parametrize("margin", [0, -1.0, 1.01, math.nan, math.inf, "wide", True])
def test_a_bad_margin_is_refused(margin):
    with pytest.raises(ValueError, match="`margin` to be a number above 0 and at most 1 but got"):
        check_margin(margin)
