"""How a module decides to run over its tasks: arguments, environment, trial, cache, checkpoint."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_maml_guard import EpisodeBatch, MetaLearningModule
from lightning_maml_guard.maml import choices, contest
from lightning_maml_guard.maml import meta_learning as learning
from lightning_maml_guard.maml import vectorization as strategy
from lightning_maml_guard.maml.vectorization import check_strategy, fastest, told
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.stability.hvp import MeasurementCache
from tests.helpers import fit

QUIET = {"a": torch.tensor([1.0, 2.0])}


@pytest.fixture
def untold(monkeypatch, tmp_path):
    """Nothing decides but the trial, and the cache is this test's."""
    monkeypatch.delenv("LMG_VECTORIZE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = []
    monkeypatch.setattr(learning, "inform", said.append)
    return said


def batch(tasks=5):
    return EpisodeBatch(*((torch.randn(tasks, 4, 1), torch.randn(tasks, 4, 1)) for _ in range(2)))


@pytest.mark.parametrize(
    ("vectorize", "size", "message"),
    [
        ("fast", None, "`vectorize` to be 'auto', 'loop', 'all' or a number of tasks but got 'fast'"),
        (0, None, "`vectorize` to be an integer of at least 1 but got 0"),
        (True, None, "`vectorize` to be an integer of at least 1 but got True"),
        (2.5, None, "`vectorize` to be an integer of at least 1 but got 2.5"),
        (None, None, "`vectorize` to be an integer of at least 1 but got None"),
        ("auto", 0, "`task_chunk_size` to be an integer of at least 1 but got 0"),
        ("loop", 4, "one of `vectorize` and `task_chunk_size` but got 'loop' and 4, which say different things"),
        (2, 4, "one of `vectorize` and `task_chunk_size` but got 2 and 4"),
    ],
)
def test_what_names_no_way_is_refused(vectorize, size, message):
    with pytest.raises(ValueError, match=message):
        check_strategy(vectorize, size)
    with pytest.raises(ValueError, match=message):
        MetaLearningModule(mlp(), vectorize=vectorize, task_chunk_size=size)


def test_a_chunk_size_is_a_number_for_vectorize():
    assert [check_strategy(*each) for each in (("auto", None), ("auto", 4), (4, 4), (3, None), ("all", None))] == [
        "auto",
        4,
        4,
        3,
        "all",
    ]
    for arguments in ({"task_chunk_size": 3}, {"vectorize": 3}):
        module = MetaLearningModule(mlp(), **arguments)
        assert (module.task_map.chunk_size, module.task_map.looped) == (3, False)
    assert MetaLearningModule(mlp(), vectorize="loop").task_map.looped
    whole = MetaLearningModule(conv4(filters=2), vectorize="all").task_map
    assert whole.chunk_size is None and not whole.looped


def test_the_rule_loops_over_convolutions_on_a_cpu():
    assert MetaLearningModule(conv4(filters=2)).task_map.looped and not MetaLearningModule(mlp()).task_map.looped


@pytest.mark.parametrize(
    ("value", "meaning"), [("", None), ("rule", "rule"), ("loop", "loop"), ("all", "all"), ("7", 7)]
)
def test_the_environment_is_understood(value, meaning, monkeypatch):
    monkeypatch.setenv("LMG_VECTORIZE", value)
    assert told() == meaning


@pytest.mark.parametrize("value", ["auto", "0", "-2", "2.5", "²", "Loop"])
def test_what_the_environment_must_not_say(value, monkeypatch):
    monkeypatch.setenv("LMG_VECTORIZE", value)
    with pytest.raises(
        ValueError, match=f"variable LMG_VECTORIZE to be 'rule', .* but got '{value}'. Correct or unset"
    ):
        told()


class Costs:
    """Gradients that take a told time by a told clock; a way's cost may also be an exception or another gradient."""

    def __init__(self, **costs):
        self.now, self.costs, self.runs = 0.0, costs, []

    def __call__(self, tasks):
        name = "loop" if tasks.looped else f"n{tasks.chunk_size}" if tasks.chunk_size else "all"
        assert tasks.strict
        self.runs.append(name)
        cost = self.costs.get(name, 0.01)
        if isinstance(cost, Exception):
            raise cost
        seconds, found = cost if isinstance(cost, tuple) else (cost, QUIET)
        self.now += seconds
        return found() if callable(found) else found

    def choose(self, tasks):
        return fastest(self, tasks, clock=lambda: self.now)


@pytest.mark.parametrize("best", ["loop", "all", "n2", "n4", "n8", "n16"])
def test_the_fastest_is_kept(best):
    """Times fall towards the best and rise behind it."""
    order = ["n2", "n4", "n8", "n16"]
    costs = {
        name: 0.02 + 0.01 * abs(order.index(name) - order.index(best if best in order else "n8")) for name in order
    }
    costs |= {"loop": 0.05, "all": 0.05, best: 0.005}
    found, seen = Costs(**costs).choose(20)
    assert found == (best if best in ("loop", "all") else int(best[1:]))
    assert f"{best.removeprefix('n')} 5 ms" in seen


def test_one_task_is_looped_over_and_no_chunk_is_as_large_as_the_batch():
    assert Costs().choose(1)[0] == "loop"
    one = Costs()
    one.choose(1)
    two, five = Costs(), Costs()
    two.choose(2), five.choose(5)
    assert (
        set(one.runs) == {"loop"} and set(two.runs) == {"loop", "all"} and set(five.runs) == {"loop", "all", "n2", "n4"}
    )


def test_another_gradient_is_dropped_however_fast():
    wrong = {"a": torch.tensor([1.0, 2.5])}
    found, seen = Costs(loop=0.1, all=(0.001, wrong), n4=(0.001, {"a": torch.tensor([float("nan")] * 2)})).choose(8)
    assert found == 2 and "all gives another gradient, 4 gives another gradient" in seen


@pytest.mark.parametrize("tasks", [2, 5, 9, 40])
def test_what_fails_is_dropped(tasks):
    failing = {name: RuntimeError("no") for name in ("all", "n2", "n4", "n8", "n16", "n32")}
    found, seen = Costs(**failing).choose(tasks)
    assert found == "loop" and "all fails (RuntimeError)" in seen
    failing.pop("n4")
    assert Costs(loop=0.1, **failing).choose(tasks)[0] == (4 if tasks > 4 else "loop")


def test_what_fails_in_the_loop_is_the_users_own():
    with pytest.raises(KeyError, match="mine"):
        Costs(loop=KeyError("mine")).choose(4)


def test_a_slow_batch_is_not_tried_to_the_end():
    slow = Costs(loop=6.0, all=9.0)
    found, seen = slow.choose(20)
    assert found == "loop" and slow.runs == ["loop", "loop", "all"]  # the second loop looks for randomness
    assert "8 not tried" in seen and "16 not tried" in seen


def test_a_way_that_is_slow_to_start_is_timed_once_more():
    costs = Costs(loop=0.01)
    first = iter([0.5])  # decompositions are loaded, memory is mapped
    original = costs.__call__

    def gradients(tasks):
        found = original(tasks)
        if not tasks.looped and tasks.chunk_size is None:
            costs.now += next(first, 0) - 0.005
        return found

    assert fastest(gradients, 2, clock=lambda: costs.now)[0] == "all"


def test_random_states_are_left_alone_and_dropout_is_not_compared():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def draws():
        random.random(), np.random.rand()
        return {"a": torch.randn(2)}

    found, seen = Costs(loop=(0.1, draws), all=(0.01, draws)).choose(2)
    assert found == "all" and "another" not in seen
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_a_fit_decides_once_says_so_once_and_remembers(untold, tmp_path, monkeypatch):
    module = MetaLearningModule(mlp())
    fit(module, batch(), 3)
    assert len(untold) == 1
    assert "the fastest of: loop" in untold[0] and "vectorize=" in untold[0]
    file = tmp_path / "cache" / "lightning_maml_guard" / "vectorize.json"
    ((key, found),) = json.loads(file.read_text()).items()
    assert module.vectorization.chosen == (key, found) and [p.name for p in file.parent.iterdir()] == ["vectorize.json"]
    monkeypatch.setattr(strategy, "fastest", lambda *args: pytest.fail("tried again"))
    fit(module, batch(), 1)
    fit(MetaLearningModule(mlp()), batch(), 1)  # another process would find it in the cache
    assert len(untold) == 1
    monkeypatch.setattr(strategy, "fastest", lambda *args: (2, "loop 9 ms"))
    fit(module, batch(4), 1)  # other shapes
    assert untold[1:] == ["MetaLearningModule runs 2 tasks at once, the fastest of: loop 9 ms. vectorize=2 fixes that."]
    assert json.loads(file.read_text())[key] == found and len(json.loads(file.read_text())) == 2


def test_the_trial_changes_nothing_but_the_time(untold, monkeypatch):
    """Weights and random numbers as with the way it found."""
    found = []
    for vectorize in ("auto", 2):
        torch.manual_seed(1)
        monkeypatch.setattr(contest, "_CHUNKS", (2,))
        monkeypatch.setattr(contest._Trial, "_best", lambda self: 2)
        network = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))
        module = MetaLearningModule(network, vectorize=vectorize)
        fit(module, batch(), 3)
        found.append([*module.state_dict().values(), torch.get_rng_state()])
    assert len(untold) == 1 and all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_given_way_is_not_tried(untold):
    for vectorize in ("loop", "all", 2):
        fit(MetaLearningModule(mlp(), vectorize=vectorize), batch(), 1)
    assert untold == []


