"""The basis vectors of a Krylov space: where they are stored, and products with them without a copy of them all.

A vector is cut into panels of some thousand entries, and a product works on a few panels of all vectors at a time. That
bounds the memory beside the vectors, streams vectors that are stored on the host, and is faster: a panel is still in
the cache when it is used again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_maml_guard.linalg.layout import WHOLE, Space

BASES = ("device", "cpu", "bfloat16")

# Entries of a panel, and of a group of panels. The caches of a host are small; on a device every launch costs time.
_HOST_PANEL, _HOST_GROUP = 1 << 14, 1 << 20
_DEVICE_PANEL, _DEVICE_GROUP = 1 << 20, 1 << 25


class Rest(NamedTuple):
    """A vector after projection on the space of a basis.

    Attributes:
        vector: The part orthogonal to the basis, in memory of its own, shape ``(*batch, n)``.
        coefficients: Coefficients of the part inside, by basis vector, shape ``(m, *batch)``.
        overlap: Norm of the last basis vector's products with those before it, shape ``batch``; 0 but for rounding.
    """

    vector: Tensor
    coefficients: Tensor
    overlap: Tensor


class Basis:
    """At most ``count`` orthonormal vectors like ``like``, shape ``(*batch, n)``, appended one by one.

    Memory of ``count`` vectors of ``n`` entries of ``s`` bytes: ``count * n * s`` bytes on the device (kind
    ``"device"``) or on the host (``"cpu"``, the same numbers), ``2 * count * n`` bytes on the device (``"bfloat16"``).
    In addition at most four vectors and two groups of panels: 8 MiB in float32 on the host, 256 MiB on a device (less
    if the basis is smaller).

    In bfloat16 a vector is rounded before anything is computed with it, then brought back to norm 1. The vector that is
    multiplied and the one that is kept are the same, and products with it have the usual precision.

    In a ``space`` that is split over processes each keeps its entries, and products are summed over all.
    """

    def __init__(self, count: int, like: Tensor, kind: str = "device", space: Space = WHOLE) -> None:
        self.exact = kind != "bfloat16"
        self.length, self._space = 0, space
        self._shape, self._size, self._kind = like.shape, like.shape[-1], like.dtype
        host = like.device.type == "cpu"
        panel, self._group = (_HOST_PANEL, _HOST_GROUP) if host else (_DEVICE_PANEL, _DEVICE_GROUP)
        self._blocks = math.prod(like.shape[:-1])
        self._pieces = max(math.ceil(self._size / panel), 1)  # a process may hold no entry
        self._width = max(math.ceil(self._size / self._pieces), 1)
        self._device = like.device
        self._offloaded = kind == "cpu" and not host
        self._store = torch.empty(
            (self._blocks * self._pieces, count, self._width),
            dtype=like.dtype if self.exact else torch.bfloat16,
            device="cpu" if self._offloaded else like.device,
            pin_memory=self._offloaded and like.is_cuda,
        )
        # Per block: the stored bfloat16 vector times this has norm 1.
        self._scales = like.new_ones(self._blocks, count)
        self._nothing = like.new_zeros(like.shape[:-1])

    def append(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a vector of norm 1. Return it as it is kept, and its distance from the one given, shape ``batch``."""
        index = self.length
        self.length += 1
        if self.exact:
            self._write(index, self._panels(vector))
            return vector, self._nothing
        rounded = vector.to(torch.bfloat16)
        kept = rounded.to(self._kind)
        norm = self._space.norm(kept).clamp(min=torch.finfo(self._kind).tiny)
        self._scales[:, index] = 1 / norm.reshape(self._blocks)
        kept /= norm
        self._write(index, self._panels(rounded))
        return kept, self._space.norm(kept - vector).squeeze(-1)

    def without(self, vector: Tensor) -> Rest:
        """Project a vector, which is not changed, on the complement of the space by repeated Gram-Schmidt.

        With ``V^T V = I + D`` a pass leaves ``|D|`` times what was there before. Two passes suffice for rounding in the
        vector's own precision (Kahan, Parlett), three for that of bfloat16.
        """
        rest = self._panels(vector.clone())
        taken, overlap = self._sweep(rest, None)
        coefficients = taken
        for _ in range(1 if self.exact else 2):
            taken, _ = self._sweep(rest, taken)
            coefficients = coefficients + taken
        self._sweep(rest, taken, last=True)
        return Rest(
            rest.reshape(self._blocks, -1)[:, : self._size].reshape(self._shape),
            coefficients.T.reshape(self.length, *self._shape[:-1]),
            overlap,
        )

    def combine(self, weights: Tensor) -> Tensor:
        """Return the weighted sum of the first ``len(weights)`` vectors, shape ``(*batch, n)``, on the device."""
        count = len(weights)
        scaled = weights.to(self._device, self._kind, non_blocking=True) * self._scales[:, :count]
        total = torch.empty((self._blocks * self._pieces, self._width), dtype=self._kind, device=self._device)
        spread = self._spread(scaled)
        for begin, end in self._groups(count):
            total[begin:end] = (self._load(begin, end, count) * spread[begin:end].unsqueeze(-1)).sum(1)
        return total.reshape(self._blocks, -1)[:, : self._size].reshape(self._shape)

    def products(self, rows: Tensor) -> Tensor:
        """Multiply vectors, shape ``(k, n)``, with those of a basis without batch dimensions, shape ``(k, m)``."""
        missing = self._pieces * self._width - self._size
        pieces = torch.nn.functional.pad(rows, (0, missing)).unflatten(-1, (self._pieces, self._width))
        parts = [
            torch.einsum("kpw,pmw->km", pieces[:, begin:end], self._load(begin, end, self.length))
            for begin, end in self._groups(self.length)
        ]
        return self._space.total(torch.stack(parts).sum(0)) * self._scales[:, : self.length]

    def dense(self) -> Tensor:
        """Copy all vectors to the device, shape ``(m, *batch, n)``."""
        return torch.stack([self.combine(row) for row in torch.eye(self.length)])

    def _sweep(self, rest: Tensor, taken: Tensor | None, *, last: bool = False) -> tuple[Tensor, Tensor]:
        """Subtract a combination of the vectors from the rest and compute its products with them, in one pass."""
        count, scales = self.length, self._scales[:, : self.length]
        spread = None if taken is None else self._spread(taken if self.exact else taken * scales)
        products, overlaps = [], []
        for begin, end in self._groups(count):
            known, part = self._load(begin, end, count), rest[begin:end]
            if spread is not None:
                part -= (known * spread[begin:end].unsqueeze(-1)).sum(1)
            if not last:
                products.append((known * part.unsqueeze(1)).sum(-1))
            if taken is None and not self.exact:
                overlaps.append((known * known[:, -1:]).sum(-1))
        found = rest if last else self._gathered(products)
        if self.exact or last:
            return found, self._nothing
        if not overlaps:
            return found * scales, self._nothing
        overlap = (self._gathered(overlaps) * scales * scales[:, -1:])[:, :-1]
        return found * scales, torch.linalg.vector_norm(overlap, dim=-1).reshape(self._shape[:-1])

    def _groups(self, count: int) -> list[tuple[int, int]]:
        """Ranges of panels to work on at once; the same wherever the vectors are stored, so that the bits are too."""
        panels = self._blocks * self._pieces
        step = max(1, self._group // (count * self._width))
        return [(begin, min(begin + step, panels)) for begin in range(0, panels, step)]

    def _load(self, begin: int, end: int, count: int) -> Tensor:
        if self._offloaded:  # by panel: only contiguous memory is copied without waiting
            pieces = [self._store[panel, :count].to(self._device, non_blocking=True) for panel in range(begin, end)]
            return torch.stack(pieces)
        return self._store[begin:end, :count].to(self._kind)

    def _write(self, index: int, panels: Tensor) -> None:
        if self._offloaded:
            for panel, values in enumerate(panels):
                self._store[panel, index].copy_(values, non_blocking=True)
        else:
            self._store[:, index] = panels

    def _panels(self, vector: Tensor) -> Tensor:
        """Cut vectors into panels, shape ``(blocks * pieces, width)``, padded with 0."""
        flat = vector.reshape(self._blocks, self._size)
        if self._pieces * self._width > self._size:
            padded = flat.new_zeros(self._blocks, self._pieces * self._width)
            padded[:, : self._size] = flat
            flat = padded
        return flat.reshape(self._blocks * self._pieces, self._width)

    def _spread(self, values: Tensor) -> Tensor:
        """Repeat one value per block for each of its panels, shape ``(blocks * pieces, k)``."""
        if self._pieces == 1:
            return values
        count = values.shape[-1]
        return values.unsqueeze(1).expand(-1, self._pieces, -1).reshape(self._blocks * self._pieces, count)

    def _gathered(self, parts: list[Tensor]) -> Tensor:
        """Sum products by panel to one per block, shape ``(blocks, k)``."""
        panels = parts[0] if len(parts) == 1 else torch.cat(parts)
        own = panels if self._pieces == 1 else panels.reshape(self._blocks, self._pieces, -1).sum(1)
        return self._space.total(own)
