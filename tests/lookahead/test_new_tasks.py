"""Rates are judged by tasks that a trial does not train on: beside arithmetic, and where a network memorises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from lightning_maml_guard import MetaProblem
from lightning_maml_guard.lookahead.lookahead import Lookahead
from lightning_maml_guard.lookahead.new_tasks import NewTasks
from lightning_maml_guard.lookahead.results import Factors
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem
from lightning_maml_guard.utils.distributed import Ranks
from tests.lookahead.test_rate_search import scripted

LR, ALPHA = 0.3, 0.5


def squares(weight, targets):
    """Tasks of half a square around a target each."""
    goal = torch.tensor(targets, dtype=torch.float64)
    return MetaProblem({"w": weight}, lambda p, t: 0.5 * (p["w"] - t).square().sum(), goal, goal, ALPHA)


def new_tasks(problems, weight):
    return NewTasks(problems, lambda batches: Lookahead(batches, SGD([weight], lr=LR), 1), Ranks())


def by_hand(batches, held, alpha, lr, steps):
    """The held-out loss before and after gradient descent on the other tasks: arithmetic, nothing of ours or torch's."""

    def loss(at, rate):
        means = [sum(0.5 * ((1 - rate) * (at - goal)) ** 2 for goal in batch[:held]) / held for batch in batches]
        return sum(means) / len(means)

    at, before = 0.0, min(loss(0.0, 0.0), loss(0.0, ALPHA))
    for step in range(steps):
        goals = batches[step % len(batches)][held:]
        at -= lr * sum((1 - alpha) ** 2 * (at - goal) for goal in goals) / len(goals)
    return before - loss(at, alpha)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.floats(-3, 3), min_size=9, max_size=9), min_size=2, max_size=3),
    st.sampled_from([1.0, 0.5, 0.125]),
    st.sampled_from([1.0, 0.25]),
    st.integers(1, 7),
)
def test_what_is_learned_is_that_of_tasks_that_were_not_trained_on(batches, alpha, beta, steps):
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    found = new_tasks([squares(weight, goals) for goals in batches], weight)
    expected = by_hand(batches, 2, alpha * ALPHA, beta * LR, steps)
    assert found.known
    assert found.learned(Factors(alpha, beta), steps) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(weight.detach()) == 0


def test_an_accumulated_batch_holds_out_tasks_of_each_of_its_parts():
    goals = [[float(number) for number in range(first, first + 8)] for first in (0, 10)]
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    both = AccumulatedProblem(tuple(squares(weight, each) for each in goals))
    found = new_tasks([both], weight).learned(Factors(), 1)
    at = LR * (1 - ALPHA) ** 2 * (sum(goals[0][2:]) / 6 + sum(goals[1][2:]) / 6) / 2
    held = [0.0, 1.0, 10.0, 11.0]
    before, after = (sum(0.5 * ((1 - ALPHA) * (x - goal)) ** 2 for goal in held) / 4 for x in (0.0, at))
    assert found == pytest.approx(before - after, rel=1e-5)


def test_rates_that_diverge_have_learned_nothing():
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    found = new_tasks([squares(weight, [1.0] * 16)], weight)
    assert found.learned(Factors(1.0, 1e200), 30) == -math.inf
    assert found._lookahead.gradients < 5  # the steps after that are left out


def test_factors_on_the_outer_rate_are_relative_to_the_peak():
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    batches = [squares(weight, [1.0, 2.0] * 8)]
    risen = NewTasks(batches, lambda batches: Lookahead(batches, SGD([weight], lr=LR / 4), 1), Ranks(), peak=4.0)
    assert risen.learned(Factors(), 3) == pytest.approx(new_tasks(batches, weight).learned(Factors(), 3))


@pytest.mark.parametrize("sizes", [(15,), (3,), (16, 3)])
def test_few_tasks_are_not_split(sizes):
    weight = nn.Parameter(torch.zeros(()))
    assert not new_tasks([squares(weight, [1.0] * size) for size in sizes], weight).known


def test_plain_training_has_no_tasks():
    weight = nn.Parameter(torch.zeros(()))
    assert not new_tasks([PlainProblem({"w": weight}, lambda p: p["w"].square())] * 8, weight).known


class OfOthers(NewTasks):
    """What rates learn on new tasks, as told."""

    known, before = True, 1.0

    def __init__(self, learned):
        self._learned = learned

    def learned(self, factors, steps):
        return self._learned.get(factors, -1.0)


def judged(learned, anew, **arguments):
    """A search whose trials learn so much on their own tasks and on others, by the factors on the rates."""
    return scripted(learned, new_tasks=OfOthers(anew), **arguments)


@pytest.mark.parametrize("suspect", [True, False])
@given(memorised=st.floats(0.6, 1.0), learned=st.floats(-1.0, 1.0))
def test_an_inner_rate_whose_lowering_only_memorises_is_not_blamed(suspect, memorised, learned):
    own = {(0.5, 1.0): memorised, (1.0, 0.125): 0.5, (1.0, 0.25): 0.4, (1.0, 0.0625): 0.3}
    anew = {(0.5, 1.0): learned, (1.0, 0.125): 0.5}
    found = judged(own, anew, alpha_suspect=suspect).find()
    assert (found.best.factors.alpha < 1) == (learned > (0.5 if suspect else 1.1 * 0.5))


