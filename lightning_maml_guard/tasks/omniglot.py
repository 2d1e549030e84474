"""The images of Omniglot, from its official folders, its zip archives or one ``omniglot.npz``."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from lightning_maml_guard.tasks.image_files import (
    DatasetError,
    FolderSource,
    Source,
    ZipSource,
    check_size,
    decode,
)

_PARTS = ("images_background", "images_evaluation")
DRAWERS = 20


def load_omniglot(root: Path) -> np.ndarray:
    """Load the images of every character.

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
        source = _source(root, part)
        if source is None:
            continue
        found = True
        for name in source.stamps():
            if name.endswith(".png"):
                # The names in an archive begin with the name of the part already.
                full = f"{part}/{name}" if isinstance(source, FolderSource) else name
                image = decode(source.read(name), full, 28, 1, formats=("PNG",), box=True)
                characters.setdefault(full.rpartition("/")[0], []).append(255 - image[0])
    if not found:
        raise DatasetError(
            f"Omniglot was not found in {root.resolve()}. Put there omniglot_images_background.zip and "
            "omniglot_images_evaluation.zip (the archives images_background.zip and images_evaluation.zip of "
            "https://github.com/brendenlake/omniglot, folder python), their unpacked folders images_background and "
            "images_evaluation, or omniglot.npz; or name the folder they lie in, with LMG_DATA=/path or `root`."
        )
    short = {name: len(images) for name, images in characters.items() if len(images) != DRAWERS}
    if short or not characters:
        name, number = next(iter(short.items()), (str(root), 0))
        raise DatasetError(
            f"Omniglot in {root.resolve()} is incomplete: {name} holds {number} images instead of {DRAWERS}"
            f"{f' (and {len(short) - 1} characters more)' if len(short) > 1 else ''}. Unpack the archive again."
        )
    return np.stack([np.stack(characters[name]) for name in sorted(characters)])


def _from_npz(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
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
