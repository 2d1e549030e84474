"""Which rate is to blame, and what to set: on quadratics, whose limits are known, beside plain loops of arithmetic."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam

from lightning_maml_guard import MetaProblem
from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import LOSS_COST, Lookahead
from lightning_maml_guard.lookahead.rate_search import RateSearch
from lightning_maml_guard.lookahead.rates_to_set import recovers
from lightning_maml_guard.lookahead.results import TRIAL_STEPS, Factors, Trial
from lightning_maml_guard.stability.problems import PlainProblem

RATIO = 3.0
FAR = 1e100


def plain(curvatures, make):
    """Half a quadratic along each axis, from 1 on each."""
    weight = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))
    curvature = torch.tensor(curvatures, dtype=torch.float64)
    problem = PlainProblem({"w": weight}, lambda p: 0.5 * (curvature * p["w"] ** 2).sum())
    return Lookahead([problem], make([weight]), 1)


def search(lookahead, *, alpha_suspect=False, kind=RateSearch, **arguments):
    return kind(lookahead, Scale(), RATIO, alpha_suspect=alpha_suspect, **arguments)


def to_set(found):
    """The factors on the rates that a search leads to."""
    alpha, beta = found.best.factors
    return alpha, min(found.lowest_beta, found.highest_beta) if beta < 1 else 1.0


def descended(curvatures, rate, steps, momentum=0.0):
    """The loss after so many steps of (heavy-ball) gradient descent: arithmetic, none of our code, nor torch's."""
    total = 0.0
    for each in curvatures:
        at, velocity = 1.0, 0.0
        for _ in range(steps):
            velocity = momentum * velocity + each * at
            at -= rate * velocity
            if abs(at) > FAR:
                return math.inf
        total += 0.5 * each * at**2
    return total


@settings(max_examples=12, deadline=None)
@given(st.lists(st.floats(0.3, 100.0), min_size=1, max_size=4), st.floats(1.3, 50.0), st.sampled_from([0.0, 0.5, 0.9]))
def test_a_rate_beyond_the_limit_is_lowered_to_one_that_learns(curvatures, times, momentum):
    limit = 2 * (1 + momentum) / max(curvatures)
    rate = times * limit
    assert descended(curvatures, rate, TRIAL_STEPS, momentum) > sum(curvatures)  # it does diverge
    found = search(plain(curvatures, lambda p: SGD(p, lr=rate, momentum=momentum))).find()
    assert not found.present.trains and found.present.end == math.inf and found.best.trains
    alpha, beta = to_set(found)
    lower = beta * rate
    assert alpha == 1.0 and 0 < lower < limit and found.highest_beta * rate < limit
    # It trains to the end, and within the trial it learns half of what the best of many rates does.
    start = 0.5 * sum(curvatures)
    assert descended(curvatures, lower, 5000, momentum) < 0.01 * start
    grid = [descended(curvatures, limit * 1.2**-power, TRIAL_STEPS, momentum) for power in range(1, 40)]
    assert start - descended(curvatures, lower, TRIAL_STEPS, momentum) > 0.5 * (start - min(grid))