@pytest.mark.parametrize(("value", "looped", "size"), [("loop", True, None), ("2", False, 2), ("rule", False, None)])
def test_what_the_environment_says_is_not_tried(untold, monkeypatch, value, looped, size):
    monkeypatch.setenv("LMG_VECTORIZE", value)
    module = MetaLearningModule(mlp())
    fit(module, batch(), 1)
    assert untold == [] and (module.task_map.looped, module.task_map.chunk_size) == (looped, size)


def test_deterministic_algorithms_take_the_rule(untold, monkeypatch):
    monkeypatch.setattr(strategy, "fastest", lambda *args: pytest.fail("tried"))
    module = MetaLearningModule(mlp())
    try:
        fit(module, batch(), 1, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert untold == [] and not module.task_map.looped


def test_the_choice_is_in_the_checkpoint_and_comes_back(untold, monkeypatch, tmp_path):
    monkeypatch.setattr(strategy, "fastest", lambda *args: (3, "all 1 ms"))
    module = MetaLearningModule(mlp())
    trainer = fit(module, batch(), 1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(strategy, "fastest", lambda *args: pytest.fail("tried"))
    loaded = MetaLearningModule.load_from_checkpoint(tmp_path / "a.ckpt", network=mlp())
    fit(loaded, batch(), 1)
    assert len(untold) == 1 and loaded.task_map.chunk_size == 3
    older = torch.load(tmp_path / "a.ckpt", weights_only=True)
    older.pop("vectorize")
    loaded.on_load_checkpoint(older)
    assert loaded.vectorization.chosen is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"all"',
        '{"key": []}',
        '{"key": {}}',
        '{"key": "fast"}',
        '{"key": true}',
        '{"key": 0}',
        '{"key": 1.5}',
        "\xff\xfe",
    ],
)
def test_a_damaged_cache_is_as_none(untold, tmp_path, text):
    file = tmp_path / "cache" / "lightning_maml_guard" / "vectorize.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("latin-1"))
    assert choices.remembered("key") is None
    choices.remember("key", 4)
    assert choices.remembered("key") == 4


