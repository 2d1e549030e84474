"""The rows in JAX, as a JAX user would write them: ``jit``, ``vmap`` over the tasks, optax's Adam.

Needs ``pip install lightning-maml-guard[jax]``. The networks read torch's parameters by name, so both start alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax import lax
from torch import nn

from benchmarks.meta_step.rows import Row, Transformer
from lightning_maml_guard.networks import Conv4

Params = dict[str, jax.Array]
Forward = Callable[[Params, jax.Array], jax.Array]


def _linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def _mlp(network: nn.Sequential) -> Forward:
    names = [name for name, part in network.named_children() if isinstance(part, nn.Linear)]

    def forward(params: Params, x: jax.Array) -> jax.Array:
        for name in names[:-1]:
            x = jax.nn.relu(_linear(params, name, x))
        return _linear(params, names[-1], x)

    return forward


def _norm(params: Params, name: str, x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    standard = centred * lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return standard * params[f"{name}.weight"] + params[f"{name}.bias"]


def _transformer(network: Transformer) -> Forward:
    def forward(params: Params, x: jax.Array) -> jax.Array:
        h = _linear(params, "embed", x)
        for index in range(len(network.blocks)):
            block = f"blocks.{index}"
            mixed = jnp.split(_linear(params, f"{block}.mix", _norm(params, f"{block}.first", h)), 3, -1)
            q, k, v = (each.reshape(len(x), network.heads, -1).swapaxes(0, 1) for each in mixed)
            weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]), -1)
            h = h + _linear(params, f"{block}.out", (weights @ v).swapaxes(0, 1).reshape(len(x), -1))
            up = jnp.tanh(_linear(params, f"{block}.up", _norm(params, f"{block}.second", h)))
            h = h + _linear(params, f"{block}.down", up)
        return _linear(params, "read", h)

    return forward


def _conv4(network: Conv4) -> Forward:
    convolutions = [str(index) for index, part in enumerate(network.features) if isinstance(part, nn.Conv2d)]

    def forward(params: Params, images: jax.Array) -> jax.Array:
        h = images.transpose(0, 2, 3, 1)
        for index in convolutions:
            at, norm = f"features.{index}", f"features.{int(index) + 1}"
            kernel = params[f"{at}.weight"].transpose(2, 3, 1, 0)
            h = lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            centred = h - h.mean((0, 1, 2))  # the convolution's bias falls out of it
            h = centred * lax.rsqrt((centred * centred).mean((0, 1, 2)) + 1e-5)
            h = jax.nn.relu(h * params[f"{norm}.weight"] + params[f"{norm}.bias"])
            size = 2 * (h.shape[1] // 2)
            h = h[:, :size, :size].reshape(len(h), size // 2, 2, size // 2, 2, -1).max((2, 4))
        return _linear(params, "head", h.transpose(0, 3, 1, 2).reshape(len(h), -1))

    return forward


def forward_of(network: nn.Module) -> Forward:
    if isinstance(network, Conv4):
        return _conv4(network)
    return _transformer(network) if isinstance(network, Transformer) else _mlp(network)


def _loss(row: Row, prediction: jax.Array, target: jax.Array) -> jax.Array:
    if row.way:
        return optax.softmax_cross_entropy_with_integer_labels(prediction, target).mean()
    return ((prediction - target) ** 2).mean()


def jax_jit(row: Row, network: nn.Module, support: Any, query: Any, optimizer: Any) -> Callable[[], object]:
    """One jitted step; a given torch optimizer is plain SGD with rate 1, and the network is written back then."""
    jax.config.update("jax_enable_x64", next(network.parameters()).dtype == torch.float64)
    forward = forward_of(network)
    names = dict(network.named_parameters())
    theta = {name: jnp.asarray(value.detach().numpy()) for name, value in names.items()}
    data = [jnp.asarray(each.numpy()) for each in (*support, *query)]
    outer = optax.adam(1e-3) if optimizer is None else optax.sgd(1.0)

    def task(params: Params, sx: jax.Array, sy: jax.Array, qx: jax.Array, qy: jax.Array) -> jax.Array:
        for _ in range(row.inner_steps):
            slopes = jax.grad(lambda fast: _loss(row, forward(fast, sx), sy))(params)
            params = {name: value - row.alpha * slopes[name] for name, value in params.items()}
        return _loss(row, forward(params, qx), qy)

    @jax.jit
    def update(params: Params, state: Any, sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        def mean(at: Params) -> jax.Array:
            return jax.vmap(task, (None, 0, 0, 0, 0))(at, sx, sy, qx, qy).mean()

        movement, state = outer.update(jax.grad(mean)(params), state, params)
        return optax.apply_updates(params, movement), state

    kept = {"params": theta, "state": outer.init(theta)}

    def step() -> None:
        kept["params"], kept["state"] = update(kept["params"], kept["state"], *data)
        jax.block_until_ready(kept["params"])
        if optimizer is not None:
            with torch.no_grad():
                for name, value in names.items():
                    value.copy_(torch.from_numpy(np.array(kept["params"][name])))

    return step
