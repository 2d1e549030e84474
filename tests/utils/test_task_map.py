"""Sets of tasks are joined and chosen from task by task, as in a plain loop over them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.utils.task_map import TaskList, chosen_tasks, each_task, is_listed, joined_tasks


def tensors(count, start=0.0, width=2):
    """A set of tasks ``start``, ``start + 1``, ..., each named by its numbers."""
    x = torch.arange(count) + start
    return {"x": x.reshape(-1, 1, 1).expand(-1, 3, width).clone(), "y": (10 * x,)}


def listed(sizes, start=0.0):
    return TaskList([(torch.full((size, 2), start + index),) for index, size in enumerate(sizes)])


def same(one, other):
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return type(one) is type(other) and all(torch.equal(left, right) for left, right in pairs)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_joined_sets_hold_the_tasks_of_each_in_their_order(counts):
    for sets in (
        [tensors(n, 100 * i) for i, n in enumerate(counts)],
        [listed([n, 3], i) for i, n in enumerate(counts)],
    ):
        joined = joined_tasks(sets)
        expected = [task for each in sets for task in each_task(each)]
        assert len(each_task(joined)) == len(expected)
        assert all(same(*pair) for pair in zip(each_task(joined), expected, strict=True))
        assert is_listed(joined) == is_listed(sets[0])


@pytest.mark.parametrize(
    "other",
    [
        tensors(2, width=3),
        {"x": torch.zeros(2, 3, 2)},
        {"a": torch.zeros(2, 3, 2), "b": (torch.zeros(2),)},  # as many tensors, under other names
        (torch.zeros(2, 3, 2), (torch.zeros(2),)),
        listed([3, 3]),
    ],
    ids=["shape", "fewer", "names", "container", "listed"],
)
def test_sets_that_are_not_alike_are_not_joined(other):
    assert joined_tasks([tensors(2), other]) is None and joined_tasks([other, tensors(2)]) is None
    assert joined_tasks([tensors(2), tensors(5)]) is not None


@given(
    st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), min_size=1, max_size=7)))
)
def test_chosen_tasks_are_those_of_the_indices_as_often_as_they_are_named(drawn):
    count, chosen = drawn
    for data in (tensors(count), listed([2 + n for n in range(count)])):
        tasks, found = each_task(data), chosen_tasks(data, chosen)
        assert len(each_task(found)) == len(chosen) and is_listed(found) == is_listed(data)
        assert all(same(task, tasks[index]) for task, index in zip(each_task(found), chosen, strict=True))


def test_neither_changes_the_sets_it_is_given():
    one, other = listed([2, 3]), tensors(2)
    kept = [len(one), other["x"].clone()]
    joined_tasks([one, one]), chosen_tasks(one, [0, 0, 0])
    chosen_tasks(other, [1])["x"].fill_(-1.0)
    joined_tasks([other, other])["x"].fill_(-1.0)
    assert len(one) == kept[0] and torch.equal(other["x"], kept[1])