@pytest.mark.parametrize("times", [1.5, 10.0, 1000.0])
def test_a_trial_ends_where_a_plain_loop_does(times):
    curvatures, rate = [10.0, 1.0], times * 0.2
    tried = search(plain(curvatures, lambda p: SGD(p, lr=rate)))
    for factor in (1.0, 0.5, 2.0**-8, 2.0**-14):
        losses = [descended(curvatures, factor * rate, steps) for steps in range(TRIAL_STEPS + 1)]
        trial = tried.trial(beta=factor)
        assert trial.factors == Factors(1.0, factor)
        if max(losses) > RATIO * losses[0]:
            assert (trial.end, trial.learned, trial.trains) == (math.inf, -math.inf, False)
            continue
        last = losses[TRIAL_STEPS - TRIAL_STEPS // 4 : TRIAL_STEPS]
        end = sum(last) / len(last)
        assert trial.end == pytest.approx(end) and trial.learned == pytest.approx(losses[0] - end, rel=1e-5)
        assert trial.trains == (end <= losses[0])


def test_adam_is_lowered_to_a_rate_at_which_torchs_own_trains():
    curvatures = [10.0, 1.0]
    found = search(plain(curvatures, lambda p: Adam(p, lr=30.0))).find()
    assert not found.present.trains and found.best.trains and to_set(found)[0] == 1.0
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = Adam([weight], lr=to_set(found)[1] * 30.0)
    for _ in range(500):
        optimizer.zero_grad()
        loss = 0.5 * (torch.tensor(curvatures) * weight**2).sum()
        loss.backward()
        optimizer.step()
        assert loss < RATIO * 5.5
    assert loss < 0.01 * 5.5


TARGETS = (-1.0, 1.0)
START = 3.0


def meta(curvatures, alpha, beta, steps=1):
    """Tasks with their minimum at -1 and at 1 along each axis, from 3 on each."""
    weight = nn.Parameter(torch.full((len(curvatures),), START, dtype=torch.float64))
    curvature = torch.tensor(curvatures, dtype=torch.float64)
    data = (torch.tensor(TARGETS, dtype=torch.float64).reshape(-1, 1).expand(-1, len(curvatures)),)
    problem = MetaProblem(
        {"w": weight}, lambda p, task: 0.5 * (curvature * (p["w"] - task[0]) ** 2).sum(), data, data, alpha, steps
    )
    return Lookahead([problem], SGD([weight], lr=beta), 1)


def meta_descended(curvatures, alpha, beta, steps, inner=1):
    """The same for exact MAML, whose gradient is that of the quadratics' adapted curvature."""
    total = 0.0
    for each in curvatures:
        adapted, at = each * (1 - alpha * each) ** (2 * inner), START
        for _ in range(steps):
            at -= beta * sum(adapted * (at - target) for target in TARGETS) / len(TARGETS)
            if abs(at) > FAR:
                return math.inf
        total += sum(0.5 * adapted * (at - target) ** 2 for target in TARGETS) / len(TARGETS)
    return total


CURVATURES = [4.0, 1.0]
# Adaptation converges below an inner rate of 2/4; near the best ones the adapted curvature is about 0.6.
CASES = {
    # alpha, beta: which factors are below 1
    "alpha": (1.0, 0.3, (True, False)),
    "alpha by far": (8.0, 0.3, (True, False)),
    "beta": (0.1, 12.0, (False, True)),
    "beta by far": (0.1, 500.0, (False, True)),
    "both": (1.0, 20.0, (True, True)),
}
# An inner rate far beyond its limit is always a suspect.
SUSPECTS = [(name, suspect) for name in CASES for suspect in (True, False) if suspect or name in ("alpha", "beta")]


@pytest.mark.parametrize(("name", "suspect"), SUSPECTS)
def test_the_rate_to_blame_is_named_and_lowering_it_trains(name, suspect):
    alpha, beta, blamed = CASES[name]
    found = search(meta(CURVATURES, alpha, beta), alpha_suspect=suspect).find()
    assert not found.present.trains and found.best.trains
    factors = to_set(found)
    assert (factors[0] < 1, factors[1] < 1) == blamed
    new_alpha, new_beta = factors[0] * alpha, factors[1] * beta
    unadapted = meta_descended(CURVATURES, 0.0, 0.0, 0)
    assert meta_descended(CURVATURES, new_alpha, new_beta, TRIAL_STEPS) < 0.5 * unadapted
    assert meta_descended(CURVATURES, new_alpha, new_beta, 2000) < 0.1 * unadapted
    # As it was, it does not: neither does lowering the other rate alone, at any factor.
    ladder = [2.0**-power for power in range(15)]
    if blamed == (True, False):
        assert min(meta_descended(CURVATURES, alpha, beta * each, 2000) for each in ladder) > 0.5 * unadapted
    if blamed[1]:
        assert min(meta_descended(CURVATURES, alpha * each, beta, 60) for each in ladder) > unadapted


def test_the_inner_rate_alone_is_looked_for_where_the_meta_rate_is_to_be_left():
    found = search(meta(CURVATURES, 1.0, 0.02), alpha_suspect=True).find_alpha()
    factor, beta = to_set(found)
    assert beta == 1.0 and 4.0 * factor < 2.0 and found.best.trains
    assert meta_descended(CURVATURES, factor, 0.02, TRIAL_STEPS) < meta_descended(CURVATURES, 0.0, 0.0, 0)


def test_rates_that_are_fine_learn_most_as_they_are():
    for lookahead in (plain([1.0, 0.5], lambda p: SGD(p, lr=0.5)), meta([4.0, 1.0], 0.2, 0.5)):
        present, best = search(lookahead).probe()
        assert present is best and present.trains and present.factors == Factors(1.0, 1.0)


def test_a_probe_sees_that_lower_rates_do_better_where_the_rates_as_they_are_survive():
    """The loss oscillates between two walls: it neither grows nor falls."""
    lookahead = plain([10.0], lambda p: SGD(p, lr=0.2))
    present, best = search(lookahead).probe()
    assert present.end == pytest.approx(5.0) and present.learned == pytest.approx(0.0, abs=1e-9)
    assert best.factors.beta < 1 and best.learned > 4.0


@pytest.mark.parametrize("suspect", [True, False])
def test_a_probe_lowers_an_inner_rate_that_is_a_suspect(suspect):
    """Five inner steps within their limit oscillate: they keep most of the loss that half of the rate takes away."""
    alpha, beta = 0.48, 0.3
    tried = search(meta(CURVATURES, alpha, beta, steps=5), alpha_suspect=suspect)
    present, best = tried.probe()
    assert present.trains and (best.factors == Factors(0.5, 1.0)) == suspect
    assert present.end == pytest.approx(meta_descended(CURVATURES, alpha, beta, TRIAL_STEPS, inner=5), rel=1e-3)
    assert meta_descended(CURVATURES, 0.5 * alpha, beta, TRIAL_STEPS, inner=5) < 0.2 * present.end


def test_a_probe_ends_at_the_first_lower_rate_that_learns_less():
    lookahead = plain([1.0, 0.5], lambda p: SGD(p, lr=0.5))
    tried = search(lookahead)
    tried.probe()
    made = lookahead.gradients
    tried.trial(beta=0.25)
    assert lookahead.gradients == made
    tried.trial(beta=1 / 16)
    assert lookahead.gradients > made


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_where_the_loss_is_not_finite_at_any_rate_nothing_trains(value):
    weight = nn.Parameter(torch.ones(1))
    problem = PlainProblem({"w": weight}, lambda p: (p["w"] * value).sum())
    tried = search(Lookahead([problem], SGD([weight], lr=0.1), 1))
    found = tried.find()
    assert not found.best.trains and not found.present.trains and found.best.learned == -math.inf
    present, best = tried.probe()
    assert not best.trains and present.end == math.inf


def test_a_query_loss_that_overflows_is_the_inner_rates():
    """At unchanged parameters: the reference is the loss without adaptation, which is finite."""
    lookahead = meta(CURVATURES, 1e200, 0.3)
    tried = search(lookahead)
    assert tried.initial_losses(1.0) == (math.inf,) and tried.reference == tried.initial_losses(0.0)
    assert tried.reference[0] == pytest.approx(meta_descended(CURVATURES, 0.0, 0.0, 0))
    tried = search(meta(CURVATURES, 40.0, 0.3, steps=40), alpha_suspect=True)
    found = tried.find()
    alpha, beta = to_set(found)
    assert alpha < 1.0 == beta and found.best.trains
    assert meta_descended(CURVATURES, alpha * 40.0, 0.3, 2000, inner=40) < 1.0


def test_a_trial_that_leaves_ends_there_and_none_is_made_twice():
    lookahead = plain([1.0], lambda p: SGD(p, lr=4.0))  # the loss grows ninefold in each step
    tried = search(lookahead)
    reference = tried.reference
    before = lookahead.gradients
    assert tried.trial().end == math.inf and reference == (0.5,)
    assert lookahead.gradients - before == 2  # the loss at the start, and the one that left
    spent = lookahead.gradients
    assert tried.trial() is tried.trial(1.0, 1.0) and tried.trial(beta=2.0**-4).trains
    assert lookahead.gradients - spent == TRIAL_STEPS + LOSS_COST
    spent = lookahead.gradients
    tried.trial(beta=2.0**-4), tried.probe()[0], tried.reference
    assert (
        lookahead.gradients - spent == TRIAL_STEPS + LOSS_COST
    )  # of the probe at a sixteenth that is known, one is new


def test_what_lower_inner_rates_take_away_is_not_counted_as_the_meta_rates():
    """Else a meta rate that does nothing learns nearly as much as the best one, beside a much lower inner rate."""
    found = search(meta(CURVATURES, 1.0, 20.0), alpha_suspect=True).find_beta(0.2)
    tried = search(meta(CURVATURES, 1.0, 20.0), alpha_suspect=True)
    lowest, idle = tried.trial(0.2, found.lowest_beta), tried.trial(0.2, 2.0**-14)
    assert found.lowest_beta < 1 and lowest.outer_gain > 0.65 * found.best.outer_gain > 10 * idle.outer_gain
    assert idle.learned > 0.6 * found.best.learned


def test_a_peak_stands_for_the_rate_that_the_schedule_goes_to():
    """A warm-up at a tenth of the limit that goes to three times the limit."""
    lookahead = plain([10.0, 1.0], lambda p: SGD(p, lr=0.02))
    assert search(lookahead).trial().trains
    found = search(lookahead, peak=30.0).find()
    assert not found.present.trains and found.best.trains
    lower = to_set(found)[1] * 30.0 * 0.02  # a factor on the peak
    assert lower < 0.2 and descended([10.0, 1.0], lower, 5000) < 1e-3
    grid = [descended([10.0, 1.0], 0.2 * 1.2**-power, TRIAL_STEPS) for power in range(1, 40)]
    assert 5.5 - descended([10.0, 1.0], lower, TRIAL_STEPS) > 0.5 * (5.5 - min(grid))


def test_a_peak_is_tried_with_the_momentum_that_it_will_have():
    lookahead = plain([10.0, 1.0], lambda p: SGD(p, lr=0.01, momentum=0.95))
    lookahead.groups = ({"momentum": 0.5},)
    losses = lookahead.run(1.0, 2.0, steps=12).losses
    expected = [descended([10.0, 1.0], 0.02, steps, momentum=0.5) for steps in range(13)]
    assert losses == pytest.approx(expected, rel=1e-6)


def test_the_batches_are_compared_with_themselves():
    """A batch with a large loss of its own at the end of a trial is no sign that the run got worse."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    problems = [
        PlainProblem({"w": weight}, lambda p, more=more: (0.5 * p["w"] ** 2).sum() + more) for more in (0.0, 100.0)
    ]
    lookahead = Lookahead(problems, SGD([weight], lr=1e-3), 1)
    trial = search(lookahead).trial()
    assert trial.trains and 0 < trial.learned < 0.5


def test_trials_touch_neither_parameters_nor_optimizer_nor_random_numbers():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(2, dtype=torch.float64))
    optimizer = SGD([weight], lr=0.5, momentum=0.9, weight_decay=0.01)
    weight.grad = torch.ones_like(weight)
    optimizer.step()  # so that there is momentum
    curvature = torch.tensor(CURVATURES, dtype=torch.float64)
    data = (torch.randn(4, 2, dtype=torch.float64),)
    problem = MetaProblem({"w": weight}, lambda p, t: 0.5 * (curvature * (p["w"] - t[0]) ** 2).sum(), data, data, 1.5)
    before = weight.detach().clone(), weight.grad.clone(), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    tried = search(Lookahead([problem], optimizer, 1), alpha_suspect=True)
    tried.find(), tried.find_alpha(), tried.probe()
    assert torch.equal(weight, before[0]) and torch.equal(weight.grad, before[1])
    assert str(optimizer.state_dict()) == str(before[2]) and torch.equal(torch.get_rng_state(), before[3])


@given(st.floats(0.01, 2.0), st.sampled_from([1.0, 2.0, math.inf]))
def test_a_lower_meta_rate_is_blamed_where_it_learns_so_many_times_as_much_as_a_lower_inner_rate(learned, weight):
    assert to_blame(learned, weight) == ("alpha" if learned * weight > 0.5 else "beta")


def to_blame(learned_at_lower_alpha, weight):
    """What is lowered where a lower inner rate learns so much, and a lower meta rate 0.5; nothing else trains."""
    found = scripted({(0.5, 1.0): learned_at_lower_alpha, (1.0, 0.125): 0.5}, alpha_suspect=True).find(weight)
    return "alpha" if found.best.factors.alpha < 1 else "beta"


def scripted(learned, **arguments):
    """A search whose trials learn so much, by the factors on the rates; others do not train."""

    class Scripted(RateSearch):
        def trial(self, alpha=1.0, beta=1.0, steps=None):
            gained = learned.get((alpha, beta), -1.0)
            return Trial(Factors(alpha, beta), 1.0 - gained, gained, gained, trains=gained > 0)

        def initial_losses(self, alpha):
            return (1.0,)

    leaf = nn.Parameter(torch.ones(1))
    problem = MetaProblem({"w": leaf}, lambda p, d: (d * p["w"]).sum(), torch.ones(1, 1), torch.ones(1, 1), 0.1)
    lookahead = Lookahead([problem], SGD([leaf], lr=0.1), 1)
    return search(lookahead, kind=Scripted, **arguments)


def two_batches(rate):
    """Half a square each, above a loss that no step takes away: 1 on the one, 10 on the other."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    problems = [
        PlainProblem({"w": weight}, lambda p, least=least: 0.5 * p["w"].sum() ** 2 + least) for least in (1, 10)
    ]
    return Lookahead(problems, SGD([weight], lr=rate), 1)


