import itertools
import random
import threading
from collections import Counter, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_maml_guard.utils.isolation import OwnIteratorError, isolated
from lightning_maml_guard.utils.random_state import preserved_randomness


class Probe(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
        self.register_buffer("memory", torch.zeros(2))
        self.register_buffer("empty", None)
        self.logged = []

    def log(self, *args):
        self.logged.append(args)

    def log_dict(self, *args):
        self.logged.append(args)


def disturb(module):
    module.train()
    module.inner[1].eval()
    module.inner(torch.randn(4, 2)).sum().backward()
    module.memory += 1
    module.memory = module.memory * 2  # a new tensor under the old name
    module.log("loss", 1.0)
    module.log_dict({"loss": 1.0})
    random.random(), np.random.rand(), torch.rand(3)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_measurement_remains(fails):
    module = Probe().eval()
    module.inner[2].train()
    module.inner[0].weight.grad = torch.ones(2, 2)
    gradient = module.inner[0].weight.grad
    memory = module.memory
    before = {
        "modes": [part.training for part in module.modules()],
        "buffers": {n: b.clone() for n, b in module.named_buffers()},
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),
        "torch": torch.get_rng_state(),
    }
    try:
        with isolated(module):
            assert module.inner[0].weight.grad is None
            disturb(module)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [part.training for part in module.modules()] == before["modes"]
    assert module.memory is memory
    assert all(torch.equal(b, before["buffers"][n]) for n, b in module.named_buffers())
    assert module.inner[0].weight.grad is gradient and torch.equal(gradient, torch.ones(2, 2))
    assert module.inner[0].bias.grad is None
    assert module.logged == []
    module.log("after", 1.0)
    assert module.logged == [("after", 1.0)]
    assert random.getstate() == before["python"]
    assert np.array_equal(np.random.get_state()[1], before["numpy"])
    assert torch.equal(torch.get_rng_state(), before["torch"])


def test_randomness_is_put_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ValueError), preserved_randomness():
        torch.rand(5)
        raise ValueError
    assert torch.equal(torch.get_rng_state(), state)


def states(module):
    return (
        module.generator.get_state().tolist(),
        str(module.numpy.bit_generator.state),
        str(module.older.get_state(legacy=False)),
        module.python.getstate(),
        str(module.kept),
    )


def test_generators_and_nested_containers_of_a_module_are_put_back():
    """An augmentation draws from a generator of its own, a step appends to a list in a dict."""
    module = Probe()
    module.generator, module.python = torch.Generator().manual_seed(1), random.Random(1)
    module.numpy, module.older = np.random.default_rng(1), np.random.RandomState(1)
    module.kept = {"losses": [1.0], "last": deque([1, 2], maxlen=2), "seen": [{1}, Counter("ab")]}
    module.kept["self"] = module.kept
    module.kept["rng"] = [np.random.default_rng(2)]
    inner, before, drawn = module.kept["losses"], states(module), str(module.kept["rng"][0].bit_generator.state)
    with isolated(module):
        torch.rand(3, generator=module.generator), module.python.random()
        module.numpy.random(), module.older.rand(), module.kept["rng"][0].random()
        module.kept["losses"].append(2.0)
        module.kept["last"].append(3)
        module.kept["seen"][0].add(2)
        module.kept["seen"][1].update("b")
        module.kept["new"] = 1
        assert all(now != then for now, then in zip(states(module), before, strict=True))
    assert states(module) == before and module.kept["losses"] is inner
    assert str(module.kept["rng"][0].bit_generator.state) == drawn


def test_what_nothing_wrote_into_stays_usable_for_a_graph_that_holds_it():
    """Manual optimisation may go backward after several batches."""
    module = Probe()
    module.hidden = torch.ones(2)
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * module.memory * module.hidden + module.inner[1].eval()(torch.ones(4, 2))).sum()
    with isolated(module):
        pass
    loss.backward()


def test_parts_log_nothing_either():
    logged = []

    class Part(nn.Module):
        def log(self, *args):
            logged.append(args)

        log_dict = log

    whole = nn.Sequential(Part())
    with isolated(whole):
        whole[0].log("loss", 1.0)
    whole[0].log("after", 1.0)
    assert logged == [("after", 1.0)]


