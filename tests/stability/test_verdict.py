"""What is said of the rates beside their limits: statuses, findings as data, and their words."""

import math

from hypothesis import given
from hypothesis import strategies as st

from lightning_maml_guard.messages.reasons import Kind, Remedy
from lightning_maml_guard.messages.sentences import sentences
from lightning_maml_guard.stability.verdict import VerdictContext, judge
from lightning_maml_guard.theory.limits import Limit


def judged(alpha, beta, **basis):
    return judge(alpha, beta, VerdictContext(**basis))


def words(alpha, beta, **basis):
    return sentences(judged(alpha, beta, **basis).findings)


def limit(value, critical, spread=0.0):
    return Limit(value, critical, (critical * (1 - spread), critical * (1 + spread)))


def test_safe_says_nothing():
    verdict = judged(limit(0.1, 0.2), limit(0.1, 0.2))
    assert (verdict.status, verdict.findings) == ("safe", ())


def test_the_boundary_belongs_to_alpha_and_not_to_beta():
    assert judged(limit(0.2, 0.2), None).status == "safe"
    assert judged(None, limit(0.2, 0.2)).status == "unsafe"


def test_only_a_cleared_interval_resolves():
    assert judged(None, limit(1.04, 1.0, 0.05)).status == "unresolved"
    assert judged(None, limit(0.96, 1.0, 0.05)).status == "unresolved"
    assert judged(None, limit(1.06, 1.0, 0.05)).status == "unsafe"
    assert judged(None, limit(0.94, 1.0, 0.05)).status == "safe"


def test_the_margin_moves_the_threshold():
    assert judged(None, limit(0.9, 1.0), margin=0.8).status == "unsafe"
    assert judged(limit(1.1, 1.0), None, margin=1.2).status == "safe"


def test_unsafe_outranks_unresolved_which_outranks_safe():
    unknown = Limit(0.1, math.nan, (math.nan, math.nan))
    assert judged(limit(2.0, 1.0), unknown).status == "unsafe"
    assert judged(limit(0.5, 1.0), unknown).status == "unresolved"


def test_no_finite_limit_is_safe():
    assert judged(limit(5.0, math.inf), limit(5.0, math.inf)).status == "safe"


def test_a_beta_message_says_what_happened_why_and_what_to_do():
    (reason,) = words(None, Limit(0.3, 0.11, (0.10, 0.12)), step=400, plain_sgd=True)
    assert reason == (
        "beta = 0.3 is 2.7x beta_c = 0.11 (0.1 to 0.12): along the sharpest direction each step multiplies the error by "
        "4.5. Lower the optimizer's lr below 0.11."
    )


def test_an_alpha_message_says_what_happened_why_and_what_to_do():
    (reason,) = words(limit(0.3, 0.25), None)
    assert reason.startswith("alpha = 0.3 is 1.2x alpha_c = 0.25 (0.25 to 0.25): simplified MAML's objective")
    assert reason.endswith("Lower the inner rate (inner_lr) below 0.25.")


def test_the_meta_rate_waits_where_its_limit_is_that_of_an_unsafe_inner_rate():
    reasons = words(limit(0.3, 0.25), limit(0.2, 0.01))
    assert "Lower the inner rate (inner_lr) below 0.25" in reasons[0]
    assert reasons[1].endswith(
        "Lower the optimizer's lr only if it exceeds beta_c at the lowered inner rate too: beta_c moves with alpha."
    )
    (reason,) = words(limit(0.2, 0.25), limit(0.2, 0.01))
    assert "Lower the optimizer's lr below 0.01" in reason


def test_an_alpha_message_says_what_the_simplified_criterion_means_for_the_order_trained():
    (reason,) = words(limit(0.3, 0.25), None, order="exact")
    assert "brings it to a minimum. (This is the simplified criterion; exact MAML" in reason
    assert reason.endswith("criterion='exact' judges that update.) Lower the inner rate (inner_lr) below 0.25.")
    (reason,) = words(limit(0.3, 0.25), None, order="first")
    assert "it holds for first-order MAML with one inner step.) Lower the inner rate" in reason
    for options in ({"order": "simplified"}, {"order": "exact", "exact": True}):
        (reason,) = words(limit(0.3, 0.25), None, **options)
        assert "simplified criterion" not in reason


