"""Images that are decoded once into a memory-mapped array, which is kept until their files change."""

from __future__ import annotations

import io
import json
import math
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lightning_maml_guard.tasks.image_files import DatasetError, Source
from lightning_maml_guard.utils.io import fingerprint, out_of_room, replacing, reserve, user_cache
from lightning_maml_guard.utils.warnings import GuardWarning

# Increased when decoding changes, so that older caches are not used.
_VERSION = 1


def cached_images(
    source: Source,
    names: Sequence[str],
    stamps: dict[str, tuple[int, int]],
    *,
    size: int,
    channels: int = 3,
    box: bool = False,
) -> np.ndarray:
    """Decode images by their names once; map the result into memory from then on, shape ``(images, channels, h, w)``.

    The array lies in ``.lmg_cache`` beside the source or, if that cannot be written, in
    ``$XDG_CACHE_HOME/lightning_maml_guard`` (``~/.cache``). Its name contains a fingerprint of the files' names, sizes
    and times or checksums. If the fingerprint changes, the images are decoded again and the old array is removed. The
    array is written to a temporary file and renamed, so that no reader sees half of it. Its space on the disk is
    reserved before the first image is decoded; where there is too little, the other folder is tried. Writing to the
    array does not change the file.

    Images are scaled to ``size`` pixels, with ``box`` by averages over boxes of pixels, and have 3 ``channels`` or, in
    grey, 1. ``stamps`` is what ``source.stamps()`` returns. Raises a DatasetError that names a damaged image, a
    PermissionError if neither folder can be written, and an OSError if neither has room.
    """
    version = [_VERSION, "box"] if box else _VERSION
    content = fingerprint(json.dumps([version, [[name, *stamps[name]] for name in names]]))[:24]
    place = fingerprint(str(source.path.resolve()))[:8]
    stem = f"{source.path.stem}-{place}-{channels}x{size}"
    shape = len(names), channels, size, size
    folders = source.path.parent / ".lmg_cache", user_cache()
    for folder in folders:
        path = folder / f"{stem}-{content}.npy"
        if path.is_file():
            found = _mapped(path, shape)
            if found is not None:
                return found
    full = []
    for folder in folders:
        path = folder / f"{stem}-{content}.npy"
        try:
            if not _writable(folder):
                continue
            _decode(source, names, path, shape, box)
        except OSError as error:
            if not out_of_room(error):
                raise
            full.append(folder)
            continue
        for older in folder.glob(f"{stem}-*.npy"):
            if older != path:
                older.unlink(missing_ok=True)
        mapped = _mapped(path, shape)
        assert mapped is not None
        return mapped
    needed = f"{math.prod(shape) / 1e6:.1f} MB"
    places = [f"{folder} (no room for {needed})" if folder in full else str(folder) for folder in folders]
    text = f"The decoded images of {source.path} can be written neither to {places[0]} nor to {places[1]}. "
    if full:
        raise OSError(f"{text}Let XDG_CACHE_HOME name a folder that can be written to, with {needed} free.")
    raise PermissionError(f"{text}Let XDG_CACHE_HOME name a folder that can be written to.")


def _decode(source: Source, names: Sequence[str], path: Path, shape: tuple[int, ...], box: bool) -> None:
    _, channels, size, _ = shape
    pillow()  # before the progress bar
    # Written, not mapped: on a full disk a write is an error, and a store into mapped memory ends Python.
    with replacing(path, mode=0o644) as temporary, temporary.open("wb") as stream:  # readable by all: it may be shared
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        reserve(stream, math.prod(shape))
        label = f"decoding {source.path.name}"
        for name in tqdm(names, desc=label, unit="image"):
            stream.write(decode(source.read(name), f"{name} of {source.path}", size, channels, box=box).tobytes())


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    # "c": a private copy on write; torch does not share read-only memory.
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        reason = str(error)
    else:
        if array.dtype == np.uint8 and array.shape == shape:
            return array
        reason = f"it holds {array.dtype} of shape {array.shape}"
    warnings.warn(f"The cache {path} is damaged ({reason}): decoding the images again.", GuardWarning, stacklevel=3)
    return None


def _writable(folder: Path) -> bool:
    present = next(each for each in (folder, *folder.parents) if each.is_dir())
    if not present.stat().st_mode & 0o222:
        return False  # root could still write there, but the folder was made read-only on purpose
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        if out_of_room(error):
            raise
        return False  # no permission, a read-only file system, or a file in the place of the folder


def pillow() -> Any:
    """Return Pillow's module ``Image``; raises a ModuleNotFoundError that says what to install."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Images are decoded by Pillow, which is not installed: pip install 'lightning-maml-guard[examples]'."
        ) from error
    return Image


def decode(
    data: bytes,
    name: str,
    size: int,
    channels: int = 3,
    *,
    box: bool = False,
) -> np.ndarray:
    """Decode an image to shape ``(channels, size, size)``, uint8; raises a DatasetError that names it if it is damaged.

    An image of this size is not scaled.
    """
    Image = pillow()  # noqa: N806
    try:
        # The formats are named: to guess one, Pillow hands an EPS file to Ghostscript, which runs it.
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            whole = image.convert("RGB" if channels == 3 else "L")
            if whole.size != (size, size):
                whole = whole.resize((size, size), Image.Resampling.BOX if box else Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise
        raise DatasetError(f"The image {name} is damaged ({error}). Unpack or copy it again.") from error
    pixels = np.asarray(whole, dtype=np.uint8)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]
