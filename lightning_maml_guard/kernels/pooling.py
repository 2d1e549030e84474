"""2x2 max-pooling in two parts: which entry of each window is the largest, and linear maps that take or put it there.

The first part is constant under differentiation. Its result is an index into each image or, for images in channels-last
layout, a mask of 0 and 1 for each of a window's four places. An odd last row or column is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_maml_guard.kernels.channels_last import is_channels_last

# Row and column of a window's places, in the order in which max-pooling prefers equal entries.
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))
# Entries of a block of images where intermediate results are dropped: they then stay in a CPU's cache, and no large
# piece of memory is mapped for them.
_BLOCK = 2**18


def blocks(z: Tensor) -> tuple[Tensor, ...]:
    """Split a batch of images on a CPU into parts that fit its cache."""
    return z.split(max(1, _BLOCK // max(1, z.shape[1:].numel()))) if z.device.type == "cpu" else (z,)


def even(z: Tensor) -> Tensor:
    """Drop an odd last row or column."""
    return z[..., : z.shape[-2] // 2 * 2, : z.shape[-1] // 2 * 2]


def places(z: Tensor) -> tuple[Tensor, ...]:
    """Return the four entries of all windows, as views."""
    z = even(z)
    return tuple(z[..., row::2, column::2] for row, column in PLACES)


def choose(out: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Write the place of the largest of four entries to ``out``, 0 to 3; return the larger of each row.

    In floating point, for which torch's comparisons are vectorised.
    """
    top, bottom = torch.maximum(a, b), torch.maximum(c, d)
    upper = torch.gt(b, a, out=torch.empty_like(top))
    lower = torch.gt(d, c, out=torch.empty_like(top)).add_(2)
    torch.lerp(upper, lower, torch.gt(bottom, top, out=torch.empty_like(top)), out=out)
    return top, bottom


def is_at(place: int, code: Tensor, out: Tensor | None = None) -> Tensor:
    """Return 1 where :func:`choose` wrote this place, else 0, in floating point."""
    return torch.eq(code, place, out=torch.empty_like(code) if out is None else out)


def largest(z: Tensor) -> Tensor:
    """Max-pool with operations that torch can differentiate in every way."""
    z = even(z)
    rows = torch.maximum(z[..., 0::2, :], z[..., 1::2, :])
    return torch.maximum(rows[..., 0::2], rows[..., 1::2])


def winners(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Find the largest entry of each window, the smallest where ``gamma < 0``, and where it is.

    Returns the entries, shape ``(n, channels, h, w)``, and their indices of that shape in int64, or for channels-last
    images the masks ``(4, n, channels, h, w)`` in floating point.
    """
    with torch.no_grad():
        # On a device the question would make the host wait, and a capture in a CUDA graph fail.
        signed = z.device.type != "cpu" or bool((gamma < 0).any())
        sign = torch.where(gamma < 0, -1, 1).to(z.dtype).reshape(-1, 1, 1) if signed else None
        parts = (each if sign is None else each * sign for each in blocks(z))
        if is_channels_last(z):
            found, masks = _masks(parts, z)
            return found if sign is None else found * sign, masks
        index = _index(parts, z)
        return take(z, index), index


def _masks(parts: Iterator[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    count, channels, height, width = like.shape
    half = height // 2, width // 2
    found = like.new_empty(count, *half, channels).permute(0, 3, 1, 2)
    masks = like.new_empty(4, count, *half, channels).permute(0, 1, 4, 2, 3)
    at = 0
    for part in parts:
        here = slice(at, at + len(part))
        code = torch.empty_like(found[here])
        top, bottom = choose(code, *places(part))
        torch.maximum(top, bottom, out=found[here])
        for place, mask in enumerate(masks[:, here]):
            is_at(place, code, mask)
        at += len(part)
    return found, masks


def _index(parts: Iterator[Tensor], like: Tensor) -> Tensor:
    height, half, width = like.shape[-2] // 2, like.shape[-1] // 2, like.shape[-1]
    first = torch.arange(0, 2 * height, 2, device=like.device).float().unsqueeze(-1) * width
    first = first + torch.arange(0, 2 * half, 2, device=like.device)
    return torch.cat([(row * width + column + first).long() for row, column in map(_row_and_column, parts)])


def _row_and_column(z: Tensor) -> tuple[Tensor, Tensor]:
    # Not `choose`: of two equal entries on the diagonal this takes the one in the left column. In float32, whose
    # integers are exact up to 2^24. Whole rows are compared first: in contiguous images their entries are neighbours.
    z = even(z)
    upper, lower = z[..., 0::2, :], z[..., 1::2, :]
    rows = torch.maximum(upper, lower)
    column = (rows[..., 1::2] > rows[..., 0::2]).float()
    row = torch.gt(lower, upper, out=torch.empty_like(rows, dtype=torch.float32))
    return torch.lerp(row[..., 0::2], row[..., 1::2], column), column


def take(z: Tensor, where: Tensor) -> Tensor:
    """Take each window's entry at the index or mask."""
    if where.is_floating_point():
        return _Take.apply(z, where)
    return z.flatten(2).gather(2, where.flatten(2)).view(where.shape)


def put(base: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Add each window's value at the index or mask: the adjoint of :func:`take`. Without gradients in place."""
    if where.is_floating_point():
        if torch.is_grad_enabled():
            return base + _Put.apply(values, where, base.shape)
        return _put(base, where, values)
    flat = base.flatten(2)
    add = flat.scatter_add if torch.is_grad_enabled() else flat.scatter_add_
    return add(2, where.flatten(2), values.flatten(2)).view(base.shape)


class _Take(torch.autograd.Function):
    """Linear in ``z``, with :class:`_Put` as its adjoint, so that both can be differentiated at every order."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, masks: Tensor) -> Tensor:
        ctx.shape = z.shape
        ctx.save_for_backward(masks)
        a, b, c, d = places(z)
        found = (a * masks[0]).addcmul_(b, masks[1])
        return found.addcmul_(c, masks[2]).addcmul_(d, masks[3])

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (masks,) = ctx.saved_tensors
        return _Put.apply(outputs[0], masks, ctx.shape), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, masks: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(masks)
        return _put(torch.empty(shape, dtype=values.dtype, memory_format=torch.channels_last).zero_(), masks, values)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (masks,) = ctx.saved_tensors
        return _Take.apply(outputs[0], masks), None, None


def _put(base: Tensor, masks: Tensor, values: Tensor) -> Tensor:
    for entry, mask in zip(places(base), masks, strict=True):
        entry.addcmul_(values, mask)
    return base
