import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_maml_guard.guard.state_machine import Watch, advance
from lightning_maml_guard.lookahead.divergence import severity


def states(checks, **options):
    watch, found = Watch(), []
    for status, severe in checks:
        watch = advance(watch, status, severe, **options)
        found.append(watch.state)
    return found


NO_LOOKAHEAD = math.nan


def test_severity_is_the_log_of_the_loss_over_its_start():
    assert severity(6.0, 2.0) == pytest.approx(math.log(3))
    assert severity(math.inf, 2.0) == severity(math.nan, 2.0) == severity(math.nan, math.nan) == math.inf
    assert severity(0.0, 2.0) == -math.inf
    assert math.isnan(severity(1.0, 0.0)) and math.isnan(severity(1.0, math.nan))


def test_a_ratio_beyond_one_whose_lookahead_survives_is_the_edge_and_not_unsafe():
    assert states([("unsafe", 0.0), ("safe", 0.0), ("unresolved", 0.0)]) == ["edge", "safe", "unresolved"]


def test_a_lookahead_that_fails_is_unsafe_whatever_the_ratios_say():
    for status in ("safe", "unsafe", "unresolved"):
        assert states([(status, math.inf)]) == ["unsafe"]


def test_the_way_back_needs_half_the_divergence_ratio():
    level = math.log(3.0)
    checks = [("safe", level), ("safe", 0.9 * level), ("safe", 0.51 * level), ("safe", 0.5 * level)]
    assert states(checks) == ["unsafe", "unsafe", "unsafe", "safe"]
    assert states([("safe", 0.9 * level)]) == ["safe"]


def test_patience_counts_failures_that_no_pass_interrupts():
    checks = [("safe", 9.0), ("safe", 9.0), ("safe", 0.0), ("safe", 9.0), ("safe", 0.8), ("safe", 9.0), ("safe", 9.0)]
    expected = ["safe", "safe", "safe", "safe", "safe", "safe", "unsafe"]
    assert states(checks, patience=3) == expected


def test_without_a_lookahead_the_status_decides_and_unresolved_keeps_the_state():
    checks = [("unsafe", NO_LOOKAHEAD), ("unresolved", NO_LOOKAHEAD), ("safe", NO_LOOKAHEAD), ("unsafe", NO_LOOKAHEAD)]
    assert states(checks) == ["unsafe", "unsafe", "safe", "unsafe"]
    assert states([checks[0], checks[0]], patience=2) == ["safe", "unsafe"]


@given(
    st.lists(st.tuples(st.sampled_from(["safe", "unsafe", "unresolved"]), st.floats(-5, 5)), max_size=12),
    st.floats(1.1, 20),
    st.integers(1, 4),
)
def test_a_run_that_never_fails_is_never_unsafe_and_one_that_fails_on_is(checks, ratio, patience):
    calm = [(status, min(severe, 0.99 * math.log(ratio))) for status, severe in checks]
    assert "unsafe" not in states(calm, ratio=ratio, patience=patience)
    assert states([*checks, *[("safe", 9.0)] * patience], ratio=ratio, patience=patience)[-1] == "unsafe"