def test_a_run_comes_back_to_the_losses_of_the_same_batches():
    """The trial ends on four hard batches and three easy ones, at 6.14; the median of what was kept is 5.6."""
    tried = search(two_batches(0.5))
    assert recovers(tried, (1.1, 10.1), 0.1)
    assert not recovers(tried, (0.5, 10.0), 0.1)
    assert not recovers(search(two_batches(0.001)), (1.1, 10.1), 0.1)  # too slow to be back soon


def test_what_counts_as_clearly_lower_is_a_share_of_the_loss_before_training():
    tried = search(two_batches(0.5))
    assert tried.clear_margin(0.1) == pytest.approx(0.1 * (1.5 + 10.5) / 2)


class Chancy(RateSearch):
    """Trials of which one is killed by chance, between rates that learn."""

    def _tried(self, at, steps):
        amount = {0.5: 0.3, 0.25: 0.4, 0.125: 0.1, 0.0625: 0.6, 0.03125: 0.2}.get(at.beta, 0.05)
        return Trial(at, 1 - amount, amount, amount, trains=True)


def test_a_rate_that_kills_by_chance_does_not_end_the_ladder_where_a_lower_one_is_known_to_learn_more():
    lookahead = plain([1.0], lambda weights: SGD(weights, lr=0.1))
    assert search(lookahead, kind=Chancy).find_beta(1.0).best.factors.beta == 0.25
    known = search(lookahead, kind=Chancy)
    assert known.lowest_far_below().factors == Factors(1.0, 0.0625)
    assert known.is_soon_below(0.5) and not known.is_soon_below(0.3)
    assert known.find_beta(1.0).best.factors.beta == 0.0625


