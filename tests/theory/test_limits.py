import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_maml_guard.theory.limits import Limit, Watch, advance, judge, severity


def limit(value, critical, spread=0.0):
    return Limit(value, critical, (critical * (1 - spread), critical * (1 + spread)))


def test_safe_says_nothing():
    verdict = judge(limit(0.1, 0.2), limit(0.1, 0.2))
    assert (verdict.status, verdict.reasons) == ("safe", ())


def test_the_boundary_belongs_to_alpha_and_not_to_beta():
    assert judge(limit(0.2, 0.2), None).status == "safe"
    assert judge(None, limit(0.2, 0.2)).status == "unsafe"


def test_only_a_cleared_interval_resolves():
    assert judge(None, limit(1.04, 1.0, 0.05)).status == "unresolved"
    assert judge(None, limit(0.96, 1.0, 0.05)).status == "unresolved"
    assert judge(None, limit(1.06, 1.0, 0.05)).status == "unsafe"
    assert judge(None, limit(0.94, 1.0, 0.05)).status == "safe"


def test_the_margin_moves_the_threshold():
    assert judge(None, limit(0.9, 1.0), margin=0.8).status == "unsafe"
    assert judge(limit(1.1, 1.0), None, margin=1.2).status == "safe"


def test_unsafe_outranks_unresolved_which_outranks_safe():
    unknown = Limit(0.1, math.nan, (math.nan, math.nan))
    assert judge(limit(2.0, 1.0), unknown).status == "unsafe"
    assert judge(limit(0.5, 1.0), unknown).status == "unresolved"


def test_no_finite_limit_is_safe():
    assert judge(limit(5.0, math.inf), limit(5.0, math.inf)).status == "safe"


def test_a_beta_message_says_what_happened_why_and_what_to_do():
    (reason,) = judge(
        None, Limit(0.3, 0.11, (0.10, 0.12)), growth=4.5, cost="8 Hessian-vector products, step 400"
    ).reasons
    assert reason == (
        "beta = 0.3 exceeds beta_c = 0.11 (interval 0.1 to 0.12, 8 Hessian-vector products, step 400): the meta update "
        "grows along the sharpest direction by 4.5 a step. Lower the optimizer's lr below 0.11."
    )


def test_an_alpha_message_says_what_happened_why_and_what_to_do():
    (reason,) = judge(limit(0.3, 0.25), None).reasons
    assert reason.startswith("alpha = 0.3 exceeds alpha_c = 0.25 (interval 0.25 to 0.25): simplified MAML's objective")
    assert reason.endswith("Lower the inner rate (inner_lr) below 0.25.")


def test_the_meta_rate_waits_where_its_limit_is_that_of_an_unsafe_inner_rate():
    reasons = judge(limit(0.3, 0.25), limit(0.2, 0.01)).reasons
    assert "Lower the inner rate (inner_lr) below 0.25" in reasons[0]
    assert reasons[1].endswith(
        "Lower the optimizer's lr only if it exceeds beta_c at the lowered inner rate too: beta_c moves with alpha."
    )
    (reason,) = judge(limit(0.2, 0.25), limit(0.2, 0.01)).reasons
    assert "Lower the optimizer's lr below 0.01" in reason


def test_an_alpha_message_carries_its_note():
    (reason,) = judge(limit(0.3, 0.25), None, alpha_note="(Note.)").reasons
    assert "brings it to a minimum. (Note.) Lower the inner rate" in reason


def test_other_messages():
    assert "no positive meta rate is stable while alpha exceeds alpha_c" in judge(None, limit(0.1, 0.0)).reasons[0]
    assert "nearer to its limit than the margin allows" in judge(None, limit(0.9, 1.0), margin=0.5).reasons[0]
    assert "exceeds 0.5 * beta_c = 0.5" in judge(None, limit(0.9, 1.0), margin=0.5).reasons[0]
    assert "grows along the sharpest direction. Lower" in judge(None, limit(2.0, 1.0)).reasons[0]
    unknown = Limit(0.1, math.nan, (math.nan, math.nan))
    assert judge(None, unknown, beta_note="Adam sleeps.").reasons == ("beta is not judged: Adam sleeps.",)
    assert judge(unknown, None).reasons == ("alpha is not judged: its critical value could not be measured.",)
    assert "too close to beta_c = 1" in judge(None, limit(1.0, 1.0, 0.1)).reasons[0]


