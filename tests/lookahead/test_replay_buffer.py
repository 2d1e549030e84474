"""The batches that a lookahead goes through: whether every step has the same one."""

import pytest
import torch

from lightning_maml_guard.lookahead.replay_buffer import ReplayBuffer


def held(*batches):
    buffer = ReplayBuffer(4)
    for index, batch in enumerate(batches):
        buffer.add(batch, index)
        buffer.after_step()
    return buffer


def batch(value, size=3):
    return {"x": torch.full((size, 2), float(value)), "y": (torch.arange(size),)}


def test_one_batch_alone_does_not_repeat():
    assert not held().repeats and not held(batch(1)).repeats


def test_batches_repeat_whose_tensors_are_equal():
    same = batch(1)
    assert held(same, same).repeats and held(batch(1), batch(1)).repeats
    assert held(batch(0), batch(1), batch(1)).repeats


@pytest.mark.parametrize("other", [batch(2), batch(1, size=4), {"x": batch(1)["x"]}], ids=["value", "size", "fewer"])
def test_batches_that_differ_do_not(other):
    assert not held(batch(1), other).repeats and not held(batch(1), batch(1), other).repeats