@given(memorised=st.floats(0.6, 1.0), learned=st.floats(-1.0, 1.0))
def test_a_run_that_trains_is_not_told_of_an_inner_rate_that_only_memorises_more(memorised, learned):
    own = {(1.0, 1.0): 0.5, (0.5, 1.0): memorised, (1.0, 0.25): 0.4}
    present, best = judged(own, {(1.0, 1.0): 0.5, (0.5, 1.0): learned}, alpha_suspect=True).probe()
    assert present.learned == 0.5 and best.learned == (memorised if learned > 0.6 else 0.5)


def test_rates_that_do_not_train_have_lost_whatever_they_do_on_new_tasks():
    found = judged({(0.5, 1.0): 0.6}, {}, alpha_suspect=True).find()
    assert found.best.factors == (0.5, 1.0)


def asked(own, anew, **arguments):
    """A search as told, the inner rates it tries on their own tasks, and those it compares on others."""
    found, seen = judged(own, anew, **arguments), ([], [])
    trial, learned = found.trial, found._new_tasks.learned

    def noted(alpha=1.0, beta=1.0, steps=None):
        seen[0].append(alpha)
        return trial(alpha, beta, steps)

    found.trial = noted
    found._new_tasks.learned = lambda factors, steps: (seen[1].append(factors.alpha), learned(factors, steps))[1]
    return found, *seen


MEMORISED = {(2.0**-k, 1.0): 0.6 + 0.01 * k for k in range(1, 9)}


@pytest.mark.parametrize(("anew", "lowest"), [((0.2, 0.1), 0.25), ((0.1, 0.2), 2.0**-8), ((0.6, 0.1), 2.0**-8)])
def test_inner_rates_that_memorise_more_the_lower_they_are_end_the_search_among_them(anew, lowest):
    """Unless a lower one learns more of new tasks, or one of them more than the best outer rate does: 0.5."""
    learned = {(1.0, 0.125): 0.5, **{(2.0**-k, 1.0): 0.3 for k in range(3, 9)}}
    learned |= {(0.5, 1.0): anew[0], (0.25, 1.0): anew[1]}
    found, own, _ = asked({(1.0, 0.125): 0.5, **MEMORISED}, learned, alpha_suspect=True)
    blamed = found.find().best.factors.alpha < 1
    assert min(own) == lowest and blamed == (anew[0] > 0.5)


def test_where_the_outer_rate_is_not_to_be_blamed_the_inner_ones_are_searched_to_the_end():
    found, own, anew = asked({(1.0, 0.125): 0.5, **MEMORISED}, {}, alpha_suspect=True)
    assert found.find(math.inf).best.factors.alpha == min(own) == 2.0**-8 and not anew


def test_an_inner_rate_that_begins_lower_is_tried_on_new_tasks_first():
    """On its own it would be found to end lower as well, which says nothing of others."""
    own = {(1.0, 1.0): 0.5, (0.5, 1.0): 0.9, (1.0, 0.25): 0.4}
    for begins, tried in ((0.5, False), (2.0, True)):
        found, ran, anew = asked(own, {(1.0, 1.0): 0.5, (0.5, 1.0): 0.5}, alpha_suspect=True)
        found.initial_losses = lambda alpha, begins=begins: (begins if alpha == 0.5 else 1.0,)
        present, best = found.probe()
        assert present is best or best.learned == 0.5
        assert (0.5 in ran) == tried and 0.5 in anew


def test_an_inner_rate_that_learns_less_on_its_own_tasks_is_not_tried_on_new_ones():
    found, ran, anew = asked({(1.0, 1.0): 0.5, (0.5, 1.0): 0.4, (1.0, 0.25): 0.4}, {}, alpha_suspect=True)
    found.probe()
    assert 0.5 in ran and not anew


BETA = {(1.0, 0.125): 0.5}


@pytest.mark.parametrize(("both", "ladder"), [(0.6, False), (0.7, True)])
def test_both_rates_are_lowered_only_where_a_lower_inner_rate_helps_beside_the_outer_rate_that_is_best_alone(
    both, ladder
):
    own = BETA | {(0.5, 0.125): 0.9, (0.5, 0.0625): 0.95}
    anew = {(1.0, 0.125): 0.5, (0.5, 0.125): both, (0.5, 0.0625): 0.8}
    found, ran, _ = asked(own, anew, alpha_suspect=True)
    assert (found.find().best.factors == (0.5, 0.0625)) == ladder


def test_where_the_first_of_both_lowered_rates_leaves_no_loss_it_stands_for_all_of_them():
    """None can learn more on its own tasks; if it learns less of others, the rest is not tried."""
    own = BETA | {(0.5, 0.125): 0.9, (0.5, 0.5): 0.999, (0.5, 0.25): 0.99}
    anew = {(1.0, 0.125): 0.5, (0.5, 0.125): 0.7, (0.5, 0.5): 0.1}
    found, _, _ = asked(own, anew, alpha_suspect=True)
    pairs, trial = [], found.trial
    found.trial = lambda *given: (pairs.append(given[:2]), trial(*given))[1]
    assert found.find().best.factors == (1.0, 0.125)
    assert (0.5, 0.5) in pairs and (0.5, 0.25) not in pairs
