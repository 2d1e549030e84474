"""A training step that changes its batch trains and is judged as one that does not."""

import threading
import warnings
from dataclasses import replace

import pytest
import torch

from lightning_maml_guard import ConvergenceGuard, GuardWarning, LookaheadOptions
from lightning_maml_guard.lookahead.replay_buffer import ReplayBuffer
from lightning_maml_guard.utils.lightning_compat import Trainer, seed_everything
from tests.guard.changing import BATCHES, MAKE, SCALE, Changing, loader, problem, taken
from tests.helpers import QUIET, one_line


def untouched(kind, batch):
    """The same numbers, and the batch stays as it was."""
    if kind in ("graph", "dataclass"):
        return batch.x / SCALE, batch.y
    return batch["x"] / SCALE, batch["y"]


def trained(module, guards, kind, steps=9):
    seed_everything(0, verbose=False)
    with torch.random.fork_rng():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(max_steps=steps, callbacks=guards, **QUIET)
    trainer.fit(module, loader(kind, steps))
    return module.losses


def watching(**options):
    return ConvergenceGuard(every_n_steps=2, action="log", lookahead=LookaheadOptions(steps=3, batches=3), **options)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_training_and_verdicts_are_those_of_a_step_that_leaves_its_batch_alone(kind, manual):
    options = {"problem": problem} if manual else {}
    found, plain = [], trained(Changing(kind, manual=manual), [], kind)
    for take in (taken, untouched):
        guard, module = watching(**options), Changing(kind, manual=manual, take=take)
        with warnings.catch_warnings():
            warnings.simplefilter("error", GuardWarning)
            losses = trained(module, [guard], kind)
        found.append(([replace(each, seconds=0.0) for each in guard.history], guard.severities, losses))
    assert repr(found[0]) == repr(found[1]) and len(found[0][0]) == 5 and found[0][2] == plain
    weights = []
    for guards in ([], [watching(**options)]):
        module = Changing(kind, manual=manual)
        trained(module, guards, kind)
        weights.append(torch.cat([each.detach().flatten() for each in module.parameters()]))
    assert torch.equal(*weights)


def held(buffer):
    return [float(batch["x"].sum()) for batch, _ in buffer.earlier()]


def test_what_is_kept_for_replay_is_what_the_step_was_given():
    buffer = ReplayBuffer(4)
    given = [{"x": torch.full((3,), float(k))} for k in range(1, 6)]
    for index, batch in enumerate(given):
        buffer.add(batch, index)
        if index != 1:  # one step leaves its batch alone
            batch["x"].mul_(100.0)
        buffer.after_step()
    buffer.add({"x": torch.zeros(3)}, 5)
    assert held(buffer) == [15.0, 12.0, 9.0]


def test_a_step_that_is_first_seen_later_costs_one_batch_and_no_copy_before():
    buffer = ReplayBuffer(8)
    given = [{"x": torch.full((3,), float(k))} for k in range(1, 6)]
    kept = []
    for index, batch in enumerate(given):
        buffer.add(batch, index)
        kept.append(buffer.latest()[0])
        if index >= 2:
            batch["x"] = batch["x"] * 100.0
        buffer.after_step()
    assert [one is other for one, other in zip(kept, given, strict=True)] == [False, True, True, False, False]
    buffer.add({"x": torch.zeros(3)}, 5)
    assert held(buffer) == [15.0, 12.0, 6.0, 3.0]


def test_a_write_that_torch_does_not_count_is_seen_at_the_first_step():
    buffer = ReplayBuffer(2)
    for index in range(2):
        batch = {"x": torch.ones(3)}
        buffer.add(batch, index)
        batch["x"].data.mul_(2.0)
        buffer.after_step()
    assert float(buffer.latest()[0]["x"].sum()) == 3.0


def test_a_batch_that_cannot_be_copied_is_not_checked_and_that_is_said_once():
    def locked(kind, batch):
        return batch[0]["x"] / SCALE, batch[0]["y"]

    def run(guards):
        module = Changing("dict", take=locked)
        lock = threading.Lock()
        seed_everything(0, verbose=False)
        data = [(MAKE["dict"](torch.ones(4, 4), torch.zeros(4, 1)), lock) for _ in range(6)]
        trainer = Trainer(max_steps=6, callbacks=guards, **QUIET)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None, collate_fn=lambda each: each))
        return module.losses, trainer

    guard = watching()
    with pytest.warns(GuardWarning) as caught:
        losses, trainer = run([guard])
    said = [one_line(each.message) for each in caught if each.category is GuardWarning]
    assert len(said) == 1 and "the batch at step 0 cannot be copied (lock), so it is not checked" in said[0]
    torch.manual_seed(0)
    assert trainer.global_step == 6 and guard.history == [] and losses == run([])[0]
