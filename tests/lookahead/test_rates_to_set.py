"""From what trials and limits say to the rates to set, on quadratics, beside plain loops of arithmetic."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_maml_guard import MetaProblem, measure
from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import Lookahead
from lightning_maml_guard.lookahead.rate_search import LASTING_STEPS, RateSearch
from lightning_maml_guard.lookahead.rates_to_set import RatesToSet, is_still_above
from lightning_maml_guard.lookahead.results import TRIAL_STEPS, SearchResult, Trial
from lightning_maml_guard.messages.reasons import Kind
from lightning_maml_guard.stability.problems import PlainProblem


def to_set(problem, beta, measured=None, mean=1.0):
    """What goes from a search to rates, and the search."""
    optimizer = SGD(list(problem.params.values()), lr=beta)
    search = RateSearch(Lookahead([problem], optimizer, 1), Scale(), 3.0, alpha_suspect=True)
    return RatesToSet(search, [optimizer], problem, beta, mean, repeats=False, measured=measured), search


def plain(curvatures):
    """Half a quadratic along each axis, from 1 on each."""
    curvature = torch.tensor(curvatures, dtype=torch.float64)
    weight = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))
    return PlainProblem({"w": weight}, lambda p: 0.5 * (curvature * p["w"] ** 2).sum())


def meta(curvatures, alpha):
    """Two tasks with their minima at -1 and 1 along each axis, from 3 on each."""
    curvature = torch.tensor(curvatures, dtype=torch.float64)
    weight = nn.Parameter(torch.full((len(curvatures),), 3.0, dtype=torch.float64))
    data = (torch.tensor([[-1.0], [1.0]], dtype=torch.float64).expand(-1, len(curvatures)),)
    loss = lambda p, task: 0.5 * (curvature * (p["w"] - task[0]) ** 2).sum()  # noqa: E731
    return MetaProblem({"w": weight}, loss, data, data, alpha)


def descended(curvatures, rate, steps):
    """The loss of plain gradient descent, by arithmetic."""
    return sum(0.5 * each * (1 - rate * each) ** (2 * steps) for each in curvatures)


# One direction grows by 0.8 % a step and holds a third of the loss: the others, which shrink, hide it for 30 steps.
SLOW, RATE = [100.0, *[40.0] * 5], 0.02008


def test_rates_that_survive_a_trial_and_die_later_are_lowered_further():
    start = descended(SLOW, RATE, 0)
    assert descended(SLOW, RATE, TRIAL_STEPS) < start < descended(SLOW, RATE, LASTING_STEPS)
    problem = plain(SLOW)
    setter, search = to_set(problem, 2 * RATE)
    tried = search.trial(1.0, 0.5)
    assert tried.trains and not search.trial(1.0, 0.5, LASTING_STEPS).trains
    unknown = replace(measure(problem, beta=2 * RATE), beta_c=math.nan)
    rates = setter.of(SearchResult(search.trial(), tried, 0.5, 0.5), unknown, [])
    assert rates.alpha is None and rates.beta == pytest.approx(2 * RATE / 8)  # half of the first one that lasts
    assert descended(SLOW, rates.beta, 5000) < 0.01 * start


def test_no_rate_is_named_where_the_loss_rises_at_all_of_them():
    """As that of a policy gradient does: its steps are not along its own gradient."""
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    # The value is 1 + w, and the gradient that of 1 - w.
    problem = PlainProblem({"w": weight}, lambda p: 1 - p["w"] + 2 * p["w"].detach())
    setter, search = to_set(problem, 0.1)
    unknown = replace(measure(plain([1.0]), beta=0.1), beta_c=math.nan)
    tried = search.trial(1.0, 2.0**-14)
    assert not tried.trains and tried.end < search.trial().end  # the lower, the better
    assert setter.of(SearchResult(search.trial(), tried, 0.5, 0.5), unknown, []) == (None, None)


def test_the_meta_rate_goes_by_the_smallest_limit_seen():
    problem = plain([10.0, 1.0])
    setter, search = to_set(problem, 2.0)
    found, report = search.find(), measure(problem, beta=2.0)
    assert report.beta_c == pytest.approx(0.2)
    earlier = replace(report, beta_c=0.02)
    # Midway between half of the largest one tried that trains, and the lowest that learns nearly as much.
    assert found.highest_beta * 2.0 == 0.0625 and found.lowest_beta < found.highest_beta
    assert setter.of(found, report, []).beta == pytest.approx(
        2.0 * math.sqrt(found.lowest_beta * found.highest_beta), rel=0.01
    )
    assert setter.of(found, report, [earlier]).beta == pytest.approx(0.6 * 0.02)
    assert setter.of(found, earlier, [report]).beta == pytest.approx(0.6 * 0.02)


@pytest.mark.parametrize(
    ("flat", "mean", "expected"), [(1 / 64, 1.0, 1 / 16), (1 / 64, 0.25, 1 / 8), (0.5, 1.0, 0.25), (0.5, 0.25, 0.25)]
)
def test_without_a_limit_the_meta_rate_lies_midway_between_what_trials_say(flat, mean, expected):
    """In logarithms, and no higher than the highest to set; a peak is held for a part of the run only."""
    problem = plain([10.0, 1.0])
    setter, search = to_set(problem, 0.2, mean=mean)
    found = SearchResult(search.trial(), search.trial(1.0, 0.25), flat, 0.25)
    unknown = replace(measure(problem, beta=0.2), beta_c=math.nan)
    assert setter.of(found, unknown, []).beta == pytest.approx(expected * 0.2)


@pytest.mark.parametrize(("limit", "both"), [(0.5, True), (10.0, False)])
def test_the_meta_rate_is_lowered_too_where_it_is_far_beyond_its_limit_at_the_inner_rate_advised(limit, both):
    """At alpha = 0.3 the meta rate's own limit is 12.5; near it a lower rate learns no less within a trial."""
    alpha, beta, asked = 2.0, 12.0, []
    problem = meta([4.0, 3.0], alpha)

    def measured(factor):
        asked.append(factor)
        return replace(measure(problem.at_factor(factor), beta=beta), beta_c=limit, beta_c_noise=math.nan)

    setter, search = to_set(problem, beta, measured)
    best = search.trial(0.15)
    assert best.trains and not search.trial().trains
    rates = setter.of(SearchResult(search.trial(), best), measure(problem, beta=beta), [])
    assert asked == [pytest.approx(0.6 * 0.5 / alpha, rel=1e-3)]  # the inner loop converges below 2/4
    assert rates.alpha == pytest.approx(0.3, rel=1e-3)
    assert (rates.beta is not None) == both
    if both:
        assert 0 < rates.beta < beta / 2


