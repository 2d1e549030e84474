"""Unfinished work of a grid on disk, one file per chunk, so that the same call goes on from there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lightning_maml_guard.utils.io import write_atomically


class ChunkStore:
    """Saves and loads the progress of each chunk.

    Args:
        folder: The folder, made if it does not exist; None to save nothing.
        grid: Fingerprint of the grid that the chunks belong to.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, grid: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.grid = grid
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, chunk: int) -> dict[str, Any] | None:
        """Return what :meth:`save` was given for a chunk, or None; raise if it belongs to another grid."""
        path = self._path(chunk)
        if path is None or not path.is_file():
            return None
        found = torch.load(path, weights_only=True, map_location="cpu")
        if found["grid"] != self.grid:
            raise ValueError(
                f"Argument `partial`: {path} is of another grid (other rates, steps, data, weights, optimizer or chunk "
                "size). Name another folder, or remove this one."
            )
        return found["kept"]

    def save(self, chunk: int, progress: dict[str, Any]) -> None:
        """Save the progress of a chunk: tensors, numbers and texts, nested."""
        path = self._path(chunk)
        if path is not None:
            content = {"grid": self.grid, "kept": progress}
            write_atomically(path, lambda stream: torch.save(content, stream), mode=0o644)

    def _path(self, chunk: int) -> Path | None:
        return None if self.folder is None else self.folder / f"chunk_{chunk:05d}.pt"
