"""Meta-batches that depend on seed, split and step alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.images import Omniglot

DATA = os.environ.get("LMG_DATA", str(Path(__file__).parents[3] / "shared" / "data"))
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


# The targets are noisy, as measured ones are: without a floor, runs that end far below anything that matters would
# differ by large factors.
def _sinusoids(tasks: int, generator: torch.Generator) -> Batch:
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(tasks, 20, 1, generator=generator) - 5
    y = amplitude * torch.sin(x + phase) + 0.5 * torch.randn(x.shape, generator=generator)
    return x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]


def _sequences(tasks: int, generator: torch.Generator, length: int = 6) -> Batch:
    """Draw windows of a sine; a task asks for the next value times its own gain."""
    gain = 0.5 + 2.5 * torch.rand(tasks, 1, 1, generator=generator)
    speed = 0.6 + 0.6 * torch.rand(tasks, 1, 1, generator=generator)
    start = 2 * math.pi * torch.rand(tasks, 20, 1, generator=generator)
    wave = torch.sin(start + speed * torch.arange(length + 1))
    x, y = wave[..., :length, None], gain * wave[..., length:]
    y = y + 0.3 * torch.randn(y.shape, generator=generator)
    return x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]


def _harmonics(tasks: int, generator: torch.Generator) -> Batch:
    """Draw sines with a second harmonic that all tasks share; each has an amplitude and a phase of its own."""
    amplitude = 1 + 2 * torch.rand(tasks, 1, 1, generator=generator)
    phase = 1.5 * torch.rand(tasks, 1, 1, generator=generator)
    x = 6 * torch.rand(tasks, 20, 1, generator=generator) - 3
    y = amplitude * torch.sin(x + phase) + torch.cos(2 * x)
    y = y + 0.3 * torch.randn(y.shape, generator=generator)
    return x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]


def _blobs(tasks: int, generator: torch.Generator, classes: int = 5) -> Batch:
    """Draw clusters in a plane: five classes, three points of each to adapt to and three to judge by."""
    centre = 1.5 * torch.randn(tasks, classes, 1, 2, generator=generator)
    x = centre + 0.4 * torch.randn(tasks, classes, 6, 2, generator=generator)
    y = torch.arange(classes)[:, None].expand(tasks, classes, 3).flatten(1)
    return x[:, :, :3].flatten(1, 2), y, x[:, :, 3:].flatten(1, 2), y


@cache
def _omniglot() -> Omniglot:
    return Omniglot(DATA, n_way=3, k_shot=3, queries=3)


def draw(data: str, tasks: int, seed: int, split: str, index: int) -> Batch:
    """Draw a meta-batch, which depends on the arguments alone."""
    generator = episode_generator(seed, split, index)
    if data == "omniglot":
        (xs, ys), (xq, yq) = _omniglot().sample(tasks, generator, split)
        return xs, ys, xq, yq
    return _MAKERS[data](tasks, generator)


_MAKERS: dict[str, Callable[[int, torch.Generator], Batch]] = {
    "sinusoid": _sinusoids,
    "sequence": _sequences,
    "harmonic": _harmonics,
    "blobs": _blobs,
}
