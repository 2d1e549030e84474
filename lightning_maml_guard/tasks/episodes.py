"""Episodes: what a meta-batch is, and how a family of tasks samples one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "val", "test")


class EpisodeBatch(NamedTuple):
    """A batch of tasks, each with a support and a query set.

    Attributes:
        support: ``(x, y)`` with shapes ``(tasks, shots, ...)``: what the inner loop descends on.
        query: ``(x, y)`` with shapes ``(tasks, queries, ...)``: what the meta loss is computed on.
    """

    support: Any
    query: Any


class TaskFamily(ABC):
    """A distribution over tasks, with a disjoint (or independent) one for each split."""

    def setup(self) -> None:  # noqa: B027
        """Load what sampling needs; called once a process before the first episode."""

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Hold on a device what episodes are cut from, where the family has such data.

        Args:
            device: The device that trains; episodes are then made on it.
        """

    @abstractmethod
    def sample(self, n_tasks: int, generator: torch.Generator, split: str = "train") -> EpisodeBatch:
        """Sample tasks.

        Args:
            n_tasks: Number of tasks.
            generator: Source of all randomness.
            split: ``"train"``, ``"val"`` or ``"test"``.

        Returns:
            The episodes.
        """


def episode_generator(seed: int, split: str, index: int) -> torch.Generator:
    """Make the generator of one meta-batch.

    Args:
        seed: The data module's seed.
        split: Name of the split.
        index: Number of the meta-batch in the split.

    Returns:
        A generator that depends on these three alone, so that a batch is the same whichever worker draws
        it and whichever came before.
    """
    words = np.random.SeedSequence([seed, SPLITS.index(split), index]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def sample_n_way_k_shot(
    images: Tensor,
    classes: Tensor,
    n_tasks: int,
    generator: torch.Generator,
    *,
    n_way: int,
    k_shot: int,
    queries: int,
    counts: Tensor | None = None,
    rotations: bool = False,
) -> EpisodeBatch:
    """Sample n-way k-shot classification episodes from images held in memory.

    Args:
        images: All images, shape ``(classes, images per class, channels, height, width)``, uint8 or float; with
            ``counts``, class after class in one row, shape ``(images, channels, height, width)``. Episodes are made
            on their device.
        classes: Indices of the classes to draw from, shape ``(m,)``, on the CPU.
        n_tasks: Number of episodes.
        generator: Source of all randomness, on the CPU, so that episodes are the same on every device.
        n_way: Classes an episode.
        k_shot: Support images a class.
        queries: Query images a class; no image is in both sets.
        counts: Number of images of every class, where they differ.
        rotations: Count each class turned by 0, 90, 180 and 270 degrees as four classes.

    Returns:
        Float images in ``[0, 1]`` of shapes ``(n_tasks, n_way * shots, channels, height, width)`` and labels
        ``0 .. n_way - 1``.

    Raises:
        ValueError: If an episode asks for more classes or images than there are.
    """
    if counts is None:
        counts = torch.full((images.shape[0],), images.shape[1])
        images = images.flatten(0, 1)
    turns = 4 if rotations else 1
    check_episode(n_way, k_shot, queries, len(classes) * turns, int(counts[classes].min()) if len(classes) else 0)
    chosen = torch.stack([torch.randperm(len(classes) * turns, generator=generator)[:n_way] for _ in range(n_tasks)])
    members = classes[chosen // turns]
    # The k+q smallest of as many random numbers as there are images are a draw without replacement.
    tickets = torch.rand(n_tasks, n_way, int(counts[classes].max()), generator=generator)
    tickets = tickets.masked_fill(torch.arange(tickets.shape[-1]) >= counts[members].unsqueeze(-1), 2.0)
    order = tickets.argsort(-1)[..., : k_shot + queries]
    starts = counts.cumsum(0) - counts
    picked = images[(starts[members].unsqueeze(-1) + order).to(images.device)]
    if rotations:
        turn = (chosen % turns).reshape(n_tasks, n_way, 1, 1, 1, 1).to(images.device)
        picked = sum((torch.rot90(picked, k, (-2, -1)) * (turn == k) for k in range(1, 4)), picked * (turn == 0))
    picked = picked.float() / 255 if picked.dtype == torch.uint8 else picked
    labels = torch.arange(n_way, device=images.device).reshape(1, n_way, 1)

    def flat(part: Tensor) -> tuple[Tensor, Tensor]:
        target = labels.expand(n_tasks, n_way, part.shape[2])
        return part.flatten(1, 2).contiguous(), target.flatten(1, 2).contiguous()

    return EpisodeBatch(flat(picked[:, :, :k_shot]), flat(picked[:, :, k_shot:]))


def check_episode(n_way: int, k_shot: int, queries: int, classes: int, images: int) -> None:
    """Refuse an episode that the data cannot serve.

    Args:
        n_way: Classes an episode.
        k_shot: Support images a class.
        queries: Query images a class.
        classes: Classes there are.
        images: Images a class there are.

    Raises:
        ValueError: If a number is below 1 or above what there is.
    """
    if min(n_way, k_shot, queries) < 1:
        raise ValueError(
            f"Expected `n_way`, `k_shot` and `queries` to be at least 1 but got {n_way}, {k_shot} and {queries}."
        )
    if n_way > classes:
        raise ValueError(f"An episode asks for n_way={n_way} classes but this split has {classes}: lower n_way.")
    if k_shot + queries > images:
        raise ValueError(
            f"An episode asks for k_shot={k_shot} + queries={queries} different images a class but there are {images}: "
            "lower one of them."
        )
