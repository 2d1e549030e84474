"""The batches that a lookahead goes through: whether every step has the same one."""

import pytest
import torch

from lightning_maml_guard.lookahead.replay_buffer import _EFFECT_SHOWS_AFTER, ReplayBuffer


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


def test_the_batch_of_the_highest_loss_is_held_until_the_run_is_at_its_best_again():
    buffer = ReplayBuffer(2)
    for step, (loss, spiked, at_best) in enumerate(
        [(1.0, False, False), (50.0, True, False), (9.0, True, False), (1.1, False, False), (1.0, False, False)]
    ):
        buffer.add(batch(loss), step)
        buffer.note_loss(loss, step, 1, spiked=spiked, at_best=at_best)
        buffer.after_step()
    # It has left the buffer for long.
    assert (buffer.spike.step, buffer.spike.loss, len(buffer)) == (1, 50.0, 2)
    ((held_batch, index),) = buffer.spike.batches
    assert index == 1 and torch.equal(held_batch["x"], batch(50.0)["x"])
    buffer.note_loss(60.0, 5, 2, spiked=True, at_best=False)
    assert [index for _, index in buffer.spike.batches] == [4, 3]  # all that the step accumulated
    buffer.note_loss(0.9, 5 + _EFFECT_SHOWS_AFTER - 1, 1, spiked=False, at_best=True)
    assert buffer.spike.step == 5  # what it did may not have shown yet
    buffer.note_loss(0.9, 5 + _EFFECT_SHOWS_AFTER, 1, spiked=False, at_best=True)
    assert buffer.spike is None


def test_a_batch_that_its_step_changed_is_not_held():
    buffer = held(batch(1), batch(2))
    changed = batch(3)
    buffer.add(changed, 2)
    changed["x"] += 1.0
    buffer.note_loss(50.0, 2, 1, spiked=True, at_best=False)
    buffer.after_step()
    assert buffer.spike is None


def test_the_batches_are_dropped_with_the_others():
    buffer = held(batch(1))
    buffer.note_loss(50.0, 0, 1, spiked=True, at_best=False)
    buffer.clear()
    assert buffer.spike is None and len(buffer) == 0


def test_where_no_batch_could_be_kept_none_is_held():
    buffer = ReplayBuffer(2)
    buffer.note_loss(50.0, 0, 1, spiked=True, at_best=False)
    assert buffer.spike is None
