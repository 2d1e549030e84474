"""Images decoded once into a memory-mapped array, kept until their source changes."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lightning_maml_guard.tasks.sources import Source, decode
from lightning_maml_guard.utils.io import fingerprint, replacing, user_cache
from lightning_maml_guard.utils.warnings import GuardWarning

# Raised when decoding changes, so that no older cache is taken for a new one.
_VERSION = 1


def cached_images(
    source: Source,
    names: Sequence[str],
    stamps: dict[str, tuple[int, int]],
    *,
    size: int,
    channels: int = 3,
    progress: bool = True,
) -> np.ndarray:
    """Decode images once, and map the result into memory from then on.

    The array lies in ``.lmg_cache`` beside the source or, where nothing can be written there, in
    ``$XDG_CACHE_HOME/lightning_maml_guard`` (``~/.cache``). Its name carries a fingerprint of the files' names, sizes
    and times or checksums; an array of another fingerprint is decoded anew and the old one removed. It is written to
    a temporary file and renamed, so that a reader never sees half of one.

    Args:
        source: Where the images lie.
        names: Their names, in the order of the array.
        stamps: What ``source.stamps()`` lists.
        size: Height and width to scale to, in pixels.
        channels: 3 for colours, 1 for grey.
        progress: Show a progress bar while decoding.

    Returns:
        Shape ``(images, channels, size, size)``, uint8, memory-mapped; writes to it do not reach the file.

    Raises:
        DatasetError: If an image is damaged; the message names it.
        PermissionError: If neither folder can be written to.
    """
    content = fingerprint(json.dumps([_VERSION, [[name, *stamps[name]] for name in names]]))[:24]
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
    writable = [each for each in folders if _writable(each)]
    if not writable:
        raise PermissionError(
            f"The decoded images of {source.path} can be written neither to {folders[0]} nor to {folders[1]}. Let "
            "XDG_CACHE_HOME name a folder that can be written to."
        )
    folder = writable[0]
    path = folder / f"{stem}-{content}.npy"
    with replacing(path, mode=0o644) as temporary:  # readable by all: the cache may be shared
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        label = f"decoding {source.path.name}"
        for index, name in enumerate(tqdm(names, desc=label, unit="image", disable=not progress)):
            array[index] = decode(source.read(name), f"{name} of {source.path}", size, channels)
        array.flush()
        del array
    for older in folder.glob(f"{stem}-*.npy"):
        if older != path:
            older.unlink(missing_ok=True)
    mapped = _mapped(path, shape)
    assert mapped is not None
    return mapped


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    # "c": a private copy on write, since torch refuses to share memory it must not write to.
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
        return False  # root could write there all the same, but whoever marked it read-only meant it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:  # no right to write, a read-only file system, a file in the folder's place: the answer is no
        return False