@pytest.mark.parametrize(("velocity", "trains"), [(0.0, True), (30.0, False), (1e6, False)])
def test_where_momentum_has_thrown_a_run_no_low_rate_trains(velocity, trains):
    """One that only ends higher than it began is no better: it is the parameters' fault, or the momentum's."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = SGD([weight], lr=5.0, momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.full_like(weight, velocity)
    problem = PlainProblem({"w": weight}, lambda p: 0.5 * p["w"].square().sum())
    tried = search(Lookahead([problem], optimizer, 1))
    assert not math.isfinite(tried.trial().end) and tried.far_below.trains == trains


class Steep(RateSearch):
    """The loss falls to a hundredth at the best rate."""

    def _tried(self, at, steps):
        end = {0.5: 0.01, 0.25: 0.03, 0.125: 0.1, 0.0625: 0.2, 0.03125: 0.5}.get(at.beta, 1.0)
        return Trial(at, end, 1 - end, 1 - end, trains=at.beta < 1)


def test_the_lowest_rate_that_learns_nearly_as_much_also_ends_nearly_as_low():
    """80 % of a fall to a hundredth would be twenty times the loss."""
    found = search(plain([1.0], lambda weights: SGD(weights, lr=0.1)), kind=Steep).find_beta(1.0)
    assert (found.best.factors.beta, found.lowest_beta) == (0.5, 0.25)


class Lucky(RateSearch):
    """Half the inner rate survives and learns most, lower ones diverge as the present one does; low meta rates learn."""

    learned = 0.4  # at lower meta rates

    def initial_losses(self, alpha):
        return (1.0,)

    def _tried(self, at, steps):
        amount = self.learned if at.beta < 1 else {0.5: 0.6}.get(at.alpha, -math.inf)
        return Trial(at, 1 - amount, amount, amount, trains=amount > 0, steps=steps)


@pytest.mark.parametrize(("learned", "weight", "alpha"), [(0.4, 1.0, 1.0), (-0.1, 1.0, 0.5), (0.4, math.inf, 0.5)])
def test_an_inner_rate_below_which_lower_ones_diverge_is_not_blamed_where_a_lower_meta_rate_learns(
    learned, weight, alpha
):
    tried = search(meta(CURVATURES, 1.0, 0.02), kind=Lucky, alpha_suspect=True)
    tried.learned = learned
    assert tried.find(weight).best.factors.alpha == alpha


class Helped(RateSearch):
    """Lower inner and meta rates learn alike, the latter a little more."""

    halved = 2.0

    def initial_losses(self, alpha):
        return ({0.0: 3.0, 1.0: 1.0}.get(alpha, self.halved),)

    def _tried(self, at, steps):
        amount = 0.5 if at.beta < 1 else 0.48 if at.alpha < 1 else -1.0
        return Trial(at, 1 - amount, amount, amount, trains=amount > 0)


def test_an_inner_loop_that_helps_the_more_the_higher_its_rate_does_not_diverge():
    """It is not blamed although a lower meta rate learns less than the so many times as much that is asked for.

    One that diverges at half its rate may do well at its own: its units have died, and what is left is a constant.
    """
    lookahead = meta(CURVATURES, 1.0, 0.02)
    assert search(lookahead, kind=Helped, alpha_suspect=True).find(2.0).best.factors.alpha == 1
    for halved in (0.5, 4.0):
        harmed = search(lookahead, kind=Helped, alpha_suspect=True)
        harmed.halved = halved
        assert harmed.find(2.0).best.factors.alpha < 1


def counted(lookahead, **arguments):
    """A search, and the pairs of factors that it runs, in turn."""
    ran, run = [], lookahead.run
    lookahead.run = lambda alpha, beta, **given: (ran.append((alpha, beta, given["steps"])), run(alpha, beta, **given))[
        1
    ]
    return search(lookahead, **arguments), ran


def test_searches_from_the_same_place_run_nothing_twice():
    tried, ran = counted(meta(CURVATURES, 1.0, 0.3), alpha_suspect=True)
    first = tried.find()
    known = list(ran)
    again = tried.like_this(True, TRIAL_STEPS)
    assert again.find() == first and ran == known
    # What a trial learns depends on the suspect; what is run does not.
    other = tried.like_this(False, TRIAL_STEPS)
    assert other.trial(0.5).end == tried.trial(0.5).end and other.trial(0.5).learned > tried.trial(0.5).learned
    assert ran == known
    assert tried.like_this(True, 2 * TRIAL_STEPS).trial(0.5).steps == 2 * TRIAL_STEPS
    assert ran == [*known, (0.5, 1.0, 2 * TRIAL_STEPS)]


def test_a_trial_that_another_search_ended_early_is_run_again_under_a_higher_bound():
    """The loss grows from 0.5 to 0.5 * 9: below 30 times the loss before training, above 3 times it."""
    lookahead = plain([1.0], lambda p: SGD(p, lr=4.0))
    tried = search(lookahead)
    assert tried.like_this(False, 1).trial().end == math.inf
    tried._ratio = 30.0
    assert tried.like_this(False, 1).trial().end == 0.5 and not tried.like_this(False, 2).trial().trains
    tried._ratio = 3.0
    assert tried.like_this(False, 1).trial().end == math.inf


class Known(RateSearch):
    """Outer rates of which the loss tells how much each learns, on both sides of the best one."""

    amounts = (0.1, 0.5, 0.8, 0.9, 0.8, 0.75, 0.7, 0.68, 0.66, 0.3, 0.1, 0.05, 0.0, 0.0)

    def _tried(self, at, steps):
        power = round(-math.log2(at.beta))
        amount = self.amounts[power - 1] if power else -1.0
        return Trial(at, 1 - amount, amount, amount, trains=amount > 0, steps=steps)


def test_what_lies_between_two_known_trials_below_the_best_one_is_not_tried():
    whole, known = (search(plain([1.0], lambda p: SGD(p, lr=0.1)), kind=Known) for _ in range(2))
    known._lower_betas(stride=3)
    expected = whole.find_beta(1.0)
    assert known.find_beta(1.0) == expected and expected.best.factors.beta == 2.0**-4
    powers = sorted(round(-math.log2(at.beta)) for at, _ in known._trials if at.beta < 1)
    assert powers == [1, 2, 3, 4, 5, 6, 9, 10, 12]  # not 7 and 8, whose neighbours 6 and 9 learn nearly as much
    # Of one that learns much less than the best, the neighbour is looked for.
    whole, known = (search(plain([1.0], lambda p: SGD(p, lr=0.1)), kind=Known) for _ in range(2))
    for each in (whole, known):
        each.amounts = (*Known.amounts[:7], 0.2, 0.1, *[0.05] * 5)
    known._lower_betas(stride=3)
    assert known.find_beta(1.0) == whole.find_beta(1.0) and (Factors(1.0, 2.0**-8), TRIAL_STEPS) in known._trials
