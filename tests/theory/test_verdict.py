import math

import pytest

from lightning_maml_guard.theory.verdict import Limit, judge


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
        "grows along the sharpest direction by 4.5 a step. Lower the optimizer's lr below 0.11, or use action='rescale'."
    )


def test_an_alpha_message_says_what_happened_why_and_what_to_do():
    (reason,) = judge(limit(0.3, 0.25), None).reasons
    assert reason.startswith("alpha = 0.3 exceeds alpha_c = 0.25 (interval 0.25 to 0.25): simplified MAML's objective")
    assert reason.endswith("Lower the inner rate (inner_lr) below 0.25, or use action='rescale'.")


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
