"""A grid's unfinished work on disk: one file a chunk, replaced atomically, refused where it belongs to another grid."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def fingerprint(*parts: Any) -> str:
    """Make one name of everything that decides a result.

    Args:
        *parts: Texts, numbers, arrays and pytrees of tensors.

    Returns:
        A hash of their contents.
    """
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


class Partial:
    """Where chunks are kept while a grid trains.

    Args:
        folder: The folder, made if need be; None to keep nothing.
        name: Fingerprint of the grid.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, name: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.name = name
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, chunk: int) -> dict[str, Any] | None:
        """Read what is kept of a chunk.

        Args:
            chunk: Its number.

        Returns:
            What :meth:`save` was given, or None.

        Raises:
            ValueError: If it belongs to another grid.
        """
        path = self._path(chunk)
        if path is None or not path.is_file():
            return None
        found = torch.load(path, weights_only=True, map_location="cpu")
        if found["grid"] != self.name:
            raise ValueError(
                f"Argument `partial`: {path} is of another grid (other rates, steps, data, weights, optimizer or chunk "
                "size). Name another folder, or remove this one."
            )
        return found["kept"]

    def save(self, chunk: int, kept: dict[str, Any]) -> None:
        """Keep a chunk.

        Args:
            chunk: Its number.
            kept: Tensors, numbers and texts, nested.
        """
        path = self._path(chunk)
        if path is None:
            return
        temporary = path.with_suffix(f".{os.getpid()}.part")
        torch.save({"grid": self.name, "kept": kept}, temporary)
        os.replace(temporary, path)

    def _path(self, chunk: int) -> Path | None:
        return None if self.folder is None else self.folder / f"chunk_{chunk:05d}.pt"
