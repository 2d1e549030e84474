"""A few snapshots of a run: when they are taken, how old they are, and in whose memory."""

import pytest
import torch
from torch import nn
from torch.optim import Adam

from lightning_maml_guard.optim import snapshot as file
from lightning_maml_guard.optim.snapshot import Snapshot, SnapshotRing


def trained(steps):
    """A module and Adam after some steps: the parameter is the number of steps."""
    module = nn.Linear(1, 1, bias=False)
    optimizer = Adam(module.parameters(), lr=0.0)
    for _ in range(steps):
        module(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        module.weight.fill_(float(steps))
    return module, optimizer


def test_the_ages_are_geometric_and_the_youngest_is_a_few_percent_of_the_run():
    module, optimizer = trained(0)
    ring = SnapshotRing()
    ring.keep(module, [optimizer], 0)
    for step in range(1, 1001):
        if ring.is_due(step):
            ring.keep(module, [optimizer], step)
        assert step - ring.latest.step <= max(4, 0.02 * step)
        assert ring.kept[0].step == 0 and len(ring.kept) <= 5
    ages = [1000 - each.step for each in ring.kept]
    assert ages == sorted(ages, reverse=True) and ages[-2] <= 100 and ages[1] >= 100


def test_memory_is_used_again_and_holds_the_new_state():
    module, optimizer = trained(3)
    ring = SnapshotRing()
    for step in range(9):
        with torch.no_grad():
            module.weight.fill_(float(step))
        ring.keep(module, [optimizer], 10 * step)
    assert len(ring.kept) == 5 and ring.latest.step == 80
    kept = {each.step: float(each.state()["tensors"][0]) for each in ring.kept}
    assert kept == {step: step / 10 for step in kept}
    with torch.no_grad():
        module.weight.fill_(-1.0)
    ring.latest.restore(module, [optimizer])
    assert float(module.weight) == 8.0


def test_a_snapshot_is_renewed_in_place_only_where_the_state_is_of_the_same_kind():
    module, optimizer = trained(0)
    before = Snapshot(module, [optimizer], 0)
    module, optimizer = trained(2)
    assert not before.renew(module, [optimizer], 2) and before.step == 0  # Adam has a state now
    like = Snapshot(module, [optimizer], 2)
    memory = [each.data_ptr() for each in like.state()["tensors"]]
    module(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert like.renew(module, [optimizer], 3) and like.step == 3
    assert [each.data_ptr() for each in like.state()["tensors"]] == memory
    assert float(like.state()["states"][0][0]["step"]) == 3


def test_copies_that_take_much_memory_are_two_and_rarer(monkeypatch):
    monkeypatch.setattr(file, "_BYTES", 10)
    module, optimizer = trained(1)
    ring = SnapshotRing()
    for step in (0, 4, 8, 12):
        ring.keep(module, [optimizer], step)
    assert [each.step for each in ring.kept] == [0, 12]
    assert not ring.is_due(43) and ring.is_due(44)


def test_the_state_of_one_step_is_kept_once_and_later_ones_are_dropped():
    module, optimizer = trained(1)
    ring = SnapshotRing()
    for step in (0, 5, 5, 9):
        ring.keep(module, [optimizer], step, wasted=2 if step == 9 else 0)
    assert [each.step for each in ring.kept] == [0, 5, 9] and ring.latest.progress == 7
    ring.drop_after(5)
    assert ring.latest.step == 5 and ring.latest.progress == 5


@pytest.mark.parametrize("step", [3, 103])
def test_the_youngest_may_be_some_steps_old(step):
    module, optimizer = trained(1)
    ring = SnapshotRing()
    assert not ring.is_due(100)
    ring.keep(module, [optimizer], step - 3)
    assert not ring.is_due(step) and ring.is_due(step + 1)


def test_the_youngest_at_which_a_test_passes_is_found_and_else_the_oldest():
    module, optimizer = trained(9)
    ring = SnapshotRing()
    visited = lambda snapshot: snapshot.visited(module, [optimizer])  # noqa: E731
    assert ring.latest_that(lambda: True, visited) is None and ring.oldest is None
    for step in (0, 4, 8):
        with torch.no_grad():
            module.weight.fill_(float(step))
        ring.keep(module, [optimizer], step)
    with torch.no_grad():
        module.weight.fill_(9.0)
    for most, at in ((8.0, 8), (7.0, 4), (-1.0, 0)):
        assert ring.latest_that(lambda most=most: module.weight.item() <= most, visited).step == at
    assert module.weight.item() == 9.0 and ring.oldest.step == 0