def test_running_statistics_are_put_back_though_batch_norm_does_not_count_as_writing():
    norm = nn.BatchNorm1d(2)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    with isolated(norm):
        version = norm.running_mean._version
        norm(torch.randn(4, 2))
        assert norm.running_mean._version == version and not torch.equal(norm.running_mean, before["running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())


def test_a_layer_named_log_is_no_logging():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.log = nn.Softplus()

        def forward(self, x):
            return self.log(x)

    net = Net()
    with isolated(net):
        assert net(torch.zeros(1)) is not None and net.log is net._modules["log"]


class Meter:
    """A running mean as users write it."""

    def __init__(self):
        self.steps, self.total, self.seen = 0, torch.zeros(()), {"losses": []}
        self.hidden, self.me = [nn.BatchNorm1d(2)], self

    def take(self, value):
        self.steps += 1
        self.total += value
        self.seen["losses"].append(value)
        self.hidden[0].running_mean += 1
        self.hidden[0].eval()
        self.new = 1


def test_objects_arrays_and_tensors_in_containers_are_put_back():
    """A mean in an object of the user's, a moving average in a dict, counts in an array, a module in a list."""
    module = Probe()
    module.meter, module.averages, module.counts = Meter(), {"mean": torch.zeros(2)}, np.zeros(2)
    module.take, module.also = module.meter.take, (module.averages,)
    meter, mean = module.meter, module.averages["mean"]
    with isolated(module):
        module.take(1.0)
        mean.lerp_(torch.ones(2), 0.5)
        module.counts[0] += 1
    assert (meter.steps, float(meter.total), meter.seen["losses"]) == (0, 0.0, []) and not hasattr(meter, "new")
    assert meter.hidden[0].training and not meter.hidden[0].running_mean.any()
    assert module.meter is meter and module.averages["mean"] is mean and not mean.any() and not module.counts.any()


def test_an_object_that_holds_what_cannot_be_put_back_is_left_as_a_whole(tmp_path):
    """A simulator whose step count went back, but not its state, would be wrong; a container beside it is put back."""
    module, around = Probe(), Meter()
    around.lock, around.list = threading.Lock(), []
    module.around, module.list = around, around.list
    with (tmp_path / "log").open("w") as file:
        module.file = file
        with isolated(module):
            around.take(1.0)
            module.list.append(1)
            assert module.file is file
    assert around.steps == 1 and module.list == []


def test_large_containers_of_tensors_are_left_to_the_users_code():
    module = Probe()
    module.bank = [torch.zeros(2**24) for _ in range(2)]
    with isolated(module):
        for each in module.bank:
            each[0] = 1
        module.bank.append(None)
    assert [float(each[0]) for each in module.bank] == [0.0, 1.0]


def test_a_container_of_very_many_values_is_put_back_without_looking_into_them():
    module = Probe()
    module.replay, module.few = deque([[0]] * 20_000), [[0]]
    with isolated(module):
        for kept in (module.replay, module.few):
            kept[0].append(1)
            kept.append([2])
    assert len(module.replay) == 20_000 and module.replay[0] == [0, 1]
    assert module.few == [[0]]


@pytest.mark.filterwarnings("error")
def test_steps_draw_from_copies_of_iterators():
    module = Probe()
    module.count, module.cycle, module.rest = itertools.count(), itertools.cycle([1, 2]), {"it": iter([torch.ones(1)])}
    count, first = module.count, module.rest["it"]
    with isolated(module):
        assert [next(module.count), next(module.cycle), float(next(module.rest["it"]))] == [0, 1, 1.0]
    assert module.count is count and module.rest["it"] is first
    assert [next(module.count), next(module.cycle), float(next(module.rest["it"]))] == [0, 1, 1.0]


def test_an_iterator_that_cannot_be_copied_is_not_drawn_from():
    module = Probe()
    module.draws, module.loader = (each for each in range(3)), iter(DataLoader([0, 1, 2]))
    for name in ("draws", "loader"):
        with isolated(module), pytest.raises(OwnIteratorError, match="an iterator that it keeps") as raised:
            next(iter(getattr(module, name)))
        assert "several loaders at once" in str(raised.value)
        assert [int(each) for each in getattr(module, name)] == [0, 1, 2]
