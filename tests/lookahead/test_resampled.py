"""Batches drawn from the tasks at hand: each drawn task is one of the given ones, support and query together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_maml_guard import MetaProblem
from lightning_maml_guard.lookahead.resampled import resampled
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem
from lightning_maml_guard.utils.task_map import each_task

PARAMS = {"w": torch.ones(1)}


def loss(params, data):
    return (params["w"] * data[0]).square().mean()


def stacked(first, count, shots=2, **arguments):
    """Tasks ``first``, ``first + 1``, ...: the support holds the number, the query ten times the number."""
    number = (torch.arange(count) + float(first)).reshape(-1, 1).expand(-1, shots)
    return MetaProblem(PARAMS, loss, (number,), (10 * number,), 0.1, **arguments)


def ragged(first, sizes):
    number = [torch.full((size,), float(first + index)) for index, size in enumerate(sizes)]
    return MetaProblem(PARAMS, loss, [(x,) for x in number], [(10 * x[:1],) for x in number], 0.1)


def numbers(problem):
    """Which tasks a problem holds; the query of each is the one of its support."""
    support, query = each_task(problem.support), each_task(problem.query)
    found = [int(x[0][0]) for x in support]
    assert [int(x[0][0]) for x in query] == [10 * each for each in found]
    return found


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 12), st.booleans())
def test_drawn_tasks_are_tasks_of_the_given_batches_and_each_batch_is_as_large_as_one_given(counts, count, lists):
    make = (lambda first, n: ragged(first, range(2, 2 + n))) if lists else stacked
    given_ = [make(100 * index, n) for index, n in enumerate(counts)]
    known = {number for each in given_ for number in numbers(each)}
    found = resampled(given_, count)
    # Those given come first, as they are; nothing is dropped.
    assert all(one is other for one, other in zip(found, given_, strict=False))
    if len(known) < 2:
        assert len(found) == len(given_)
        return
    assert len(found) == max(count, len(given_))
    for index, each in enumerate(found[len(given_) :]):
        assert set(numbers(each)) <= known
        assert each.tasks == counts[index % len(counts)] and each.listed == lists


def test_tasks_are_drawn_from_all_batches_and_with_replacement():
    given_ = [stacked(0, 3), stacked(100, 3)]
    drawn = [numbers(each) for each in resampled(given_, 42)[2:]]
    assert {number for each in drawn for number in each} == {0, 1, 2, 100, 101, 102}
    assert any(len(set(each)) < 3 for each in drawn) and len({tuple(each) for each in drawn}) > 30


def test_it_draws_the_same_twice_and_leaves_the_random_numbers_alone():
    given_, state = [stacked(0, 4), stacked(100, 2)], torch.get_rng_state()
    once, again = ([numbers(each) for each in resampled(given_, 9)] for _ in range(2))
    assert once == again and torch.equal(state, torch.get_rng_state())


def test_a_drawn_batch_is_configured_as_the_batch_it_is_like():
    given_ = [stacked(0, 3, inner_steps=4, order="first", task_chunk_size=2), stacked(50, 3)]
    drawn = resampled(given_, 6)[2:]
    for each, like in zip(drawn, given_ * 2, strict=True):
        assert (each.inner_steps, each.order, each.task_chunk_size, each.alpha) == (
            like.inner_steps,
            like.order,
            like.task_chunk_size,
            like.alpha,
        )
        assert each.params is like.params or each.params == like.params


def test_of_accumulated_batches_each_part_is_drawn():
    given_ = [AccumulatedProblem((stacked(0, 2), stacked(10, 3))), AccumulatedProblem((stacked(20, 2), stacked(30, 3)))]
    found = resampled(given_, 20)
    assert len(found) == 20 and found[:2] == given_
    seen = set()
    for each in found[2:]:
        assert isinstance(each, AccumulatedProblem) and [part.tasks for part in each.parts] == [2, 3]
        seen |= {number for part in each.parts for number in numbers(part)}
    assert seen == {0, 1, 10, 11, 12, 20, 21, 30, 31, 32}


def test_tasks_of_other_shapes_are_drawn_from_their_own_batch():
    given_ = [stacked(0, 3, shots=2), stacked(100, 3, shots=5)]
    drawn = resampled(given_, 10)[2:]
    for index, each in enumerate(drawn):
        assert each.support[0].shape == (3, (2, 5)[index % 2])
        assert {number // 100 for number in numbers(each)} == {index % 2}


@pytest.mark.parametrize("count", [1, 8])
def test_where_there_is_nothing_to_draw_from_problems_stay_as_they_are(count):
    plain = [PlainProblem(PARAMS, lambda params: params["w"].sum()) for _ in range(3)]
    assert resampled(plain, count) == plain
    single = [stacked(7, 1)]
    assert resampled(single, count) == single


def test_one_batch_of_a_single_task_each_is_enough_to_draw_from():
    found = resampled([stacked(0, 1), stacked(1, 1)], 12)
    assert len(found) == 12 and {numbers(each)[0] for each in found[2:]} == {0, 1}
