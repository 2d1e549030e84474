from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_maml_guard.linalg.operators import Hessian
from lightning_maml_guard.utils.double_backward import BatchStatistics, double_backward, full_precision

NORMS = {
    "batch": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "batch, no affine": (lambda: nn.BatchNorm1d(4, affine=False), (6, 4)),
    "batch, evaluation": (lambda: nn.BatchNorm1d(4).eval(), (6, 4)),
    "batch 2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "layer": (lambda: nn.LayerNorm(4), (6, 4)),
    "layer over two dims": (lambda: nn.LayerNorm([3, 4]), (6, 3, 4)),
    "instance": (lambda: nn.InstanceNorm1d(3, affine=True), (2, 3, 5)),
    "instance, running": (lambda: nn.InstanceNorm1d(3, track_running_stats=True).eval(), (2, 3, 5)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 4, 5)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_from_primitives_are_the_native_ones(name):
    make, shape = NORMS[name]
    norm, x = make().double(), torch.randn(shape).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    native = norm(x)
    with double_backward():
        torch.testing.assert_close(norm(x), native, rtol=1e-12, atol=1e-12)


def meta_like(norm, x):
    """A loss whose Hessian needs third derivatives of the norm: one inner gradient step inside."""
    names = dict(norm.named_parameters())
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()

    def task(params):
        inputs = params["x"]
        return (functional_call(norm, {n: params[n] for n in names}, (inputs,)) - target).pow(2).mean() + (
            inputs**3
        ).mean()

    def meta(params):
        gradients = torch.autograd.grad(task(params), list(params.values()), create_graph=True)
        return task({n: p - 0.3 * g for (n, p), g in zip(params.items(), gradients, strict=True)})

    return meta, {**{n: p.detach() for n, p in names.items()}, "x": x}


@pytest.mark.parametrize("name", [name for name in NORMS if "running" not in name])
def test_third_derivatives_through_norms_agree_with_finite_differences(name):
    make, shape = NORMS[name]
    norm, x = make().double(), torch.randn(shape).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    meta, params = meta_like(norm, x)
    with double_backward():
        operator = Hessian(meta, params)
        vector = torch.randn(operator.layout.size).double()
        product = operator(vector)

        def gradient(step):
            moved = {n: params[n] + step * d for n, d in operator.layout.split(vector).items()}
            return Hessian(meta, moved).gradient

        h = 1e-4
        difference = (8 * (gradient(h) - gradient(-h)) - (gradient(2 * h) - gradient(-2 * h))) / (12 * h)
    assert (product - difference).norm() / difference.norm() < 1e-6


def test_batch_statistics_need_no_state_in_training_and_evaluation():
    norm = nn.BatchNorm1d(4)
    x = torch.randn(6, 4) * 3 + 1
    expected = F.batch_norm(x, None, None, norm.weight, norm.bias, True)
    before = {name: value.clone() for name, value in norm.named_buffers() if name != "num_batches_tracked"}
    for mode in (True, False):
        with BatchStatistics():
            torch.testing.assert_close(norm.train(mode)(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers() if name in before)


def hessian_of(network, inputs):
    params = {name: value for name, value in network.named_parameters() if value.requires_grad}
    return Hessian(lambda p: functional_call(network, p, inputs).pow(2).mean(), params)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


class Sdpa(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 12)

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.inner(x).chunk(3, -1))


NETWORKS = {
    "attention": Attention,
    "sdpa": Sdpa,
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "lstm": Recurrent,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_without_a_double_backward_of_their_own_agree_with_finite_differences(name):
    network, x = NETWORKS[name]().double(), torch.randn(2, 5, 4).double()
    with double_backward():
        operator = hessian_of(network, (x,))
        vector = torch.randn(operator.layout.size).double()
        product = operator(vector)
        base = {n: p.detach().clone() for n, p in network.named_parameters()}

        def gradient(step):
            with torch.no_grad():
                for n, d in operator.layout.split(vector).items():
                    dict(network.named_parameters())[n].copy_(base[n] + step * d)
            return hessian_of(network, (x,)).gradient

        difference = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    assert (product - difference).norm() / difference.norm() < 1e-6


def test_the_context_turns_gradients_on_and_autocast_off_and_puts_both_back():
    weight = torch.ones(2, requires_grad=True)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        with double_backward():
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert (weight @ weight).dtype == torch.float32
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")


class CudnnAt(TorchDispatchMode):
    """Notes at which operators cuDNN would be used."""

    def __init__(self):
        super().__init__()
        self.enabled = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.enabled[function.overloadpacket.__name__] = torch.backends.cudnn.enabled
        return function(*args, **(kwargs or {}))


def test_recurrent_layers_are_computed_without_cudnn_and_convolutions_with_it():
    with double_backward(), CudnnAt() as at:
        nn.LSTM(3, 4)(torch.randn(5, 2, 3))
        nn.Conv2d(1, 1, 3)(torch.randn(1, 1, 5, 5))
    recurrent = {"mkldnn_rnn_layer", "sigmoid", "sigmoid_"} & set(at.enabled)
    assert recurrent
    assert not any(at.enabled[name] for name in recurrent)
    assert at.enabled["convolution"]
    assert torch.backends.cudnn.enabled


@contextmanager
def precisions(**settings):
    """Set ``torch.set_float32_matmul_precision`` or a backend's ``fp32_precision`` for a while."""
    kinds = {"conv": torch.backends.cudnn.conv, "rnn": torch.backends.cudnn.rnn} if NEW else {}
    before = {name: kind.fp32_precision for name, kind in kinds.items()}, torch.get_float32_matmul_precision()
    try:
        for name, value in settings.items():
            if name == "matmul":
                torch.set_float32_matmul_precision(value)
            else:
                kinds[name].fp32_precision = value
        yield
    finally:
        for name, kind in kinds.items():
            kind.fp32_precision = before[0][name]
        torch.set_float32_matmul_precision(before[1])


NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.9


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
def test_products_are_not_rounded_to_fewer_bits_and_the_setting_stays(matmul):
    with precisions(matmul=matmul):
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == matmul
        assert torch.backends.cudnn.allow_tf32


@pytest.mark.skipif(not NEW, reason="torch 2.9 has fp32_precision")
def test_a_precision_set_for_one_kind_of_layer_is_no_error_and_stays():
    with precisions(conv="ieee"):
        with pytest.raises(RuntimeError, match="allow_tf32"), torch.backends.cudnn.flags(enabled=False):
            pass
        with double_backward():
            assert torch.backends.cudnn.rnn.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.rnn.fp32_precision == "tf32"


class Checkpointed(nn.Module):
    """A layer norm between two layers, recomputed in the backward pass; ``calls``: how often it was computed."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.calls = reentrant, 0
        self.first, self.inner = nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2), nn.Tanh())

    def count(self, x):
        self.calls += 1
        return self.inner(x)

    def forward(self, x):
        x = self.first(x)
        return self.count(x) if self.reentrant is None else checkpoint(self.count, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_activations_are_those_of_the_parameters_at_hand(reentrant):
    """Where these are not the module's own, as in a lookahead; at the second order, too."""
    torch.manual_seed(0)
    network, plain = Checkpointed(reentrant).double(), Checkpointed(None).double()
    x, v = torch.randn(5, 3).double(), None
    given = {name: torch.randn_like(value) for name, value in plain.named_parameters()}
    found = []
    for each in (network, plain):
        params = {name: value.clone().requires_grad_() for name, value in given.items()}
        with double_backward():
            loss = functional_call(each, params, (x,)).square().mean()
            gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            v = v or [torch.randn_like(value) for value in gradients]
            products = torch.autograd.grad(gradients, list(params.values()), v)
        assert each.calls == 1
        found.append([*gradients, *products])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    network(x).sum().backward()  # outside they are as before
    assert network.calls == 3


def test_checkpoints_of_another_thread_are_left_alone():
    network, x = Checkpointed(False), torch.randn(5, 3)
    with double_backward(), ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: network(x).sum().backward()).result()
    assert network.calls == 2


def test_what_fails_under_a_checkpoint_says_so_itself():
    def fails(x):
        raise ValueError("of the user's")

    with double_backward(), pytest.raises(ValueError, match="of the user's"):
        checkpoint(fails, torch.ones(1, requires_grad=True), use_reentrant=False)