def test_ratios():
    assert limit(0.3, 0.6).ratio == 0.5
    assert limit(0.3, 0.0).ratio == math.inf
    assert limit(0.0, 0.0).ratio == 0.0
    assert limit(0.3, math.inf).ratio == 0.0


@pytest.mark.parametrize("margin", [0, -1.0, math.nan, math.inf, "wide", True])
def test_a_bad_margin_is_refused(margin):
    with pytest.raises(ValueError, match="`margin` to be a finite number above 0 but got"):
        judge(None, None, margin=margin)


def states(checks, **options):
    watch, found = Watch(), []
    for status, severe in checks:
        watch = advance(watch, status, severe, **options)
        found.append(watch.state)
    return found


NOT_TRIED = math.nan


def test_severity_is_the_log_of_the_loss_over_its_start():
    assert severity(6.0, 2.0) == pytest.approx(math.log(3))
    assert severity(math.inf, 2.0) == severity(math.nan, 2.0) == severity(math.nan, math.nan) == math.inf
    assert severity(0.0, 2.0) == -math.inf
    assert math.isnan(severity(1.0, 0.0)) and math.isnan(severity(1.0, math.nan))


def test_a_ratio_beyond_one_whose_trial_survives_is_the_edge_and_not_unsafe():
    assert states([("unsafe", 0.0), ("safe", 0.0), ("unresolved", 0.0)]) == ["edge", "safe", "unresolved"]


def test_a_trial_that_fails_is_unsafe_whatever_the_ratios_say():
    for status in ("safe", "unsafe", "unresolved"):
        assert states([(status, math.inf)]) == ["unsafe"]


def test_the_way_back_needs_half_the_alarm():
    level = math.log(3.0)
    checks = [("safe", level), ("safe", 0.9 * level), ("safe", 0.51 * level), ("safe", 0.5 * level)]
    assert states(checks) == ["unsafe", "unsafe", "unsafe", "safe"]
    assert states([("safe", 0.9 * level)]) == ["safe"]


def test_patience_counts_failures_that_no_pass_interrupts():
    checks = [("safe", 9.0), ("safe", 9.0), ("safe", 0.0), ("safe", 9.0), ("safe", 0.8), ("safe", 9.0), ("safe", 9.0)]
    expected = ["safe", "safe", "safe", "safe", "safe", "safe", "unsafe"]
    assert states(checks, patience=3) == expected


def test_without_a_trial_the_status_decides_and_unresolved_keeps_the_state():
    checks = [("unsafe", NOT_TRIED), ("unresolved", NOT_TRIED), ("safe", NOT_TRIED), ("unsafe", NOT_TRIED)]
    assert states(checks) == ["unsafe", "unsafe", "safe", "unsafe"]
    assert states([checks[0], checks[0]], patience=2) == ["safe", "unsafe"]


@given(
    st.lists(st.tuples(st.sampled_from(["safe", "unsafe", "unresolved"]), st.floats(-5, 5)), max_size=12),
    st.floats(1.1, 20),
    st.integers(1, 4),
)
def test_a_run_that_never_fails_is_never_unsafe_and_one_that_fails_on_is(checks, alarm, patience):
    calm = [(status, min(severe, 0.99 * math.log(alarm))) for status, severe in checks]
    assert "unsafe" not in states(calm, alarm=alarm, patience=patience)
    assert states([*checks, *[("safe", 9.0)] * patience], alarm=alarm, patience=patience)[-1] == "unsafe"
