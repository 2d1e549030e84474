"""Omniglot, from its official folders, its zip archives or one ``omniglot.npz``."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard._checks import check_count, check_flag, check_folder
from lightning_maml_guard.tasks.episodes import (
    SPLITS,
    EpisodeBatch,
    TaskFamily,
    check_episode,
    check_sampling,
    sample_n_way_k_shot,
)

_PARTS = ("images_background", "images_evaluation")
_DRAWERS = 20


class DatasetError(FileNotFoundError):
    """A data set is missing or damaged; the message says where to put what."""


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """Find the folder the data sets lie in.

    Args:
        root: The folder, or None for the environment variable ``LMG_DATA``, then ``./data``.

    Returns:
        The folder; it may not exist.
    """
    return Path(root if root is not None else os.environ.get("LMG_DATA", "data")).expanduser()


class Omniglot(TaskFamily):
    """Omniglot n-way k-shot classification at 28x28, ink 1 on paper 0.

    Reads whichever of these lies in ``root``, in this order: ``omniglot.npz``; the folders
    ``images_background`` and ``images_evaluation``; ``omniglot_images_background.zip`` and
    ``omniglot_images_evaluation.zip``. Characters are split, shuffled by ``split_seed``, into 1100 for
    training, 100 for validation and the rest for test (of fewer than 1300 characters: two thirds, a
    twelfth and the rest); a rotated character stays in its split.

    Args:
        root: Folder of the data (default: ``$LMG_DATA``, then ``./data``).
        n_way: Classes an episode.
        k_shot: Support images a class.
        queries: Query images a class.
        rotations: Count each character turned by 90, 180 and 270 degrees as further classes, in training.
        split_seed: Seed of the split over characters.

    Raises:
        ValueError: If an episode asks for less than 1 class or image, or more images than 20, or if another argument
            is not allowed.
    """

    def __init__(
        self,
        root: str | None = None,
        n_way: int = 5,
        k_shot: int = 1,
        queries: int = 1,
        rotations: bool = True,
        split_seed: int = 0,
    ) -> None:
        check_folder("root", root)
        check_episode(n_way, k_shot, queries, 1623, _DRAWERS)
        check_flag("rotations", rotations)
        check_count("split_seed", split_seed, 0)
        self.root = root
        self.n_way, self.k_shot, self.queries = n_way, k_shot, queries
        self.rotations, self.split_seed = rotations, split_seed
        self._images: Tensor | None = None
        self._classes: dict[str, Tensor] = {}

    def setup(self) -> None:
        """Load the images into memory (26 MB)."""
        if self._images is not None:
            return
        images = torch.from_numpy(load_omniglot(data_root(self.root))).unsqueeze(2)
        order = torch.from_numpy(np.random.default_rng(self.split_seed).permutation(len(images)))
        train, val = (1100, 100) if len(images) >= 1300 else (len(images) * 2 // 3, max(len(images) // 12, 1))
        self._classes = dict(zip(SPLITS, order.split([train, val, len(images) - train - val]), strict=True))
        for split, classes in self._classes.items():
            turns = 4 if self.rotations and split == "train" else 1
            check_episode(self.n_way, self.k_shot, self.queries, len(classes) * turns, images.shape[1])
        self._images = images

    def sample(self, n_tasks: int, generator: torch.Generator, split: str = "train") -> EpisodeBatch:
        """Sample episodes.

        Args:
            n_tasks: Number of episodes.
            generator: Source of all randomness.
            split: ``"train"``, ``"val"`` or ``"test"``.

        Returns:
            Images ``(n_tasks, n_way * shots, 1, 28, 28)`` and labels ``(n_tasks, n_way * shots)``.
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
            rotations=self.rotations and split == "train",
        )


def load_omniglot(root: Path) -> np.ndarray:
    """Load every character's images.

    Args:
        root: Folder that holds the npz file, the official folders or their zip archives.

    Returns:
        Array ``(characters, 20, 28, 28)``, uint8, ink 255 on paper 0.

    Raises:
        DatasetError: If nothing is found, or if what is found is damaged or incomplete.
    """
    if (root / "omniglot.npz").is_file():
        return _from_npz(root / "omniglot.npz")
    characters: dict[str, list[np.ndarray]] = {}
    found = False
    for part in _PARTS:
        folder, archive = root / part, root / f"omniglot_{part}.zip"
        archive = archive if archive.is_file() else root / f"{part}.zip"
        if folder.is_dir():
            source = _folder_images(folder)
        elif archive.is_file():
            source = _zip_images(archive)
        else:
            continue
        found = True
        for name, data in source:
            characters.setdefault(name.rpartition("/")[0], []).append(_decode(data, name))
    if not found:
        raise DatasetError(
            f"Omniglot was not found in {root.resolve()}. Put there omniglot_images_background.zip and "
            "omniglot_images_evaluation.zip (the archives images_background.zip and images_evaluation.zip of "
            "https://github.com/brendenlake/omniglot, folder python), their unpacked folders images_background and "
            "images_evaluation, or omniglot.npz; or name the folder they lie in, with LMG_DATA=/path or `root`."
        )
    short = {name: len(images) for name, images in characters.items() if len(images) != _DRAWERS}
    if short or not characters:
        name, number = next(iter(short.items()), (str(root), 0))
        raise DatasetError(
            f"Omniglot in {root.resolve()} is incomplete: {name} holds {number} images instead of {_DRAWERS}"
            f"{f' (and {len(short) - 1} characters more)' if len(short) > 1 else ''}. Unpack the archive again."
        )
    return np.stack([np.stack(characters[name]) for name in sorted(characters)])


def _from_npz(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = archive["images"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DatasetError(
            f"{path} is damaged ({error}). Copy it anew, or remove it to use the image archives."
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[2:] != (28, 28):
        raise DatasetError(
            f"{path} holds images of dtype {images.dtype} and shape {images.shape} where uint8 "
            "(characters, 20, 28, 28) is expected. Copy it anew, or remove it to use the image archives."
        )
    return images


def _folder_images(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.glob("*/*/*.png")):
        yield path.relative_to(folder.parent).as_posix(), path.read_bytes()


def _zip_images(archive: Path) -> Iterator[tuple[str, bytes]]:
    # Members are read, never extracted: no path is made from a name in the archive.
    try:
        with zipfile.ZipFile(archive) as members:
            for name in sorted(members.namelist()):
                if name.endswith(".png") and not name.startswith("__MACOSX/"):
                    yield name, members.read(name)
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, RuntimeError) as error:
        raise DatasetError(f"{archive} is damaged ({error}). Download or copy it again.") from error


def _decode(data: bytes, name: str) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        # The format by name: asked to guess, Pillow hands an EPS file to Ghostscript, which runs it.
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            small = image.convert("L").resize((28, 28), Image.Resampling.BOX)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise DatasetError(f"The image {name} is damaged ({error}). Unpack or copy the archive again.") from error
    return 255 - np.asarray(small, dtype=np.uint8)