def test_a_limit_far_below_what_trials_learn_at_is_contradicted():
    """Omniglot trains far beyond its limits at the start: a tenth of the rate that learns most is not advised."""
    problem = plain([10.0, 1.0])
    setter, search = to_set(problem, 2.0)
    found = search.find()
    report = replace(measure(problem, beta=2.0), beta_c=1e-4)
    assert setter.of(found, report, []).beta > 0.1 * found.lowest_beta * 2.0


@pytest.mark.parametrize(("harmful", "share"), [(True, 0.6 / 2**0.6), (False, 0.5)])
def test_an_inner_rate_that_makes_tasks_worse_is_beyond_its_limit_whatever_the_curvature_says(harmful, share):
    """The curvature at the parameters may be small, and grow along the inner steps."""
    problem = replace(meta([0.5], 2.0), inner_steps=2)
    setter, search = to_set(problem, 0.1, measured=lambda factor: measure(problem.at_factor(factor), beta=0.1))
    report = measure(problem, beta=0.1)
    assert report.alpha_ratio < 1
    found = SearchResult(search.trial(), search.trial(0.5))
    rates = replace(setter, harmful=harmful).of(found, report, [])
    assert rates.alpha == pytest.approx(share * 2.0)


def test_an_inner_rate_at_which_adaptation_harms_is_lowered_further():
    """The curvature of ``(w - 1)**4`` grows with the distance that the first inner step leads to."""
    share, limit, alpha = 0.6 / 2**0.6, 15.0, 20.0
    data, weight = (torch.ones(2, 1, dtype=torch.float64),), nn.Parameter(torch.full((1,), 1.3, dtype=torch.float64))
    loss = lambda p, task: ((p["w"] - task[0]) ** 4).sum()  # noqa: E731
    problem = MetaProblem({"w": weight}, loss, data, data, alpha, inner_steps=2)
    setter, search = to_set(problem, 1e-3, measured=lambda factor: measure(problem.at_factor(factor), beta=1e-3))

    def harmed(rate):
        far = 0.3
        for _ in range(2):
            far -= rate * 4 * far**3
        return far**4 > 1.25 * 0.3**4

    report = replace(measure(problem, beta=1e-3), alpha_c=limit)
    assert harmed(share * limit) and not harmed(share**2 * limit)
    best = search.trial(1 / 16)
    assert best.trains and search.harms(share * limit / alpha)
    assert setter.of(SearchResult(search.trial(), best), report, []).alpha == pytest.approx(share**2 * limit)


class Growing(RateSearch):
    """Trials of inner rates of which only the lowest last."""

    def _tried(self, at, steps):
        trains = at.alpha <= 0.125 or (at.alpha < 0.5 and steps == TRIAL_STEPS)
        return Trial(at, 0.5 if trains else math.inf, 0.5 if trains else -math.inf, 0.5, trains=trains)


