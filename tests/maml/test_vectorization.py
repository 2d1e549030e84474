"""How a module runs over its tasks: arguments, environment, the rule, and the guard's own map."""

import pytest
import torch
from torch import nn

from lightning_maml_guard import EpisodeBatch, MetaLearningModule
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.maml.vectorization import check_strategy, from_environment, rule
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.stability.hvp import MeasurementCache
from tests.helpers import fit


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


def test_the_rule_loops_on_a_cpu_if_a_layer_is_large():
    cpu, small, large = torch.device("cpu"), mlp(), mlp(1, (640, 640))
    assert (rule(small, cpu), rule(large, cpu)) == ("all", "loop")
    assert rule(conv4(), cpu) == "all"
    assert rule(large, torch.device("cuda")) == "all"
    assert MetaLearningModule(large).task_map.looped and not MetaLearningModule(small).task_map.looped
    large[2].requires_grad_(False)
    assert rule(large, cpu) == "all"  # only what trains counts


@pytest.mark.parametrize(("value", "meaning"), [("", None), ("rule", None), ("loop", "loop"), ("all", "all"), ("7", 7)])
def test_the_environment_is_understood(value, meaning, monkeypatch):
    monkeypatch.setenv("LMG_VECTORIZE", value)
    assert from_environment() == meaning


@pytest.mark.parametrize("value", ["auto", "0", "-2", "2.5", "²", "Loop"])
def test_what_the_environment_must_not_say(value, monkeypatch):
    monkeypatch.setenv("LMG_VECTORIZE", value)
    with pytest.raises(
        ValueError, match=f"variable LMG_VECTORIZE to be 'rule', .* but got '{value}'. Correct or unset"
    ):
        from_environment()


def test_a_given_strategy_stays_whatever_the_network_and_the_environment(monkeypatch):
    monkeypatch.setenv("LMG_VECTORIZE", "3")
    for vectorize, expected in (("loop", (True, None)), ("all", (False, None)), (2, (False, 2)), ("auto", (False, 3))):
        module = MetaLearningModule(mlp(), vectorize=vectorize)
        fit(module, batch(), 1)
        assert (module.task_map.looped, module.task_map.chunk_size) == expected


@pytest.mark.parametrize(("value", "looped", "size"), [("loop", True, None), ("2", False, 2), ("rule", False, None)])
def test_the_environment_decides_for_auto(monkeypatch, value, looped, size):
    monkeypatch.setenv("LMG_VECTORIZE", value)
    module = MetaLearningModule(mlp())
    fit(module, batch(), 1)
    assert (module.task_map.looped, module.task_map.chunk_size) == (looped, size)


def test_a_fit_chooses_anew_and_keeps_a_map_whose_vmap_failed(monkeypatch):
    monkeypatch.setenv("LMG_VECTORIZE", "all")
    module = MetaLearningModule(mlp())
    module.task_map.looped = True  # vmap failed
    fit(module, batch(), 1)
    assert module.task_map.looped
    monkeypatch.setenv("LMG_VECTORIZE", "2")
    fit(module, batch(), 1)
    assert (module.task_map.looped, module.task_map.chunk_size) == (False, 2)


def test_a_checkpoint_that_holds_a_choice_of_an_older_version_loads(tmp_path):
    module = MetaLearningModule(mlp())
    fit(module, batch(), 1).save_checkpoint(tmp_path / "a.ckpt")
    older = torch.load(tmp_path / "a.ckpt", weights_only=True)
    older["vectorize"] = ("5f3c", 3)
    torch.save(older, tmp_path / "older.ckpt")
    loaded = MetaLearningModule.load_from_checkpoint(tmp_path / "older.ckpt", network=mlp())
    assert not loaded.task_map.looped and loaded.task_map.chunk_size is None
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), module.parameters(), strict=True))


def test_the_guards_map_follows_the_problem_and_remembers_what_vmap_cannot_do():
    def known(cache):
        cache.remember_looping()
        return cache.facts.looped

    cache = MeasurementCache()
    first = cache.map_for(None)
    assert cache.map_for(None) is first and not first.looped
    asked = cache.map_for(None, looped=True)
    assert asked.looped and not known(cache)
    again = cache.map_for(4)
    assert (again.looped, again.chunk_size) == (False, 4)
    again.looped = True  # vmap failed
    assert cache.map_for(None).looped and known(cache)
    cache.map_for(None, looped=True)
    assert cache.map_for(None).looped and known(cache)  # known still, after being asked for
    assert MeasurementCache(facts=cache.facts).map_for(2).looped


def images(tasks, count=5, size=28):
    generator = torch.Generator().manual_seed(0)
    sets = [
        (torch.randn(tasks, count, 1, size, size, generator=generator), torch.arange(count).expand(tasks, -1))
        for _ in range(2)
    ]
    return EpisodeBatch(*sets)


def test_a_cpu_runs_as_many_tasks_at_once_as_keep_64_mib_and_all_of_a_small_network(monkeypatch):
    monkeypatch.delenv("LMG_VECTORIZE", raising=False)
    batch = images(24)
    torch.manual_seed(0)
    module = MetaLearningModule(conv4(), inner_lr=0.1)
    problem = module.meta_problem(batch)
    assert problem.task_chunk_size == module.task_map.chunk_size
    assert 6 <= problem.task_chunk_size <= 12
    assert module.meta_problem(images(4)).task_chunk_size == problem.task_chunk_size, (
        "only the first batch is looked at"
    )
    whole = MetaLearningModule(conv4(filters=2), inner_lr=0.1)
    assert whole.meta_problem(batch).task_chunk_size is None

    asked = MetaLearningModule(module.network, inner_lr=0.1, vectorize="all")
    expected = asked.meta_problem(batch)
    assert expected.task_chunk_size is None
    found, of_all = (
        meta_gradient(each, tasks=owner.task_map).gradients for each, owner in ((problem, module), (expected, asked))
    )
    for name, value in of_all.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_looking_at_the_first_batch_leaves_randomness_and_an_error_of_it_is_the_users(monkeypatch):
    monkeypatch.delenv("LMG_VECTORIZE", raising=False)
    module = MetaLearningModule(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 5)), inner_lr=0.1)
    before = torch.get_rng_state()
    module.meta_problem(images(2))
    assert torch.equal(torch.get_rng_state(), before)
    module = MetaLearningModule(nn.Sequential(nn.Flatten(), nn.Linear(7, 5)), inner_lr=0.1)
    problem = module.meta_problem(images(2))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        meta_gradient(problem)
