"""Convolutions in channels-last layout, in which oneDNN's run up to 1.6 times as fast on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_maml_guard.utils.functorch import inside_transform

_FORMAT = torch.channels_last


def is_channels_last(z: Tensor) -> bool:
    """Return True if images lie in channels-last layout and not in the usual one as well."""
    return z.dim() == 4 and z.is_contiguous(memory_format=_FORMAT) and not z.is_contiguous()


def is_worthwhile(images: Tensor) -> bool:
    """Return True if oneDNN convolves these images, one task at a time."""
    onednn = torch.backends.mkldnn
    usual = images.device.type == "cpu" and images.dtype == torch.float32 and images.dim() == 4
    return usual and not inside_transform() and onednn.is_available() and bool(onednn.enabled)


def convolve(images: Tensor, conv: nn.Conv2d) -> Tensor:
    """Apply a convolution without its bias, neither grouped nor dilated; the result is channels-last."""
    if conv.in_channels > 1 or images.requires_grad or isinstance(conv.padding, str):
        return F.conv2d(images.contiguous(memory_format=_FORMAT), conv.weight, None, conv.stride, conv.padding)
    # oneDNN's derivative towards the weights of a single channel takes several times as long as a matrix product.
    size, stride, padding = conv.kernel_size, conv.stride, conv.padding
    height, width = (
        (length + 2 * margin - window) // step + 1
        for length, margin, window, step in zip(images.shape[2:], padding, size, stride, strict=True)
    )
    patches = F.unfold(images, size, padding=padding, stride=stride).transpose(1, 2)
    found = patches.reshape(-1, patches.shape[-1]) @ conv.weight.flatten(1).t()
    return found.view(len(images), height, width, -1).permute(0, 3, 1, 2)
