"""Meta-steps in JAX, as one would write them (jit, vmap, plain Adam): ``python -m benchmarks.gpu.jax_steps FILE ROWS``.

Exact MAML with the networks, sizes and data of ``benchmarks.meta_step.rows`` from the same start; writes milliseconds
a step, at JAX's default precision (TF32 on a GPU), and the relative distance of the meta-gradient in float32 from ours
on the CPU. ``FILE`` is written anew after each row.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.meta_step.rows import ROWS, Row
from lightning_maml_guard import MetaLearningModule
from lightning_maml_guard.maml.meta_gradient import meta_gradient

EPS = 1e-5


def mlp(params: Any, x: Any) -> Any:
    """The sinusoid network: linear layers with ReLU between them."""
    layers = sorted({name.rsplit(".", 1)[0] for name in params}, key=lambda name: int(name.split(".")[-1]))
    for index, name in enumerate(layers):
        x = x @ params[f"{name}.weight"].T + params[f"{name}.bias"]
        x = jax.nn.relu(x) if index + 1 < len(layers) else x
    return x


def conv4(params: Any, x: Any) -> Any:
    """Four blocks of convolution, batch norm of the batch, ReLU and pooling, and a linear layer."""
    # A dictionary comes out of jax.grad sorted by name, where layer 12 is before layer 4.
    weights = sorted((name for name in params if params[name].ndim == 4), key=lambda name: int(name.split(".")[1]))
    for name in weights:
        prefix, index = name.removesuffix(".weight").rsplit(".", 1)
        norm = f"{prefix}.{int(index) + 1}"
        x = jax.lax.conv_general_dilated(
            x, params[name], (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        x = x + params[f"{prefix}.{index}.bias"][None, :, None, None] if f"{prefix}.{index}.bias" in params else x
        mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        x = (x - mean) / jnp.sqrt(variance + EPS)
        x = x * params[f"{norm}.weight"][None, :, None, None] + params[f"{norm}.bias"][None, :, None, None]
        x = jax.nn.relu(x)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return x.reshape(len(x), -1) @ params["head.weight"].T + params["head.bias"]


def transformer(params: Any, x: Any, heads: int = 4) -> Any:
    """The transformer of the rows."""

    def linear(name: str, h: Any) -> Any:
        return h @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(name: str, h: Any) -> Any:
        mean, variance = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
        return (h - mean) / jnp.sqrt(variance + EPS) * params[f"{name}.weight"] + params[f"{name}.bias"]

    h, depth = linear("embed", x), len({name.split(".")[1] for name in params if name.startswith("blocks.")})
    for block in (f"blocks.{index}" for index in range(depth)):
        mixed = jnp.split(linear(f"{block}.mix", norm(f"{block}.first", h)), 3, -1)
        q, k, v = (each.reshape(len(each), heads, -1).swapaxes(0, 1) for each in mixed)
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5, -1)
        h = h + linear(f"{block}.out", (weights @ v).swapaxes(0, 1).reshape(h.shape))
        h = h + linear(f"{block}.down", jnp.tanh(linear(f"{block}.up", norm(f"{block}.second", h))))
    return linear("read", h)


def measured(row: Row, network: Any, name: str) -> dict[str, Any]:
    """Milliseconds of a jitted step of Adam, and the distance of its meta-gradient from ours."""
    torch.manual_seed(0)
    model = row.network()
    (sx, sy), (qx, qy) = row.data(torch.float32, torch.device("cpu"))
    params = {key: jnp.asarray(value.detach().numpy()) for key, value in model.named_parameters()}
    data = tuple(jnp.asarray(each.numpy()) for each in (sx, sy, qx, qy))

    def loss(theta: Any, x: Any, y: Any) -> Any:
        found = network(theta, x)
        if row.way:
            return -jnp.take_along_axis(jax.nn.log_softmax(found, -1), y[:, None], -1).mean()
        return ((found - y) ** 2).mean()

    def task(theta: Any, x: Any, y: Any, x_query: Any, y_query: Any) -> Any:
        fast = theta
        for _ in range(row.inner_steps):
            slope = jax.grad(loss)(fast, x, y)
            fast = {key: value - row.alpha * slope[key] for key, value in fast.items()}
        return loss(fast, x_query, y_query)

    def meta_loss(theta: Any, *sets: Any) -> Any:
        return jax.vmap(task, (None, 0, 0, 0, 0))(theta, *sets).mean()

    @jax.jit
    def step(theta: Any, first: Any, second: Any, count: Any, *sets: Any) -> Any:
        gradient = jax.grad(meta_loss)(theta, *sets)
        count = count + 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
        moved = jax.tree.map(
            lambda p, m, v: p - 1e-3 * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8),
            theta,
            first,
            second,
        )
        return moved, first, second, count

    zeros = jax.tree.map(jnp.zeros_like, params)
    began = time.perf_counter()
    state = jax.block_until_ready(step(params, zeros, zeros, 0.0, *data))
    compiling = time.perf_counter() - began
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < 0.3 and len(times) < 300):
        at = time.perf_counter()
        state = jax.block_until_ready(step(*state, *data))
        times.append(time.perf_counter() - at)
    with jax.default_matmul_precision("highest"):  # not TF32, which the steps above use on a GPU
        theirs = jax.jit(jax.grad(meta_loss))(params, *data)
    module = MetaLearningModule(model, row.loss, inner_lr=row.alpha, inner_steps=row.inner_steps)
    ours = meta_gradient(module.meta_problem(((sx, sy), (qx, qy)))).gradients
    pairs = [(np.asarray(theirs[key]).ravel(), value.numpy().ravel()) for key, value in ours.items()]
    one, other = (np.concatenate(each) for each in zip(*pairs, strict=True))
    distance = float(np.linalg.norm(one - other) / np.linalg.norm(other))
    return {
        "row": name,
        "method": f"JAX {jax.__version__}, {jax.devices()[0].platform}",
        "ms": 1e3 * median(times),
        "compile s": compiling,
        "gap": distance,
    }


def main() -> None:
    """Measure the rows, and write them."""
    file, *names = [word for word in sys.argv[1:] if word != "--small"]
    small = "--small" in sys.argv
    found = []
    for name in names:
        row = replace(ROWS[name], tasks=2) if small else ROWS[name]
        network = conv4 if row.way else transformer if name == "transformer" else mlp
        found.append(measured(row, network, name))
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
