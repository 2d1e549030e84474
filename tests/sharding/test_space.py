"""Vectors in pieces, in a group of one process: the whole is the piece."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, MetaLearningModule
from lightning_maml_guard.guard.settings import check_pieces, check_watchable
from lightning_maml_guard.linalg.layout import WHOLE, Layout
from lightning_maml_guard.sharding.own_backward import OwnBackward
from lightning_maml_guard.sharding.space import Split, _NormalNumbers
from lightning_maml_guard.utils.distributed import ShardedRanks, SharedError
from lightning_maml_guard.utils.lightning_compat import MisconfigurationException
from lightning_maml_guard.utils.shards import finite, is_split, local, norm, split_like
from tests.sharding.program import SPLITS_ON_CPUS


def mlp_module(**options):
    return MetaLearningModule(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double(), **options)


@pytest.fixture
def network(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        made = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        fully_shard(made, mesh=init_device_mesh("cpu", (1,)))
        yield made
    finally:
        dist.destroy_process_group()


def test_numbers_drawn_in_blocks_are_those_of_one_draw(monkeypatch):
    monkeypatch.setattr("lightning_maml_guard.sharding.space._BLOCK", 64)
    for count in (5, 16, 63, 64, 79, 80, 200, 259):
        whole = torch.randn(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        stream = _NormalNumbers(count, 3)
        assert torch.equal(torch.cat([stream.take(count // 3), stream.take(count - count // 3)]), whole), count


def test_a_split_space_has_the_start_and_the_norms_of_a_whole_one(network):
    live = dict(network.named_parameters())
    space, layout = Split(live), Layout({name: local(value) for name, value in live.items()})
    assert all(map(is_split, live.values())) and space.rows == layout.rows == 26
    vectors = space.start((2, 26), torch.zeros(()))
    assert torch.equal(vectors, WHOLE.start((2, 26), torch.zeros(()))) and vectors.dtype == torch.float32
    assert torch.allclose(space.norm(vectors), WHOLE.norm(vectors))
    assert float(space.largest(vectors.abs().amax())) == float(vectors.abs().max())


@pytest.mark.skipif(not SPLITS_ON_CPUS, reason="this torch splits no model on CPUs")
def test_a_gradient_is_taken_at_another_point_and_leaves_no_trace(network):
    live, x = dict(network.named_parameters()), torch.randn(4, 3, dtype=torch.float64)

    def loss(params):
        return torch.func.functional_call(network, params, (x,)).square().mean()

    own = OwnBackward(live, loss)
    before = own.point()
    live["0.bias"].grad = kept = split_like(torch.ones(5, dtype=torch.float64), live["0.bias"].detach())
    doubled = {name: 2 * value for name, value in before.items()}
    value, gradients = own.gradient(loss, doubled)
    plain = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    plain.load_state_dict(doubled)
    expected = plain(x).square().mean()
    expected.backward()
    assert float(value) == pytest.approx(float(expected))
    for name, parameter in plain.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad)
        assert torch.equal(local(live[name]), before[name])
    assert live["0.bias"].grad is kept and live["0.weight"].grad is None
    assert all(one is other for one, other in zip(live.values(), network.parameters(), strict=True))
    with torch.no_grad():
        network(x)  # leaves the gathered parameters behind
    assert float(own.value(loss, doubled)) == pytest.approx(float(expected))
    assert float(norm([kept, torch.full((4,), 2.0)])) == pytest.approx(21**0.5)
    assert finite(network)
    local(live["2.bias"]).fill_(torch.nan)
    assert not finite(network)


class ModelParallelStrategy:
    pass


class _Trainer:
    strategy, world_size = ModelParallelStrategy(), 2


def test_a_guard_refuses_what_it_cannot_measure_in_pieces(network):
    check_pieces(_Trainer(), network)
    with pytest.raises(MisconfigurationException, match="cannot watch this model.*'weight' lies on every process"):
        check_pieces(_Trainer(), nn.Linear(2, 1))
    with pytest.raises(MisconfigurationException, match=r"but got \['torch.bfloat16'\].*bf16-mixed"):
        check_pieces(_Trainer(), network.bfloat16())
    guard = ConvergenceGuard(curvature=CurvatureOptions(estimator=lambda matvec, start: [1.0]))
    with pytest.raises(MisconfigurationException, match="no estimator but 'lanczos' under ModelParallelStrategy"):
        check_watchable(guard, _Trainer(), mlp_module())


@pytest.mark.parametrize(
    ("options", "name"), [({"compile": True}, "compile"), ({"learn_inner_lr": True}, "learn_inner_lr")]
)
def test_a_module_refuses_options_that_its_pieces_do_not_have(network, options, name):
    module = mlp_module(**options)
    module.network = network
    with pytest.raises(ValueError, match=f"`{name}` is not supported where fully_shard splits the network"):
        module.on_fit_start()


def test_a_failed_rank_and_rank_zeros_word_count_for_all(network):
    ranks = ShardedRanks()
    assert (ranks.size, ranks.processes) == (1, 1) and ranks.gather("own") == ["own"]
    assert ranks.mean(torch.tensor(2.0)) == 2.0
    with pytest.raises(SharedError, match="on rank 0: OSError: full"), ranks.fail_together():
        raise OSError("full")


def test_what_is_not_split_alike_is_named(network):
    live = dict(network.named_parameters())
    with pytest.raises(ValueError, match="'head' lies on every process as a whole"):
        Split({**live, "head": torch.zeros(3)})
    with pytest.raises(ValueError, match="leads to none"):
        OwnBackward(live, lambda params: params["0.bias"].sum())