@pytest.mark.parametrize(("learned", "factor"), [(0.125, 0.6 * 0.125), (0.25, 0.3)])
def test_an_inner_rate_by_its_limit_that_does_not_last_gives_way_to_what_trials_say(learned, factor):
    """As long as that lasts: half of a limit of 1 is 0.3 here, and dies between 30 and 100 steps."""
    problem = meta([1.0], 2.0)
    report = measure(problem, beta=0.1)
    optimizer = SGD(list(problem.params.values()), lr=0.1)
    search = Growing(Lookahead([problem], optimizer, 1), Scale(), 3.0, alpha_suspect=True)
    setter = RatesToSet(search, [optimizer], problem, 0.1, 1.0, repeats=False, measured=lambda factor: report)
    found = SearchResult(search.trial(), search.trial(learned))
    rates = setter.of(found, replace(report, alpha_c=1.0), [])
    assert rates.alpha == pytest.approx(2.0 * factor)


class Damaged(RateSearch):
    """Trials from parameters at which only rates far below those that learn last; ``never``: none does."""

    never = False

    def _tried(self, at, steps):
        trains = at.beta < 1 if steps == TRIAL_STEPS else at.beta < 0.02 and not self.never
        return Trial(at, 0.5 if trains else math.inf, 0.5 if trains else -math.inf, 0.5, trains=trains, steps=steps)


@pytest.mark.parametrize(
    ("from_start", "never", "factor"),
    [(0.3, False, 0.25), (0.2, False, 0.125), (0.0, False, 0.5 / 64), (0.3, True, None)],
)
def test_a_rate_that_lasts_where_the_run_began_is_not_given_up_for_damaged_parameters(from_start, never, factor):
    """Half of the largest that trains is 0.25 here; the first of its halves that lasts is 1/64, to be halved again."""
    problem = plain([1.0])
    report = replace(measure(problem, beta=0.1), beta_c=math.nan)
    optimizer = SGD(list(problem.params.values()), lr=0.1)
    search = Damaged(Lookahead([problem], optimizer, 1), Scale(), 3.0, alpha_suspect=False)
    search.never = never
    asked = []

    def lasts(alpha, beta):
        asked.append(beta)
        return beta < from_start

    given = [optimizer], problem, 0.1, 1.0
    setter = RatesToSet(search, *given, repeats=False, measured=lambda factor: report, lasts_from_start=lasts)
    found = SearchResult(search.trial(), search.trial(beta=0.5), lowest_beta=0.25, highest_beta=0.25)
    assert setter.of(found, report, []).beta == (None if factor is None else pytest.approx(0.1 * factor))
    assert not never or not asked  # where no rate lasts, none is to blame


class Alike(RateSearch):
    """Trials that learn a little more the lower the inner rate, below one at which they diverge."""

    most = 1.0  # meta rate at which they do not

    def initial_losses(self, alpha):
        return (1 + 0.01 * alpha if alpha <= 0.25 else math.inf,)

    def _tried(self, at, steps):
        trains = at.alpha <= 0.25 and at.beta <= self.most
        end = 0.6 + 0.01 * at.alpha if trains else math.inf
        return Trial(at, end, 1 - end if trains else -math.inf, 0.4, trains=trains)


@pytest.mark.parametrize("start", [1.0, math.nan, 1e9])
@pytest.mark.parametrize("most", [1.0, 0.1])
def test_an_inner_rate_without_a_limit_is_a_share_of_the_highest_that_learns_nearly_as_much(most, start):
    """The best of them is the one that adapts least: a few batches are learned by heart the sooner."""
    problem = replace(meta([1.0], 2.0), inner_steps=2)
    unknown = replace(measure(problem, beta=0.1), alpha_c=math.nan)
    optimizer = SGD(list(problem.params.values()), lr=0.1)
    search = Alike(Lookahead([problem], optimizer, 1), Scale(start), 3.0, alpha_suspect=True)
    setter = RatesToSet(search, [optimizer], problem, 0.1, 1.0, repeats=False, measured=lambda factor: unknown)
    search.most = most
    found = search.find()
    assert found.best.factors.alpha == 2.0**-8 and (found.best.factors.beta < 1) == (most < 1)
    assert setter.of(found, unknown, []).alpha == pytest.approx(2.0 * 0.25 * 0.6 / 2**0.6)


def test_that_a_rate_was_above_its_limit_is_no_reason_once_it_has_moved():
    """A warm-up by hand: the limit was that of the first steps, and so is the rate that is quoted beside it."""
    for rate, report in (
        ("beta", measure(plain([10.0, 1.0]), beta=0.3)),
        ("alpha", measure(meta([4.0], 1.0), beta=0.1)),
    ):
        (reason,) = [each for each in report.findings if each.rate == rate]
        other = {"alpha": "beta", "beta": "alpha"}[rate]
        assert is_still_above(reason, report) and is_still_above(reason, replace(report, **{other: 10.0}))
        assert not is_still_above(reason, replace(report, **{rate: 10.0}))
        assert not is_still_above(replace(reason, kind=Kind.TOO_CLOSE), report)
