"""The first block of a network for images with one channel: convolution, batch norm, ReLU and pooling from patches.

Each pooled window sees ``v``, the 4x4 pixels around it. The filter at the window's place ``k`` is a vector ``e_k`` of
its 9 weights and 7 zeros, so that ``z_k = v . e_k``. The images are constant, and so is their covariance ``C``. A
channel's mean ``mean_k(v_mean . e_k)``, its variance ``mean_k(e_k^T C e_k + (v_mean . e_k - mean)^2)`` and their
derivatives therefore need no pass over the activations, which are larger than the images by the number of filters.
Matrix products and operations on a quarter of the activations remain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_maml_guard.kernels.pooling import PLACES, choose, is_at
from lightning_maml_guard.utils.functorch import inside_transform

# Fewer pixels than this: the overhead of the calls costs more than they save.
_FEW = 2**14
# Windows per block: with 64 filters a result of a quarter of a megabyte, which stays in a CPU's cache.
_ROWS = 1024


def is_applicable(images: Tensor, conv: nn.Conv2d) -> bool:
    """Return True for images with one channel of even size on a CPU and 3x3 filters at every pixel.

    The convolution must be neither grouped nor dilated, and a 2x2 pooling must follow.
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
    """Convolve without bias, normalise over the batch, apply ReLU, and pool; right at every order.

    ``gamma`` and ``beta``, each of shape ``(channels,)``, are batch norm's scale and shift.
    """
    count, _, height, width = images.shape
    windows = F.pad(images[:, 0], (1, 1, 1, 1)).unfold(1, 4, 2).unfold(2, 4, 2).reshape(-1, 16)
    filters = torch.stack(
        [F.pad(weight[:, 0], (column, 1 - column, row, 1 - row)).flatten(1) for row, column in PLACES]
    )
    # Not `statistics`, but from the patches' covariance; in double precision, for a filter may cancel nearly all that
    # neighbouring pixels have in common.
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
    return zip(*(part.split(_ROWS) for part in parts), strict=True)


def _winners(windows: Tensor, filters: Tensor, gamma: Tensor) -> Tensor:
    """At which place each window is largest (smallest where ``gamma < 0``): 0.0 to 3.0, shape ``(m, channels)``."""
    signed = (filters * torch.where(gamma < 0, -1, 1).to(filters.dtype).unsqueeze(-1)).transpose(1, 2)
    found = windows.new_empty(len(windows), len(gamma))
    for part, code in _blocks(windows, found):
        choose(code, *(part @ each for each in signed))
    return found


class _Pick(torch.autograd.Function):
    """Products of windows and filters at the chosen places; linear in the filters."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, filters: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(windows, codes)
        found = torch.empty_like(codes)
        for part, code, into in _blocks(windows, codes, found):
            torch.mul(part @ filters[0].t(), is_at(0, code), out=into)
            for place in range(1, len(PLACES)):
                into.addcmul_(part @ filters[place].t(), is_at(place, code))
        return found

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        windows, codes = ctx.saved_tensors
        return None, _PickAdjoint.apply(outputs[0], windows, codes), None


class _PickAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, windows: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(windows, codes)
        found = values.new_zeros(len(PLACES), values.shape[1], windows.shape[1])
        for part, code, given in _blocks(windows, codes, values):
            for place, into in enumerate(found):
                into.addmm_((given * is_at(place, code)).t(), part)
        return found

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        windows, codes = ctx.saved_tensors
        return _Pick.apply(windows, outputs[0], codes), None, None