def test_other_messages():
    assert "no positive outer rate is stable while alpha exceeds alpha_c" in words(None, limit(0.1, 0.0))[0]
    assert "nearer to its limit than the margin allows" in words(None, limit(0.9, 1.0), margin=0.5)[0]
    assert (
        "beta = 0.9 is 0.9x beta_c = 1 (1 to 1), above the margin of 0.5: "
        in words(None, limit(0.9, 1.0), margin=0.5)[0]
    )
    assert "grows along the sharpest direction. Lower" in words(None, limit(2.0, 1.0))[0]
    unknown = Limit(0.1, math.nan, (math.nan, math.nan))
    assert words(None, unknown, beta_note="Adam sleeps.") == ("beta is not judged: Adam sleeps.",)
    assert words(unknown, None) == ("alpha is not judged: its critical value could not be measured.",)
    assert "too close to beta_c = 1" in words(None, limit(1.0, 1.0, 0.1))[0]


def limits():
    """A rate beside its critical value, which may be unknown, zero or infinite, with an interval around it."""
    rate = st.floats(0, 1e6)
    known = st.builds(
        lambda value, critical, below, above: Limit(value, critical, (critical * below, critical * above)),
        rate,
        st.one_of(st.floats(0, 1e6), st.just(0.0)),
        st.floats(0, 1),
        st.floats(1, 5),
    )
    unlimited = rate.map(lambda value: Limit(value, math.inf, (math.inf, math.inf)))
    unknown = rate.map(lambda value: Limit(value, math.nan, (math.nan, math.nan)))
    return st.one_of(known, unlimited, unknown)


@given(
    st.none() | limits(),
    st.none() | limits(),
    st.builds(
        VerdictContext,
        margin=st.floats(0.05, 2),
        step=st.none() | st.integers(0, 999),
        order=st.sampled_from(["exact", "first", "simplified", ""]),
        exact=st.booleans(),
        plain_sgd=st.booleans(),
        alpha_note=st.sampled_from(["", "A note."]),
        beta_note=st.sampled_from(["", "A note."]),
    ),
)
def test_the_findings_agree_with_the_statuses_and_with_the_numbers(alpha, beta, basis):
    verdict = judge(alpha, beta, basis)
    statuses = {"alpha": verdict.alpha_status, "beta": verdict.beta_status}
    found = {reason.rate: reason for reason in verdict.findings}
    assert len(found) == len(verdict.findings)  # one of each rate at most
    assert set(found) == {rate for rate, status in statuses.items() if status != "safe"}
    order = ["safe", "unresolved", "unsafe"]
    assert verdict.status == max(statuses.values(), key=order.index)
    for (rate, reason), said in zip(found.items(), sentences(verdict.findings), strict=True):
        given = {"alpha": alpha, "beta": beta}[rate]
        assert (reason.value, reason.margin, reason.step) == (given.value, basis.margin, basis.step)
        assert (reason.kind is Kind.ABOVE_LIMIT) == (statuses[rate] == "unsafe")
        assert (reason.kind is Kind.NOT_JUDGED) == math.isnan(given.critical)
        assert said.startswith(rate)
        low, high = (basis.margin * end for end in given.interval)
        if reason.kind is Kind.ABOVE_LIMIT:
            assert given.value > high or (rate == "beta" and given.value == high)
            assert reason.remedy not in {Remedy.NONE, Remedy.MEASURE_SHARPER} and "Lower" in said
            waits = {Remedy.LOWER_BETA_IF_STILL_ABOVE, Remedy.LOWER_ALPHA_FIRST}
            if rate == "beta" and statuses["alpha"] == "unsafe":
                assert reason.remedy in waits
            if not math.isnan(reason.growth):
                assert basis.plain_sgd and given.value > given.critical and reason.growth >= 1
        elif reason.kind is Kind.TOO_CLOSE:
            assert low <= given.value <= high and reason.remedy is Remedy.MEASURE_SHARPER
        else:
            assert reason.remedy is Remedy.NONE and "is not judged" in said
    for rate, limit in (("alpha", alpha), ("beta", beta)):
        if limit is not None and statuses[rate] == "safe":
            assert limit.value <= basis.margin * limit.interval[0]
