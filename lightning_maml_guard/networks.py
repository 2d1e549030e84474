"""The networks of the MAML literature."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_maml_guard.kernels import kernels_enabled
from lightning_maml_guard.kernels.channels_last import convolve, is_worthwhile
from lightning_maml_guard.kernels.first_block import first_block, is_applicable
from lightning_maml_guard.kernels.norm_block import norm_relu_pool
from lightning_maml_guard.utils.checks import check_choice, check_count, check_flag, shown

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "softplus": nn.Softplus}


def mlp(
    in_features: int = 1, hidden: Sequence[int] = (40, 40), out_features: int = 1, activation: str = "relu"
) -> nn.Sequential:
    """Build a multilayer perceptron; the default 1-40-40-1 is Finn et al.'s sinusoid regressor.

    Args:
        in_features: Size of the input.
        hidden: Sizes of the hidden layers; empty for a linear model.
        out_features: Size of the output.
        activation: ``"relu"``, ``"tanh"`` or ``"softplus"``.

    Returns:
        The network: ``(*, in_features) -> (*, out_features)``.

    Raises:
        ValueError: If a size or the activation is not allowed.
        TypeError: If ``hidden`` is not a sequence.
    """
    check_choice("activation", activation, sorted(_ACTIVATIONS))
    if isinstance(hidden, str) or not isinstance(hidden, Sequence):
        raise TypeError(
            f"Expected argument `hidden` to be a list of layer sizes but got {shown(hidden)}. Pass (40, 40), or () for "
            "a linear model."
        )
    check_count("in_features", in_features)
    for index, size in enumerate(hidden):
        check_count(f"hidden[{index}]", size)
    check_count("out_features", out_features)
    sizes = [in_features, *hidden, out_features]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


class Conv4(nn.Module):
    """Four convolutional blocks and a linear head; see :func:`conv4`."""

    def __init__(self, out_features: int, channels: int, filters: int, image_size: int, strided: bool) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        size, fan_in = image_size, channels
        for _ in range(4):
            blocks.append(nn.Conv2d(fan_in, filters, 3, stride=2 if strided else 1, padding=1))
            # Batch statistics in training and evaluation, as MAML does: no state that tasks would share.
            blocks.append(nn.BatchNorm2d(filters, track_running_stats=False))
            blocks.append(nn.ReLU())
            if not strided:
                blocks.append(nn.MaxPool2d(2))
            size = (size + 1) // 2 if strided else size // 2
            fan_in = filters
        self.features = nn.Sequential(*blocks)
        self._built = tuple(type(block) for block in blocks)
        self.head = nn.Linear(filters * size * size, out_features)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        The result is that of ``head(flatten(features(images)))``, but normalisation, ReLU and pooling of a block are
        computed as one operation. Layer by layer instead if ``features`` was changed or has hooks, or if the kernels
        are switched off (environment variable ``LMG_KERNELS=0``).

        Args:
            images: Shape ``(n, channels, height, width)``.

        Returns:
            Logits, shape ``(n, out_features)``.
        """
        layers = list(self.features)
        if not kernels_enabled() or not self._as_built(layers):
            return self.head(torch.flatten(self.features(images), 1))
        x = images
        depth, channels_last = len(layers) // 4, is_worthwhile(images)
        for start in range(0, len(layers), depth):
            conv, norm = cast(nn.Conv2d, layers[start]), cast(nn.BatchNorm2d, layers[start + 1])
            # The norm subtracts the convolution's bias again, so it is left out; its gradient of 0 stays in the graph.
            shift = norm.bias + 0 * cast(Tensor, conv.bias)
            if start == 0 and depth == 4 and is_applicable(x, conv):
                x = first_block(x, conv.weight, norm.weight, shift, norm.eps)
                continue
            x = convolve(x, conv) if channels_last else F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
            x = norm_relu_pool(x, norm.weight, shift, norm.eps, pool=depth == 4)
        return self.head(torch.flatten(x, 1))

    def _as_built(self, layers: list[nn.Module]) -> bool:
        return tuple(type(layer) for layer in layers) == self._built and not any(
            layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or _unusual(layer)
            for layer in (self.features, *layers)
        )


def _unusual(layer: nn.Module) -> bool:
    """Return True if a layer of the right type has settings that the kernels do not support."""
    if isinstance(layer, nn.Conv2d):
        return layer.bias is None or layer.padding_mode != "zeros" or layer.groups != 1 or layer.dilation != (1, 1)
    if isinstance(layer, nn.BatchNorm2d):
        return layer.weight is None or layer.bias is None or layer.running_mean is not None
    if isinstance(layer, nn.MaxPool2d):
        window = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        return window != (2, 2, 0, 1) or layer.ceil_mode or layer.return_indices
    return False


def conv4(
    out_features: int = 5, channels: int = 1, filters: int = 64, image_size: int = 28, strided: bool = False
) -> Conv4:
    """Build the four-block convolutional network of few-shot classification (Vinyals et al. 2016).

    Args:
        out_features: Number of classes of an episode (n-way).
        channels: Channels of the images.
        filters: Filters of each block: 64 for Omniglot, 32 for miniImageNet in Finn et al. 2017.
        image_size: Height and width of the images.
        strided: Strided convolutions instead of max-pooling (Finn et al.'s Omniglot network).

    Returns:
        The network: ``(n, channels, image_size, image_size) -> (n, out_features)``.

    Raises:
        ValueError: If a size is not allowed; four poolings need images of at least 16 pixels.
    """
    check_flag("strided", strided)
    for name, number in (("out_features", out_features), ("channels", channels), ("filters", filters)):
        check_count(name, number)
    check_count("image_size", image_size)
    if image_size < 16 and not strided:
        raise ValueError(
            f"Expected argument `image_size` to be at least 16 (four poolings by 2) but got {image_size}. Use larger "
            "images, or strided=True."
        )
    return Conv4(out_features, channels, filters, image_size, strided)
