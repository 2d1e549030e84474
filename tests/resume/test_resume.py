import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_maml_guard import ConvergenceGuard
from lightning_maml_guard.lookahead.replay_buffer import ReplayBuffer
from tests.resume.program import CASES, STEPS, train

ROOT = Path(__file__).parents[2]


def told(guard: ConvergenceGuard):
    return repr([replace(report, seconds=0.0) for report in guard.history]), repr(guard.severities)


@pytest.mark.parametrize(
    "case", [case if case == "rescale" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_run_killed_twice_ends_as_if_it_had_not_been(tmp_path, case):
    whole, module = train(tmp_path / "whole", case)
    first, second = sorted(random.Random(case).sample(range(8, STEPS), 2))
    print(f"killed at steps {first} and {second}")
    for step in (first, second):
        command = [sys.executable, "-m", "tests.resume.program", tmp_path / "killed", case, step]
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    resumed, again = train(tmp_path / "killed", case)
    assert len(whole.history) >= STEPS // 10 and any(r.beta_applied < r.beta for r in whole.history)
    assert told(resumed) == told(whole)
    state = whole.state_dict()
    assert (state["rollbacks"] > 0) == (case == "rollback")
    for key in ("caps", "rollbacks", "schedule", "statistics", "watches", "announced"):
        assert repr(resumed.state_dict()[key]) == repr(state[key]), key
    for name, value in module.network.named_parameters():
        assert bool(torch.isfinite(value).all()) and torch.equal(value, again.network.get_parameter(name)), name


def test_checkpoints_of_an_older_guard_load():
    state = json.loads((Path(__file__).parent / "state_of_issue_2.json").read_text())
    guard = ConvergenceGuard(action="rescale")
    guard.load_state_dict(state)
    assert [report.step for report in guard.history] == [0, 5]
    assert guard.history[0].beta_c == pytest.approx(state["history"][0]["beta_c"])
    assert guard.state_dict()["caps"]["beta"] == state["beta_cap"]
    assert "beta = 20, 32 of beta_c = 0.625 (0.625 to 0.625); applied 0.625\n" in str(guard.history[0])
    empty = ConvergenceGuard()
    empty.load_state_dict({})
    assert empty.history == [] and empty.stopped_step is None


class Strange:
    pass


def test_batches_survive_as_tensors_and_come_back_as_the_batch_they_were():
    replay = ReplayBuffer(3)
    storage = torch.arange(1000.0)
    for index in range(4):
        replay.add({"x": storage[index : index + 2], "n": [index, "name", None]}, index)
    assert [index for _, index in replay.earlier()] == [2, 1]
    state = replay.state()
    assert all(leaf.untyped_storage().nbytes() == 8 for leaves, _ in state for leaf in leaves if torch.is_tensor(leaf))
    again = ReplayBuffer(3)
    again.load(state, [])
    assert repr(again.state()) == repr(state)  # a checkpoint before the first batch loses nothing
    again.add({"x": torch.zeros(2), "n": [9, "name", None]}, 4)
    (latest, first), (other, second) = again.earlier()
    assert (first, second) == (3, 2) and latest["n"] == [3, "name", None] and torch.equal(other["x"], storage[2:4])


def test_the_batch_of_a_spike_survives_too():
    replay = ReplayBuffer(2)
    for index in range(4):
        replay.add({"x": torch.full((2,), float(index))}, index)
        replay.note_loss(50.0, index, 1, spiked=index == 1, at_best=False)
    again = ReplayBuffer(2)
    again.load(replay.state(), replay.spike_state())
    assert again.spike is None and repr(again.spike_state()) == repr(replay.spike_state())
    again.add({"x": torch.zeros(2)}, 4)
    ((batch, index),) = again.spike.batches
    assert (again.spike.step, again.spike.loss, index) == (1, 50.0, 1) and torch.equal(batch["x"], torch.ones(2))
    other = ReplayBuffer(2)  # of another kind than the batches to come
    other.load([], replay.spike_state())
    other.add([torch.zeros(2), torch.zeros(2)], 4)
    assert other.spike is None and other.spike_state() == []


def test_batches_of_another_kind_are_left_out():
    replay = ReplayBuffer(3)
    replay.add(Strange(), 0)
    replay.add((torch.ones(1), np.float64(1)), 2)  # a float that weights_only refuses
    replay.add(torch.ones(1), 1)
    assert [index for _, index in replay.state()] == [1]
    again = ReplayBuffer(3)
    again.load(replay.state(), replay.spike_state())
    again.add((torch.ones(1), torch.ones(1)), 2)
    assert again.earlier() == []


@pytest.mark.parametrize(("action", "kept"), [("log", 0), ("warn", 0), ("rescale", 1), ("stop", 1)])
def test_only_a_guard_that_acts_puts_batches_into_a_checkpoint(action, kept):
    guard = ConvergenceGuard(action=action)
    guard._run.replay.add(torch.ones(1), 0)
    assert len(guard.state_dict()["batches"]) == kept
