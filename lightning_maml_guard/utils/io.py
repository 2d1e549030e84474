"""Files that are written whole or not at all, content fingerprints, and the user's cache folder."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@contextmanager
def replacing(path: str | os.PathLike[str], mode: int | None = None) -> Iterator[Path]:
    """Yield an empty temporary file beside ``path`` that becomes ``path`` on leaving, or is removed after an error.

    Without ``mode`` only the user can read the file, as ``mkstemp`` makes it.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(suffix=".part", prefix=target.stem, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(
    path: str | os.PathLike[str], content: str | bytes | Callable[[IO[bytes]], Any], mode: int | None = None
) -> None:
    """Write text (UTF-8), bytes, or what a function writes to a binary stream; see :func:`replacing`."""
    with replacing(path, mode) as temporary, temporary.open("wb") as stream:
        if callable(content):
            content(stream)
        else:
            stream.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def reserve(stream: IO[bytes], size: int) -> None:
    """Take ``size`` bytes of the disk from the stream's position on, which stays; raises an OSError without room.

    A file that only has that size (a sparse one) takes its room as it is written: hours later, or, mapped into memory,
    with a signal that ends Python.
    """
    stream.flush()
    start, block = stream.tell(), bytes(1 << 20)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(stream.fileno(), start, size)
            return
        except OSError as error:  # nor on every file system
            if out_of_room(error):
                raise
    for written in range(0, size, len(block)):
        stream.write(block[: size - written])
    stream.flush()
    stream.seek(start)


def out_of_room(error: OSError) -> bool:
    """Return True for a full disk, a full quota or a limit on the size of a file."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def fingerprint(*parts: Any) -> str:
    """Return a SHA-256 of the contents of texts, numbers, arrays and pytrees of tensors."""
    digest = hashlib.sha256()
    for part in parts:
        for leaf in tree_leaves(part) or [None]:
            if isinstance(leaf, Tensor):
                array = leaf.detach().cpu().contiguous()
                digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
                digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
            elif isinstance(leaf, np.ndarray):
                digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
            else:
                digest.update(repr(leaf).encode())
        digest.update(b"|")
    return digest.hexdigest()


def user_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/lightning_maml_guard``, by default in ``~/.cache``; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_maml_guard"
