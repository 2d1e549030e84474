"""The first block of a network whose images have one channel: convolution, batch norm, ReLU and pooling from patches.

Each pooled window sees ``v``, the 4x4 pixels around it, and a filter at the window's place ``k`` is a vector ``e_k``
of its 9 weights and 7 zeros, so that ``z_k = v . e_k``. The images are constant, and so is their covariance ``C``: a
channel's mean and variance, ``mean_k(v_mean . e_k)`` and ``mean_k(e_k^T C e_k + (v_mean . e_k - mean)^2)``, and their
derivatives come without a pass over the activations, which are as many times as large as the images as there are
filters. What is left are matrix products, and operations on a quarter of the activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_maml_guard.utils.functorch import inside_transform

_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))
# Pixels below which calls take longer than what they compute.
_FEW = 2**14
# Windows treated at once: with 64 filters a result of a quarter of a megabyte.
_ROWS = 1024


def applies(images: Tensor, conv: nn.Conv2d) -> bool:
    """Say whether a block begins like that.

    Args:
        images: Shape ``(n, channels, height, width)``.
        conv: The block's convolution, neither grouped nor dilated; a pooling follows.

    Returns:
        Whether there is one channel of an even height and width on a CPU, and filters of 3x3 at every pixel.
    """
    if inside_transform() or images.dim() != 4 or images.shape[1] != 1 or images.shape[2] % 2 or images.shape[3] % 2:
        return False
    if (
        images.numel() < _FEW
        or images.dtype not in (torch.float32, torch.float64)
        or images.dtype != conv.weight.dtype
        or images.requires_grad
    ):
        return False
    shape = conv.kernel_size, conv.stride, conv.padding
    return images.device.type == "cpu" and shape == ((3, 3), (1, 1), (1, 1)) and not torch.is_autocast_enabled("cpu")


def first_block(images: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Convolve without bias, normalise over the batch, rectify, and pool.

    Args:
        images: Shape ``(n, 1, height, width)``, both even.
        weight: Filters, shape ``(channels, 1, 3, 3)``.
        gamma: Scale, shape ``(channels,)``.
        beta: Shift, shape ``(channels,)``; the letters are batch norm's own.
        eps: Added to the variance.

    Returns:
        The activations, shape ``(n, channels, height / 2, width / 2)``; right at every order of differentiation.
    """
    count, _, height, width = images.shape
    windows = F.pad(images[:, 0], (1, 1, 1, 1)).unfold(1, 4, 2).unfold(2, 4, 2).reshape(-1, 16)
    filters = torch.stack(
        [F.pad(weight[:, 0], (column, 1 - column, row, 1 - row)).flatten(1) for row, column in _PLACES]
    )
    # In double precision: a filter may take nearly all of what neighbouring pixels have in common away.
    wide = windows.double()
    centre = wide.mean(0)
    centred = wide - centre
    covariance = centred.t() @ centred / len(wide)
    wide_filters = filters.double()
    means = wide_filters @ centre
    mean = means.mean(0)
    variance = ((wide_filters @ covariance * wide_filters).sum(-1) + (means - mean) ** 2).mean(0)
    root = torch.rsqrt(variance + eps)
    scale = gamma * root.to(gamma.dtype)
    shift = beta - mean.to(gamma.dtype) * scale
    pooled = _Pick.apply(windows, filters, _winners(windows, filters.detach(), gamma.detach()))
    y = torch.addcmul(shift, pooled, scale).relu()
    return y.view(count, height // 2, width // 2, -1).permute(0, 3, 1, 2)


def _blocks(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all parts at once, few enough for what is computed of them to stay in a CPU's cache."""
    return zip(*(part.split(_ROWS) for part in parts), strict=True)


def _winners(windows: Tensor, filters: Tensor, gamma: Tensor) -> Tensor:
    """At which of its places each window is largest (smallest where ``gamma < 0``): 0.0 to 3.0, ``(m, channels)``."""
    signed = (filters * torch.where(gamma < 0, -1, 1).to(filters.dtype).unsqueeze(-1)).transpose(1, 2)
    found = windows.new_empty(len(windows), len(gamma))
    for part, code in _blocks(windows, found):
        a, b, c, d = (part @ each for each in signed)
        upper = torch.gt(b, a, out=torch.empty_like(a))
        lower = torch.gt(d, c, out=torch.empty_like(a)).add_(2)
        torch.maximum(a, b, out=a)
        torch.maximum(c, d, out=c)
        torch.lerp(upper, lower, torch.gt(c, a, out=b), out=code)
    return found


class _Pick(torch.autograd.Function):
    """At the place of each window that is wanted, its product with the filter: linear in the filters."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, filters: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(windows, codes)
        found = torch.empty_like(codes)
        for part, code, into in _blocks(windows, codes, found):
            torch.mul(part @ filters[0].t(), _at(0, code), out=into)
            for place in range(1, len(_PLACES)):
                into.addcmul_(part @ filters[place].t(), _at(place, code))
        return found

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        windows, codes = ctx.saved_tensors
        return None, _Drop.apply(outputs[0], windows, codes), None


class _Drop(torch.autograd.Function):
    """The adjoint of :class:`_Pick`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, windows: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(windows, codes)
        found = values.new_zeros(len(_PLACES), values.shape[1], windows.shape[1])
        for part, code, given in _blocks(windows, codes, values):
            for place, into in enumerate(found):
                into.addmm_((given * _at(place, code)).t(), part)
        return found

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        windows, codes = ctx.saved_tensors
        return _Pick.apply(windows, outputs[0], codes), None, None


def _at(place: int, code: Tensor) -> Tensor:
    return torch.eq(code, place, out=torch.empty_like(code))
