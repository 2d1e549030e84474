"""The rows of the table: networks, data and settings, the same for every method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_maml_guard.networks import conv4, mlp


@dataclass(frozen=True)
class Row:
    """One row of the table; ``flops`` is of the forward pass of one example, ``burst`` the steps of a turn.

    A turn of a small network takes many steps, so that the caches and threads left by the other methods hardly count.
    """

    title: str
    network: Callable[[], nn.Module]
    example: tuple[int, ...]
    tasks: int
    way: int
    shots: int
    queries: int
    alpha: float
    inner_steps: int
    flops: float
    burst: int = 1

    def data(
        self, dtype: torch.dtype, device: torch.device, tasks: int | None = None
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        generator = torch.Generator().manual_seed(0)
        sets = []
        for each in (self.shots, self.queries):
            count = each * max(self.way, 1)
            x = torch.randn(tasks or self.tasks, count, *self.example, generator=generator, dtype=torch.float64)
            if self.way:
                y = torch.arange(self.way).repeat(each).expand(len(x), -1).contiguous()
            else:
                y = torch.sin(3 * x.flatten(2).sum(-1, keepdim=True)).to(dtype)
            sets.append((x.to(device, dtype), y.to(device)))
        return tuple(sets)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target) if self.way else F.mse_loss(prediction, target)


class Transformer(nn.Module):
    """A regressor over one task's points: two pre-norm blocks of attention, written out so that all packages can run it."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.read = nn.Linear(1, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "first": nn.LayerNorm(width),
                    "mix": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "second": nn.LayerNorm(width),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            q, k, v = (
                each.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
                for each in block["mix"](block["first"](h)).chunk(3, -1)
            )
            weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
            h = h + block["out"]((weights @ v).transpose(-2, -3).flatten(-2))
            h = h + block["down"](torch.tanh(block["up"](block["second"](h))))
        return self.read(h)


class LayerByLayer(nn.Module):
    """Our conv4 as a user would write it: the layers of its ``features`` one by one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.features, self.head = network.features, network.head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.flatten(self.features(images), 1))


def _conv_flops(channels: int, filters: int, size: int) -> float:
    total, fan_in = 0.0, channels
    for _ in range(4):
        total += 2 * 9 * fan_in * filters * size * size
        fan_in, size = filters, size // 2
    return total


_OMNIGLOT = _conv_flops(1, 64, 28)
ROWS = {
    "sinusoid": Row(
        "sinusoid MLP 1-40-40-1, 25 tasks, 10 shots, K=1", mlp, (1,), 25, 0, 10, 10, 0.01, 1, 2 * 1680.0, 100
    ),
    "omniglot": Row(
        "Omniglot conv4-64, 32 tasks, 5-way 1-shot, 1 query, K=1", conv4, (1, 28, 28), 32, 5, 1, 1, 0.4, 1, _OMNIGLOT
    ),
    "omniglot-5": Row("the same, K=5", conv4, (1, 28, 28), 32, 5, 1, 1, 0.1, 5, _OMNIGLOT),
    "omniglot-15q": Row("the same, 15 queries, K=1", conv4, (1, 28, 28), 32, 5, 1, 15, 0.4, 1, _OMNIGLOT),
    "miniimagenet": Row(
        "miniImageNet conv4-32, 4 tasks, 5-way 1-shot, 15 queries, K=5",
        lambda: conv4(channels=3, filters=32, image_size=84),
        (3, 84, 84),
        4,
        5,
        1,
        15,
        0.01,
        5,
        _conv_flops(3, 32, 84),
    ),
    "transformer": Row(
        "transformer regressor, 8 tasks, 20 shots, K=1", Transformer, (1,), 8, 0, 20, 20, 0.01, 1, 2 * 32 * 32 * 16.0, 5
    ),
}


def _wide(width: int) -> Callable[[], nn.Module]:
    return lambda: mlp(hidden=(width, width))


_BASE = ROWS["sinusoid"]
ROWS |= {
    f"sinusoid-K{steps}": replace(_BASE, title=f"the sinusoid MLP, K={steps}", inner_steps=steps, burst=30)
    for steps in (5, 10)
}
ROWS |= {
    f"sinusoid-{tasks}": replace(_BASE, title=f"the sinusoid MLP, {tasks} tasks", tasks=tasks, burst=50)
    for tasks in (4, 64)
}
ROWS |= {
    f"mlp-{width}": replace(
        _BASE,
        title=f"MLP 1-{width}-{width}-1, 25 tasks, K=1",
        network=_wide(width),
        flops=2.0 * (width * width + 2 * width),
        burst=max(1, 4000 // (width * max(1, width // 160))),
    )
    for width in (80, 160, 320, 640, 2048)
}
ROWS["omniglot-10"] = replace(ROWS["omniglot-5"], title="Omniglot conv4-64, 32 tasks, K=10", inner_steps=10)
ROWS["omniglot-64"] = replace(ROWS["omniglot"], title="Omniglot conv4-64, 64 tasks, K=1", tasks=64)