def test_where_nothing_can_be_written_the_run_goes_on(untold, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    choices.remember("key", "loop")
    assert choices.remembered("key") is None
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    choices.remember("key", "loop")
    assert choices.remembered("key") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_left_alone(untold, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    choices.remember("key", "loop")
    assert choices.remembered("key") is None


def test_an_exchange_that_fails_leaves_nothing_lying_about(untold, tmp_path):
    (tmp_path / "cache" / "lightning_maml_guard" / "vectorize.json" / "full").mkdir(parents=True)
    choices.remember("key", "loop")
    assert [p.name for p in (tmp_path / "cache" / "lightning_maml_guard").iterdir()] == ["vectorize.json"]


def looped(cache):
    """What a checkpoint would say."""
    cache.note_the_map()
    return cache.facts.looped


def test_the_guards_map_follows_the_problem_and_remembers_what_vmap_cannot_do():
    cache = MeasurementCache()
    first = cache.map_for(None)
    assert cache.map_for(None) is first and not first.looped
    asked = cache.map_for(None, looped=True)
    assert asked.looped and not looped(cache)
    again = cache.map_for(4)
    assert (again.looped, again.chunk_size) == (False, 4)
    again.looped = True  # vmap failed
    assert cache.map_for(None).looped and looped(cache)
    cache.map_for(None, looped=True)
    assert cache.map_for(None).looped and looped(cache)  # known still, after being asked for
    restored = MeasurementCache(cache.facts)
    assert restored.map_for(2).looped
