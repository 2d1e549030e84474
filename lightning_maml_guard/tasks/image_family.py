"""The base class of families of image classification tasks: all images in memory, episodes made on their device."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_maml_guard.tasks.episodes import (
    EpisodeBatch,
    TaskFamily,
    check_episode,
    check_sampling,
    sample_n_way_k_shot,
)
from lightning_maml_guard.tasks.image_cache import cached_images
from lightning_maml_guard.tasks.image_files import DatasetError, Source

# Names of the images by class, for each split.
Splits = dict[str, dict[str, list[str]]]


class ImageFamily(TaskFamily):
    """n-way k-shot episodes, made on the device of the images, which are all held in memory.

    Args:
        n_way: Classes per episode.
        k_shot: Support images per class.
        queries: Query images per class.
        rotations: Count each class, rotated by 90, 180 and 270 degrees, as further classes, in training.
    """

    def __init__(self, n_way: int, k_shot: int, queries: int, rotations: bool = False) -> None:
        self.n_way, self.k_shot, self.queries, self.rotations = n_way, k_shot, queries, rotations
        self._images: Tensor | None = None
        self._counts = torch.zeros(0, dtype=torch.long)
        self._classes: dict[str, Tensor] = {}

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Load the images.

        Returns:
            All images, class after class, shape ``(images, channels, height, width)``, uint8; the number of images of
            each class; the indices of the classes of each split.
        """

    def setup(self) -> None:
        """Load the images, once.

        Raises:
            ValueError: If an episode needs more classes or images than there are.
        """
        if self._images is not None:
            return
        images, self._counts, self._classes = self.load()
        for split, classes in self._classes.items():
            turns = 4 if self.rotations and split == "train" else 1
            least = int(self._counts[classes].min()) if len(classes) else 0
            check_episode(self.n_way, self.k_shot, self.queries, len(classes) * turns, least)
        self._images = images

    def to(self, device: torch.device) -> None:
        """Move the images to a device, so that episodes are made there.

        Args:
            device: The device.
        """
        self.setup()
        assert self._images is not None
        self._images = self._images.to(device)

    def sample(self, n_tasks: int, generator: torch.Generator, split: str = "train") -> EpisodeBatch:
        """Sample episodes.

        Args:
            n_tasks: Number of episodes.
            generator: Source of all randomness.
            split: ``"train"``, ``"val"`` or ``"test"``.

        Returns:
            Images ``(n_tasks, n_way * shots, channels, height, width)`` in ``[0, 1]`` and labels
            ``(n_tasks, n_way * shots)``.
        """
        check_sampling(n_tasks, generator, split)
        self.setup()
        assert self._images is not None
        return sample_n_way_k_shot(
            self._images,
            self._classes[split],
            n_tasks,
            generator,
            n_way=self.n_way,
            k_shot=self.k_shot,
            queries=self.queries,
            counts=self._counts,
            rotations=self.rotations and split == "train",
        )


def decoded(
    source: Source, stamps: dict[str, tuple[int, int]], splits: Splits, size: int, channels: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Decode the images of all splits, or map them into memory if they have been decoded before.

    Args:
        source: Where the images are read from.
        stamps: What ``source.stamps()`` returns.
        splits: Names of the images by class, for each split.
        size: Height and width, in pixels.
        channels: 3 for colours, 1 for grey.

    Returns:
        What :meth:`ImageFamily.load` returns.

    Raises:
        DatasetError: If a class is in two splits, or if an image is damaged.
    """
    names: list[str] = []
    counts: list[int] = []
    classes: dict[str, Tensor] = {}
    seen: dict[str, str] = {}
    for split, by_class in splits.items():
        twice = sorted(set(by_class) & set(seen))
        if twice:
            raise DatasetError(
                f"{source.path}: the class {twice[0]!r} is in {seen[twice[0]]} and in {split}. Classes of the splits "
                "must differ: correct the split files."
            )
        seen |= dict.fromkeys(by_class, split)
        classes[split] = torch.arange(len(counts), len(counts) + len(by_class))
        for files in by_class.values():
            names += files
            counts.append(len(files))
    images = cached_images(source, names, stamps, size=size, channels=channels)
    return torch.from_numpy(images), torch.tensor(counts), classes
