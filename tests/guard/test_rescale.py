"""Lowering and raising, against a run whose outcome is a formula of its rates."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_maml_guard.guard.rescale import LADDER, MOST_RAISES, RELEASE, lowered, lowered_further, released
from lightning_maml_guard.lookahead.ceiling import Ceiling
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.lookahead.results import LookaheadResult


def report(alpha=0.1, beta=1.0, alpha_c=1.0, safe_beta_c=math.nan, alpha_status="safe"):
    return SimpleNamespace(alpha=alpha, beta=beta, alpha_c=alpha_c, safe_beta_c=safe_beta_c, alpha_status=alpha_status)


def diverges_above(found, beta, alpha=math.inf, tried=None):
    def look(caps):
        at = caps.applied(found.alpha, found.beta)
        if tried is not None:
            tried.append(caps)
        return LookaheadResult((1.0, 0.5 if at[1] <= beta and not at[0] > alpha else math.inf))

    return look


def test_the_critical_rate_is_tried_first_and_kept_if_lower_ones_end_no_lower():
    found, tried = report(safe_beta_c=0.5), []
    assert lowered(found, Caps(), 0.9, diverges_above(found, 0.45, tried=tried), reach_alpha=True) == Caps(None, 0.45)
    assert [each.beta for each in tried] == [0.45, *(0.45 / 2**k for k in (1, 2))]  # PATIENCE more


@pytest.mark.parametrize(("ends", "taken"), [((1.1, 0.9, 0.5, 0.6, 0.7), 0.1), ((1.1, 1.0, 1.0, 0.1), 0.4)])
def test_lower_rates_are_taken_while_they_bring_the_loss_further_down(ends, taken):
    found, left = report(safe_beta_c=0.4), list(ends)
    caps = lowered(found, Caps(), 1.0, lambda caps: LookaheadResult((1.0, left.pop(0))), reach_alpha=True)
    assert caps.beta == pytest.approx(taken)


def test_both_rates_go_to_their_critical_values_together():
    found = report(alpha=0.1, alpha_c=0.05, safe_beta_c=0.4, alpha_status="unsafe")
    assert lowered(found, Caps(), 1.0, diverges_above(found, 9.0), reach_alpha=True) == Caps(0.05, 0.4)


def test_an_inner_rate_out_of_reach_is_left_alone():
    found = report(alpha=0.1, alpha_c=0.05, safe_beta_c=0.4, alpha_status="unsafe")
    assert lowered(found, Caps(), 1.0, diverges_above(found, 9.0), reach_alpha=False) == Caps(None, 0.4)


def test_without_a_critical_rate_it_halves():
    found = report()
    assert lowered(found, Caps(), 1.0, diverges_above(found, 0.3), reach_alpha=True).beta == 0.25


def test_after_a_rollback_the_meta_rate_falls_even_if_the_lookahead_is_calm():
    found = report(safe_beta_c=5.0)
    calm = diverges_above(found, 9.0)
    assert lowered(found, Caps(None, 0.8), 1.0, calm, reach_alpha=True, at_least_halve=True).beta == 0.4


def test_an_inner_loop_that_explodes_brings_the_inner_rate_down():
    found = report(alpha=0.4)
    assert lowered(found, Caps(), 1.0, diverges_above(found, 1.0, alpha=0.2), reach_alpha=True).alpha == 0.2


def test_an_inner_rate_the_parameters_rely_on_is_left_alone():
    found = report(alpha=0.1, alpha_c=0.05, safe_beta_c=0.4, alpha_status="unsafe")

    def look(caps):
        loss = 40.0 if caps.alpha is not None else 1.0
        return LookaheadResult((loss, 0.9 * loss))

    assert lowered(found, Caps(), 1.0, look, loss=1.0, reach_alpha=True) == Caps(None, 0.4)


def test_lookaheads_are_bounded_and_the_one_that_ended_lowest_is_taken():
    found, tried = report(), []

    def look(caps):
        tried.append(caps)
        return LookaheadResult((1.0, 5.0 if caps.beta == 0.125 else 9.0))

    assert lowered(found, Caps(), 1.0, look, reach_alpha=False).beta == 0.125
    assert len(tried) == len({share for alpha, share in LADDER if alpha != 0.5})


@given(st.floats(1e-2, 1.0), st.floats(1e-3, 2.0), st.floats(0.01, 3.0))
def test_lowering_never_raises_and_ends_where_the_run_survives(cap, survives, critical):
    found = report(safe_beta_c=critical)
    caps = lowered(found, Caps(None, cap), 1.0, diverges_above(found, survives), reach_alpha=False)
    assert caps.beta is not None and caps.beta <= cap
    assert caps.beta <= survives or min(cap, critical) / 256 > survives


def ends_best_at(best, alpha=0.1, beta=1.0):
    """The lookahead at rates that lower the loss by as much as the outer one is high, up to ``best`` (inner, outer)."""

    def look(caps):
        inner, outer = caps.applied(alpha, beta)
        share = outer / best[1]
        return LookaheadResult((1.0, 1.0 - 0.5 * min(share, 1 / share) + abs(math.log(inner / best[0]))))

    return look


def test_release_goes_up_while_a_higher_rate_goes_further_down_and_is_lifted_at_the_configured_one():
    look = ends_best_at((0.1, 1.0))
    start = Caps(None, 0.01)
    once = released(0.1, 1.0, start, look(start), look)
    assert once == Caps(None, pytest.approx(0.01 * RELEASE**MOST_RAISES))
    caps = start
    for _ in range(4):
        caps = released(0.1, 1.0, caps, look(caps), look)
    assert caps == Caps()


@pytest.mark.parametrize(("share", "expected"), [(0.97, 0.1), (0.8, 0.2)])
def test_an_inner_rate_above_the_advised_one_has_to_lead_further_down(share, expected):
    def look(caps):
        alpha, _ = caps.applied(1.0, 1.0)
        return LookaheadResult((1.0, 0.5 if alpha <= 0.1 else 0.5 * share if alpha <= 0.2 else 1.0))

    caps = Caps(0.1, None)
    assert released(1.0, 1.0, caps, look(caps), look).alpha == pytest.approx(0.2)
    assert released(1.0, 1.0, caps, look(caps), look, advised=Caps(0.1)).alpha == pytest.approx(expected)


@pytest.mark.parametrize("best", [0.3, 0.15])
def test_release_stops_where_higher_rates_lead_less_far_down(best):
    look, caps = ends_best_at((0.1, best)), Caps(None, 0.3)
    assert released(0.1, 1.0, caps, look(caps), look) == caps


@pytest.mark.parametrize(("survives", "released_to"), [(0.79, 0.1), (0.81, 0.2), (10.0, 0.8)])
def test_rates_that_lead_as_far_down_are_released_to_a_quarter_of_those_that_survive(survives, released_to):
    found, caps = report(beta=100.0), Caps(None, 0.1)
    look = diverges_above(found, survives)
    assert released(0.1, 100.0, caps, look(caps), look).beta == pytest.approx(released_to)


def test_rates_that_survive_alone_may_stay_unless_lower_ones_bring_the_loss_further_down():
    """A loss that left for another reason does not come back sooner at lower rates."""
    found, calm = report(safe_beta_c=0.5), LookaheadResult((1.0, 1.0))
    assert lowered(found, Caps(None, 0.8), 1.0, lambda caps: calm, present=calm, reach_alpha=True) == Caps(None, 0.8)
    better = LookaheadResult((1.0, 0.8))
    assert lowered(found, Caps(), 1.0, lambda caps: better, present=calm, reach_alpha=True) == Caps(None, 0.5)
    worse = LookaheadResult((1.0, 9.0))
    assert lowered(found, Caps(), 1.0, lambda caps: calm, present=worse, reach_alpha=True) == Caps(None, 0.5)
    assert lowered(found, Caps(None, 0.8), 1.0, lambda caps: worse, present=worse, reach_alpha=True) == Caps(None, 0.8)


def test_rates_that_have_just_failed_are_not_tried_again():
    look, caps = ends_best_at((0.1, 1.0)), Caps(None, 0.1)
    failed = Ceiling().with_failure(0.1, 0.4, 10)

    def release(step):
        return released(0.1, 1.0, caps, look(caps), look, allows=lambda each: failed.allows(each, 0.1, 1.0, step))

    found = release(11)
    assert found == Caps(None, 0.2)  # 0.4 is what failed
    later = release(failed.until)
    assert later == Caps(None, 0.8)
    again = failed.with_failure(0.1, 0.4, 50)
    assert again.until - 50 == 2 * (failed.until - 10)


def test_a_rate_that_may_rise_rises_where_the_other_may_not():
    look, caps = ends_best_at((0.1, 1.0), alpha=0.4), Caps(0.1, 0.3)
    assert released(0.4, 1.0, caps, look(caps), look) == Caps(0.1, None)


@pytest.mark.parametrize(("best", "cap"), [(1.0, None), (0.2, 1 / 4), (0.1, 1 / 16)])
def test_the_rate_of_a_run_that_loses_ground_is_lowered_while_that_leads_further_down(best, cap):
    look = ends_best_at((0.1, best))
    assert lowered_further(0.1, 1.0, Caps(), look(Caps()), look, reach_alpha=False) == Caps(None, cap)


def test_an_inner_rate_that_makes_a_run_lose_ground_is_lowered_if_it_can_be():
    look = ends_best_at((0.025, 1.0))
    assert lowered_further(0.1, 1.0, Caps(), look(Caps()), look, reach_alpha=True) == Caps(0.025, None)
    assert lowered_further(0.1, 1.0, Caps(), look(Caps()), look, reach_alpha=False) == Caps()


@pytest.mark.parametrize(
    ("lates", "cap"),
    [
        ({1.0: 1.0, 0.5: 0.96, 0.25: 0.9}, 0.5),  # a little lower is enough for half the rate, not for a quarter
        ({1.0: 1.0, 0.5: 0.96, 0.25: 0.8}, 0.25),
        ({1.0: 1.0, 0.5: 0.96, 0.25: 0.8, 0.125: 0.1}, 0.25),
        ({1.0: 1.0, 0.5: 0.98, 0.25: 0.1}, None),
    ],
)
def test_the_rate_of_a_run_that_stands_still_is_halved_where_that_leads_further_down(lates, cap):
    def look(caps):
        return LookaheadResult((1.0, lates[caps.applied(0.1, 1.0)[1]]))

    assert lowered_further(0.1, 1.0, Caps(), look(Caps()), look, reach_alpha=False, stagnates=True) == Caps(None, cap)
