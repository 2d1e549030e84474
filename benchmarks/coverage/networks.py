"""The networks of the random problems: of torch's layers for the measurement, from primitives for the dense matrices."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_maml_guard import MetaProblem

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
}
KINKED = ("relu", "leaky_relu")
NORMS = ("none", "batch", "layer", "group")
EPS = 1e-5
Params = dict[str, Tensor]
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A random problem, and the optimizer that trains it (None: plain SGD)."""

    problem: MetaProblem
    optimizer: Optimizer | None
    activation: str
    norm: str
    layers: int
    words: str


def forward(params: Params, x: Tensor, case_norm: str, activation: nn.Module, layers: int) -> Tensor:
    """The network from primitives: linear, norm, activation."""
    for layer in range(layers):
        x = x @ params[f"linear{layer}.weight"].T + params[f"linear{layer}.bias"]
        if case_norm != "none":
            groups = {"batch": x[None], "layer": x[:, None], "group": x.reshape(len(x), 2, -1)}[case_norm]
            axis = 1 if case_norm == "batch" else 2
            centred = groups - groups.mean(axis, keepdim=True)
            x = (centred * ((centred * centred).mean(axis, keepdim=True) + EPS).rsqrt()).reshape(x.shape)
            x = x * params[f"norm{layer}.weight"] + params[f"norm{layer}.bias"]
        x = activation(x)
    return x @ params["head.weight"].T + params["head.bias"]


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    """Squared error for real targets, cross-entropy for classes."""
    return ((output - y) ** 2).mean() if y.is_floating_point() else F.cross_entropy(output, y)


def network(sizes: list[int], norm: str, activation: type[nn.Module], out: int) -> nn.Sequential:
    """The same network of torch's own layers."""
    net = nn.Sequential()
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        net.add_module(f"linear{layer}", nn.Linear(fan_in, fan_out))
        if norm == "batch":
            net.add_module(f"norm{layer}", nn.BatchNorm1d(fan_out, track_running_stats=False))
        elif norm != "none":
            net.add_module(f"norm{layer}", nn.GroupNorm(2, fan_out) if norm == "group" else nn.LayerNorm(fan_out))
        net.add_module(f"activation{layer}", activation())
    net.add_module("head", nn.Linear(sizes[-1], out))
    return net.double()
