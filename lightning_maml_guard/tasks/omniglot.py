"""The images of Omniglot, from its official folders, its zip archives or one ``omniglot.npz``."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lightning_maml_guard.tasks.download import download
from lightning_maml_guard.tasks.image_cache import cached_images
from lightning_maml_guard.tasks.image_files import (
    DatasetError,
    FolderSource,
    Source,
    ZipSource,
    check_size,
)

# The archives of the data set's authors, with their MD5.
_AUTHORS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_PARTS = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
DRAWERS = 20


def download_omniglot(root: Path) -> None:
    """Download what of Omniglot is not in ``root``; raises a DatasetError if that fails."""
    if not (root / "omniglot.npz").is_file():
        for part, md5 in _PARTS.items():
            if _source(root, part) is None:
                download(f"{_AUTHORS}/{part}.zip", root / f"omniglot_{part}.zip", md5)


def load_omniglot(root: Path) -> np.ndarray:
    """Load the images of every character, shape ``(characters, 20, 28, 28)``, uint8, ink 255 on paper 0.

    Those of folders and archives are decoded once, see :func:`cached_images`. Raises a DatasetError if ``root`` holds
    neither these nor the npz file, or if what is found is damaged or incomplete.
    """
    if (root / "omniglot.npz").is_file():
        return _from_npz(root / "omniglot.npz")
    sources = {part: source for part in _PARTS if (source := _source(root, part))}
    if not sources:
        raise DatasetError(
            f"Omniglot was not found in {root.resolve()}. Omniglot(download=True) downloads it, at the command line "
            "--data.tasks.download true. Or put there omniglot_images_background.zip and "
            "omniglot_images_evaluation.zip (the archives images_background.zip and images_evaluation.zip of "
            "https://github.com/brendenlake/omniglot, folder python), their unpacked folders images_background and "
            "images_evaluation, or omniglot.npz; or name the folder they lie in, with LMG_DATA=/path, `root`, or "
            "--data /path at the command line."
        )
    decoded = []
    for part, source in sources.items():
        stamps = source.stamps()
        characters: dict[str, list[str]] = {}
        for name in stamps:
            if name.endswith(".png"):
                characters.setdefault(name.rpartition("/")[0], []).append(name)
        names = [name for character in sorted(characters) for name in characters[character]]
        ink = cached_images(source, names, stamps, size=28, channels=1, box=True)
        short = {name: len(found) for name, found in characters.items() if len(found) != DRAWERS}
        if short or not characters:
            name, number = next(iter(short.items()), (part, 0))
            raise DatasetError(
                f"Omniglot in {root.resolve()} is incomplete: {name} holds {number} images instead of {DRAWERS}"
                f"{f' (and {len(short) - 1} characters more)' if len(short) > 1 else ''}. Unpack the archive again."
            )
        decoded.append(255 - ink.reshape(-1, DRAWERS, 28, 28))
    return np.concatenate(decoded)


def _from_npz(path: Path) -> np.ndarray:
    try:
        opened: Any = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise TypeError("one array, not an archive of them")
        with opened as archive:
            check_size(archive.zip.getinfo("images.npy").file_size, "images.npy", path)
            images = archive["images"]
    except DatasetError:
        raise
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


def _source(root: Path, part: str) -> Source | None:
    if (root / part).is_dir():
        return FolderSource(root / part)
    archives = root / f"omniglot_{part}.zip", root / f"{part}.zip"
    return next((ZipSource(archive) for archive in archives if archive.is_file()), None)
