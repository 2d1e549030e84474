"""Episodes: what a meta-batch is, and how a family of tasks samples one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.utils.checks import check_choice, check_count, shown

SPLITS = ("train", "val", "test")


class EpisodeBatch(NamedTuple):
    """A batch of tasks, each with a support and a query set.

    Attributes:
        support: ``(x, y)`` with shapes ``(tasks, shots, ...)``, for the inner loop.
        query: ``(x, y)`` with shapes ``(tasks, queries, ...)``, for the meta loss.

    Example:
        >>> import torch
        >>> from lightning_maml_guard import EpisodeBatch
        >>> x, y = torch.randn(4, 15, 3), torch.randn(4, 15, 1)  # 4 tasks of 15 points
        >>> batch = EpisodeBatch(support=(x[:, :5], y[:, :5]), query=(x[:, 5:], y[:, 5:]))
        >>> batch.query[0].shape
        torch.Size([4, 10, 3])
    """

    support: Any
    query: Any


class TaskFamily(ABC):
    """A distribution over tasks; its splits have disjoint classes or are independent draws."""

    def setup(self) -> None:  # noqa: B027
        """Load what sampling needs; called once per process before the first episode."""

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Move the data that episodes are made of to a device, if the family has such data.

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
        seed: Seed of the data module.
        split: Name of the split.
        index: Number of the meta-batch in the split.

    Returns:
        A generator that depends on these three alone, so that a batch does not depend on which worker draws it or which
        batches came before.
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
            ``counts`` class after class in one row, shape ``(images, channels, height, width)``. Episodes are made on
            their device.
        classes: Indices of the classes to draw from, shape ``(m,)``, on the CPU.
        n_tasks: Number of episodes.
        generator: Source of all randomness, on the CPU, so that episodes are the same on every device.
        n_way: Classes per episode.
        k_shot: Support images per class.
        queries: Query images per class; no image is in both sets.
        counts: Number of images of every class, if they differ.
        rotations: Count each class, rotated by 0, 90, 180 and 270 degrees, as four classes.

    Returns:
        Float images in ``[0, 1]`` of shapes ``(n_tasks, n_way * shots, channels, height, width)`` and labels
        ``0 .. n_way - 1``.

    Raises:
        ValueError: If an episode needs more classes or images than there are, or if the images or the indices of their
            classes do not have this form.
    """
    if counts is None:
        _check_images(images, classes)
        counts = torch.full((images.shape[0],), images.shape[1])
        images = images.flatten(0, 1)
    turns = 4 if rotations else 1
    check_episode(n_way, k_shot, queries, len(classes) * turns, int(counts[classes].min()) if len(classes) else 0)
    chosen = torch.stack([torch.randperm(len(classes) * turns, generator=generator)[:n_way] for _ in range(n_tasks)])
    members = classes[chosen // turns]
    # The indices of the k+q smallest of one random number per image: a draw without replacement.
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


def _check_images(images: Tensor, classes: Tensor) -> None:
    if images.dim() != 5 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            "Expected argument `images` to have shape (classes, images per class, channels, height, width) and dtype "
            f"uint8 or float but got shape {tuple(images.shape)} and {images.dtype}. Grey images need a channel as "
            "well: images.unsqueeze(2)."
        )
    if classes.dim() != 1 or classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise ValueError(
            "Expected argument `classes` to hold the indices of classes, an integer tensor of shape (m,), but got "
            f"shape {tuple(classes.shape)} and {classes.dtype}. Pass torch.arange(len(images)) for all of them."
        )
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < len(images):
        raise ValueError(
            f"Expected argument `classes` to lie between 0 and {len(images) - 1}, one less than the classes in "
            f"`images`, but got {int(classes.min())} to {int(classes.max())}. Drop the indices beyond."
        )


def check_sampling(n_tasks: int, generator: torch.Generator, split: str) -> None:
    """Raise if the arguments of :meth:`TaskFamily.sample` are not allowed.

    Args:
        n_tasks: Number of tasks.
        generator: Source of all randomness.
        split: Name of the split.

    Raises:
        ValueError: If the number is below 1 or not an integer, or if there is no such split.
        TypeError: If the generator is not a torch.Generator.
    """
    check_count("n_tasks", n_tasks)
    check_choice("split", split, SPLITS)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"Expected argument `generator` to be a torch.Generator but got {shown(generator)}: the same seed must "
            "give the same episodes. Pass torch.Generator().manual_seed(0)."
        )


def check_episode(n_way: int, k_shot: int, queries: int, classes: int, images: int) -> None:
    """Raise if the data has too few classes or images for an episode.

    Args:
        n_way: Classes per episode.
        k_shot: Support images per class.
        queries: Query images per class.
        classes: Number of classes there are.
        images: Number of images per class there are.

    Raises:
        ValueError: If a number is below 1 or not an integer, or above what there is.
    """
    for name, number in (("n_way", n_way), ("k_shot", k_shot), ("queries", queries)):
        check_count(name, number)
    if n_way > classes:
        raise ValueError(
            f"An episode asks for n_way={n_way} classes but this split has {classes}: lower n_way, or add classes."
        )
    if k_shot + queries > images:
        raise ValueError(
            f"An episode asks for k_shot={k_shot} + queries={queries} different images per class but there are "
            f"{images}: lower one of them."
        )
