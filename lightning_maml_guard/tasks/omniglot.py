"""Omniglot's images, from its official folders, its zip archives or one ``omniglot.npz``."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lightning_maml_guard.tasks.sources import DatasetError

_PARTS = ("images_background", "images_evaluation")
DRAWERS = 20


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
