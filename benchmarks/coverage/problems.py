"""Random meta-learning problems of at most 120 parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim import SGD, Adam, Optimizer

from benchmarks.coverage.dense import mean_hessian
from benchmarks.coverage.networks import ACTIVATIONS, NORMS, Case, Data, Params, loss_of, network
from lightning_maml_guard import MetaProblem

ORDERS = ("exact", "first", "simplified")


def draw(seed: int) -> Case:
    """Draw a problem."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    activation, norm, order = str(rng.choice(list(ACTIVATIONS))), str(rng.choice(NORMS)), str(rng.choice(ORDERS))
    layers, tasks, steps = int(rng.integers(1, 3)), int(rng.integers(1, 5)), int(rng.integers(1, 4))
    wide = 10 if layers == 1 else 6
    inputs, out = int(rng.integers(1, 4)), int(rng.choice([1, 3]))
    sizes = [inputs, *(2 * int(rng.integers(2, wide // 2 + 1)) for _ in range(layers))]
    net = network(sizes, norm, ACTIVATIONS[activation], out)
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.add_(
                0.2 * torch.randn(value.shape, generator=generator).double() * ("norm" in name or "bias" in name)
            )
    params = dict(net.named_parameters())

    def sample() -> Data:
        x = torch.randn(tasks, int(shots), inputs, generator=generator).double() * 1.5
        if out > 1:
            return x, torch.randint(0, out, x.shape[:2], generator=generator)
        return x, torch.sin(x.sum(-1, keepdim=True) + phase)

    shots, phase = rng.integers(3, 11), torch.randn(tasks, 1, 1, generator=generator).double()
    support, query = sample(), sample()

    def task_loss(theta: Params, data: Data) -> Tensor:
        return loss_of(functional_call(net, theta, (data[0],)), data[1])

    def problem(rate: Any) -> MetaProblem:
        return MetaProblem(params, task_loss, support, query, inner_lr=rate, inner_steps=steps, order=order)

    kind = str(rng.choice(["sgd", "momentum", "adam"], p=[0.6, 0.15, 0.25]))
    optimizer: Optimizer | None = None
    if kind != "sgd":
        values = list(params.values())
        optimizer = Adam(values, lr=0.01) if kind == "adam" else SGD(values, lr=0.01, momentum=0.9)
    trained = int(rng.choice([0, 20, 100]))
    descent = optimizer or SGD(list(params.values()), lr=0.02)
    for _ in range(max(trained, 2 if kind == "adam" else 0)):
        descent.zero_grad()
        torch.stack([task_loss(params, each) for each in zip(*query, strict=True)]).mean().backward()
        descent.step()
    case = Case(problem(0.0), optimizer, activation, norm, layers, "")
    top = float(np.linalg.eigvalsh(mean_hessian(case))[-1])
    alpha = (
        math.exp(rng.uniform(math.log(0.02), math.log(1.5))) / max(top, 1e-3) / (steps if order == "simplified" else 1)
    )
    rate: Any = alpha
    learned = bool(rng.random() < 0.2)
    if learned:
        rate = {n: alpha * torch.rand(p.shape, generator=generator).double() for n, p in params.items()}
    words = (
        f"{order}, K={steps}, {tasks} tasks, {sum(p.numel() for p in params.values())} parameters, {activation}, "
        f"{norm} norm, {kind}, {trained} steps trained{', learned rates' if learned else ''}, alpha {alpha:.2g}"
    )
    return Case(problem(rate), optimizer, activation, norm, layers, words)
