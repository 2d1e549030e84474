"""Where each named parameter lies in a flat vector."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_maml_guard.utils.shards import local

Params = dict[str, Tensor]


class Space:
    """Where the entries of vectors lie: all of them on this process. Other spaces split them over several.

    ``rows`` counts the entries over all processes; None: they are all here.
    """

    rows: int | None = None

    def total(self, partial: Tensor) -> Tensor:
        """Sum what each process computed of its entries."""
        return partial

    def largest(self, partial: Tensor) -> Tensor:
        """Take the maximum of what each process computed of its entries."""
        return partial

    def norm(self, vector: Tensor) -> Tensor:
        """Compute the norms of vectors of shape ``(*leading, n)``, shape ``(*leading, 1)``."""
        return torch.linalg.vector_norm(vector, dim=-1, keepdim=True)

    def start(self, shape: Sequence[int], like: Tensor, seed: int = 0) -> Tensor:
        """Draw standard normal start vectors of a shape whose last entry is ``rows``; this process's entries of them.

        They are drawn on the CPU, so that they are the same on every device and rank, without touching any global
        random state, and take the dtype and device of ``like``.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        return drawn.to(like.device, like.dtype, non_blocking=True)


WHOLE = Space()


class Layout:
    """Where each named parameter lies in a flat vector of a space.

    Raises a ValueError unless there are parameters, all floating point and on one device.
    """

    def __init__(self, params: Params, space: Space = WHOLE) -> None:
        if not params:
            raise ValueError("Expected `params` to hold at least one parameter but it is empty: nothing is trained.")
        wrong = {name: str(value.dtype) for name, value in params.items() if not value.is_floating_point()}
        if wrong:
            raise ValueError(f"Expected `params` to be floating point but got {wrong}.")
        devices = {str(value.device) for value in params.values()}
        if len(devices) != 1:
            raise ValueError(f"Expected `params` on one device but got {sorted(devices)}.")
        self.shapes = {name: value.shape for name, value in params.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.size = sum(self.sizes)  # on this process
        self.space = space
        self.rows = self.size if space.rows is None else space.rows

    def flatten(self, values: Params, batch: int = 0) -> Tensor:
        """Concatenate named tensors, each with ``batch`` leading dimensions, to vectors of shape ``(*leading, n)``."""
        return torch.cat([rows_of(local(values[name]), batch) for name in self.shapes], dim=-1)

    def split(self, vector: Tensor) -> Params:
        """Cut vectors of shape ``(*leading, n)`` into named tensors of shape ``(*leading, *parameter shape)``."""
        pieces = vector.split(self.sizes, dim=-1)
        leading = vector.shape[:-1]
        return {
            name: piece.reshape(leading + shape)
            for piece, (name, shape) in zip(pieces, self.shapes.items(), strict=True)
        }


def rows_of(value: Tensor, batch: int = 1) -> Tensor:
    """Flatten what follows ``batch`` leading dimensions; of a scalar parameter nothing does."""
    return value.reshape(*value.shape[:batch], -1)


def real_pairs(params: Params) -> Params:
    """View complex tensors as real ones with a last dimension of 2: what an optimizer steps and a spectrum is of."""
    return {name: torch.view_as_real(value) if value.is_complex() else value for name, value in params.items()}


def unpaired(pairs: Params, like: Params) -> Params:
    """Undo :func:`real_pairs` where ``like`` is complex; gradients by real pairs become torch's complex gradients."""
    # Not view_as_complex: a pair may lie at any offset of a flat vector.
    return {
        name: torch.complex(*value.unbind(-1)) if like[name].is_complex() else value for name, value in pairs.items()
    }
