"""Few-shot image classification: Omniglot, miniImageNet and any folder of class folders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.tasks.episodes import SPLITS, check_episode
from lightning_maml_guard.tasks.image_family import ImageFamily, Splits, decoded
from lightning_maml_guard.tasks.image_files import (
    IMAGES,
    DatasetError,
    FolderSource,
    Line,
    Source,
    ZipSource,
    data_root,
    read_split,
)
from lightning_maml_guard.tasks.omniglot import DRAWERS, download_omniglot, load_omniglot
from lightning_maml_guard.utils.checks import check_count, check_flag, check_folder, shown

__all__ = ["ClassFolders", "DatasetError", "ImageFamily", "MiniImageNet", "Omniglot", "data_root", "load_omniglot"]


class Omniglot(ImageFamily):
    """Omniglot n-way k-shot classification at 28x28, ink 1 on paper 0.

    Reads the first of these that is in ``root``: ``omniglot.npz``; the folders ``images_background`` and
    ``images_evaluation``; ``omniglot_images_background.zip`` and ``omniglot_images_evaluation.zip``. The characters are
    shuffled by ``split_seed`` and split into 1100 for training, 100 for validation and the rest for test (of fewer than
    1300 characters: two thirds, a twelfth and the rest). A rotated character stays in its split.

    Args:
        root: Folder of the data (default: ``$LMG_DATA``, then ``./data``).
        n_way: Classes per episode.
        k_shot: Support images per class.
        queries: Query images per class.
        rotations: Count each character, rotated by 90, 180 and 270 degrees, as further classes, in training.
        split_seed: Seed of the split over characters.
        download: Download from the data set's authors what is not in ``root`` (14 MB).

    Raises:
        ValueError: If an episode needs less than 1 class or image, or more images than 20, or if another argument is
            not allowed.
    """

    def __init__(
        self,
        root: str | None = None,
        n_way: int = 5,
        k_shot: int = 1,
        queries: int = 1,
        rotations: bool = True,
        split_seed: int = 0,
        download: bool = False,
    ) -> None:
        check_folder("root", root)
        check_episode(n_way, k_shot, queries, 1623, DRAWERS)
        check_flag("rotations", rotations)
        check_flag("download", download)
        check_count("split_seed", split_seed, 0, math.inf)
        super().__init__(n_way, k_shot, queries, rotations)
        self.root, self.split_seed, self.download = root, split_seed, download

    def load(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Load the images into memory (26 MB); download them first if asked to.

        Returns:
            See :meth:`ImageFamily.load`.
        """
        root = data_root(self.root)
        if self.download:
            download_omniglot(root)
        images = torch.from_numpy(load_omniglot(root)).unsqueeze(2)
        order = torch.from_numpy(np.random.default_rng(self.split_seed).permutation(len(images)))
        train, val = (1100, 100) if len(images) >= 1300 else (len(images) * 2 // 3, max(len(images) // 12, 1))
        classes = dict(zip(SPLITS, order.split([train, val, len(images) - train - val]), strict=True))
        return images.flatten(0, 1), torch.full((len(images),), images.shape[1]), classes


class MiniImageNet(ImageFamily):
    """miniImageNet n-way k-shot classification (Ravi and Larochelle's split), RGB in [0, 1].

    Reads what is in ``root``: ``images/`` with ``train.csv``, ``val.csv``, ``test.csv`` (columns ``filename`` and
    ``label``) beside it; the same in a folder ``miniimagenet``; or one ``miniimagenet*.zip`` of it. Case does not
    matter, and ``root`` may also be the archive itself. The images are decoded once, see :func:`cached_images`.

    Args:
        root: Folder of the data, or the archive (default: ``$LMG_DATA``, then ``./data``).
        n_way: Classes per episode.
        k_shot: Support images per class.
        queries: Query images per class.
        image_size: Height and width, in pixels; other images are scaled to it.

    Raises:
        ValueError: If an episode needs less than 1 class or image, or if the size is below 1.
    """

    def __init__(
        self, root: str | None = None, n_way: int = 5, k_shot: int = 1, queries: int = 15, image_size: int = 84
    ) -> None:
        check_folder("root", root)
        check_episode(n_way, k_shot, queries, 100, 600)
        check_count("image_size", image_size)
        super().__init__(n_way, k_shot, queries)
        self.root, self.image_size = root, image_size

    def load(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Map the decoded images into memory; decode them first if that has not been done.

        Returns:
            See :meth:`ImageFamily.load`.

        Raises:
            DatasetError: If the data is missing or damaged.
        """
        source = _mini_imagenet(data_root(self.root))
        stamps = source.stamps()
        tops = {name.removesuffix("train.csv") for name in stamps if PurePosixPath(name).name == "train.csv"}
        top = min(tops, key=len, default="")
        missing = [f"{split}.csv" for split in SPLITS if f"{top}{split}.csv" not in stamps]
        if missing:
            raise DatasetError(f"{source.path} lacks {', '.join(missing)} of miniImageNet. {_WANTED}")
        taken: dict[str, Line] = {}
        splits = {split: read_split(source, f"{top}{split}.csv", f"{top}images/", stamps, taken) for split in SPLITS}
        return decoded(source, stamps, splits, self.image_size, 3)


class ClassFolders(ImageFamily):
    """n-way k-shot classification from class folders: ``root/CLASS/*.png`` (or jpg, jpeg).

    If ``root`` has the folders ``train``, ``val`` and ``test``, each holds the class folders of its split
    (``root/train/CLASS/*.png``). Otherwise the classes are split at random, by shares. Images are scaled to one size
    and decoded once, see :func:`cached_images`. Classes may differ in their number of images.

    Args:
        root: The folder, or a zip archive of it.
        n_way: Classes per episode.
        k_shot: Support images per class.
        queries: Query images per class.
        image_size: Height and width, in pixels.
        channels: 3 for colours, 1 for grey.
        shares: Shares of the classes for training, validation and test; unused with folders for the splits.
        split_seed: Seed of the split.

    Raises:
        ValueError: If a number is not allowed.
    """

    def __init__(
        self,
        root: str,
        n_way: int = 5,
        k_shot: int = 1,
        queries: int = 15,
        image_size: int = 84,
        channels: int = 3,
        shares: Sequence[float] = (0.64, 0.16, 0.2),
        split_seed: int = 0,
    ) -> None:
        check_folder("root", root)
        for name, number in (("n_way", n_way), ("k_shot", k_shot), ("queries", queries), ("image_size", image_size)):
            check_count(name, number)
        check_count("channels", channels)
        if channels not in {1, 3}:
            raise ValueError(
                f"Expected argument `channels` to be 3 (colours) or 1 (grey) but got {channels!r}. Choose one of them."
            )
        numbers = isinstance(shares, Sequence) and all(isinstance(share, (int, float)) for share in shares)
        if not numbers or len(shares) != 3 or min(shares) < 0 or not 0 < sum(shares) < math.inf:
            raise ValueError(
                f"Expected argument `shares` to be 3 finite numbers of at least 0, one above, but got {shown(shares)}. "
                "Pass the shares of training, validation and test, such as (0.64, 0.16, 0.2)."
            )
        check_count("split_seed", split_seed, 0, math.inf)
        super().__init__(n_way, k_shot, queries)
        self.root, self.image_size, self.channels = root, image_size, channels
        self.shares, self.split_seed = tuple(shares), split_seed

    def load(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Map the decoded images into memory; decode them first if that has not been done.

        Returns:
            See :meth:`ImageFamily.load`.

        Raises:
            DatasetError: If there are no class folders with images, or if an image is damaged.
        """
        root = Path(self.root).expanduser()
        source: Source = ZipSource(root) if root.is_file() else FolderSource(root)
        stamps = source.stamps() if root.exists() else {}
        by_class: dict[str, list[str]] = {}
        for name in stamps:
            if name.lower().endswith(IMAGES) and "/" in name:
                by_class.setdefault(name.rpartition("/")[0], []).append(name)
        if not by_class:
            raise DatasetError(
                f"No class folders with images were found in {root.resolve()}. Put there one folder per class "
                f"({', '.join(IMAGES)} files in it), or such folders in train, val and test."
            )
        split_of = {label: set(SPLITS) & set(PurePosixPath(label).parts[:-1]) for label in by_class}
        if all(len(found) == 1 for found in split_of.values()):
            splits: Splits = {
                split: {label: names for label, names in by_class.items() if split in split_of[label]}
                for split in SPLITS
            }
        else:
            labels = sorted(by_class)
            order = np.random.default_rng(self.split_seed).permutation(len(labels))
            bounds = np.round(np.cumsum(self.shares)[:-1] / sum(self.shares) * len(labels)).astype(int)
            parts = np.split(order, bounds)
            splits = {
                split: {labels[i]: by_class[labels[i]] for i in sorted(part)}
                for split, part in zip(SPLITS, parts, strict=True)
            }
        return decoded(source, stamps, splits, self.image_size, self.channels)


_WANTED = (
    "Put there the folder images with train.csv, val.csv and test.csv beside it (columns filename, label; Ravi "
    "and Larochelle's split), or a miniimagenet*.zip of them; or name the folder, with LMG_DATA=/path, `root`, or "
    "--data /path at the command line. It cannot be downloaded here: its images are ImageNet's, whose terms forbid to "
    "pass them on. Ask for them at https://image-net.org/download; the three files of the split are in "
    "https://github.com/twitter-research/meta-learning-lstm, folder data/miniImagenet."
)


def _mini_imagenet(root: Path) -> Source:
    if root.is_file():
        return ZipSource(root)
    entries = sorted(root.iterdir()) if root.is_dir() else []
    if (root / "train.csv").is_file():
        return FolderSource(root)
    for each in entries:
        if each.is_dir() and each.name.lower().replace("-", "") == "miniimagenet":
            return FolderSource(each)
    named = [e for e in entries if e.name.lower().replace("-", "").startswith("miniimagenet") and e.suffix == ".zip"]
    archives = [e for e in named if e.is_file()]
    if len(archives) > 1:
        raise DatasetError(
            f"Several archives of miniImageNet lie in {root.resolve()}: {', '.join(e.name for e in archives)}. Name "
            "the one to read with `root`."
        )
    if not archives:
        raise DatasetError(f"miniImageNet was not found in {root.resolve()}. {_WANTED}")
    return ZipSource(archives[0])
