"""Batch norm, ReLU and 2x2 max-pooling as one operation with hand-written first and second derivatives.

With ``m``, ``v`` the mean and variance of a channel over the batch, ``r = (v + eps)^(-1/2)`` and ``P`` the pooling::

    y = P(relu(gamma * r * (z - m) + beta)) = relu(gamma * r * (p - m) + beta),   p = P(z) where gamma >= 0

ReLU and pooling commute with the increasing affine part, so that it is applied to a quarter of the entries; where
``gamma < 0`` the pooling takes the smallest. On a CPU half of a small convolutional network's time goes into passes
over memory, of which derivatives composed from torch's operations make several times as many, and torch's kernel for
max-pooling takes ten times as long as the comparisons below.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_maml_guard.kernels.channels_last import Put, Take, is_channels_last, put, winners
from lightning_maml_guard.utils.functorch import inside_gradient, inside_transform, is_batched

_ALL_BUT_CHANNELS = (0, 2, 3)
_HALF = (torch.float16, torch.bfloat16)
# Entries a block of images holds where intermediate results are dropped: they then stay in a CPU's cache, and no
# large piece of memory is mapped for them.
_BLOCK = 2**18


def norm_relu_pool(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: bool) -> Tensor:
    """Normalise over the batch, rectify, and pool; right at every order of differentiation.

    Args:
        z: Shape ``(n, channels, height, width)``.
        gamma: Scale, shape ``(channels,)``.
        beta: Shift, shape ``(channels,)``; the letters are batch norm's own.
        eps: Added to the variance.
        pool: Whether to take the largest of 2x2, as ``MaxPool2d(2)``.

    Returns:
        The activations; of half the size, rounded down, after pooling.
    """
    if z.dtype in _HALF or z.dtype != gamma.dtype or z.is_meta or inside_gradient():
        return _composed(z, gamma, beta, eps, pool)
    if inside_transform():  # vmap alone: on the tasks' channels side by side
        if not any(is_batched(each) for each in (z, gamma, beta)):
            return _composed(z, gamma, beta, eps, pool)  # vmap would leave its rule out, and autograd with it
        return _OverTasks.apply(z, gamma, beta, eps, pool)
    return _Block.apply(z if is_channels_last(z) else z.contiguous(), gamma, beta, eps, pool)


def _composed(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: bool) -> Tensor:
    # Statistics of half precision are taken in float32, as the native kernel's.
    wide, gamma, beta = (each.float() if each.dtype in _HALF else each for each in (z, gamma, beta))
    mean, root = _statistics(wide, eps)
    if pool:
        sign = _column(torch.where(gamma < 0, -1, 1).to(wide.dtype))
        wide = sign * _largest(sign * wide)
    scale = gamma * root
    return F.relu(wide * _column(scale) + _column(beta - mean * scale)).to(z.dtype)


class _OverTasks(torch.autograd.Function):
    """Under vmap: a task's channels beside another's in one tensor, so that autograd sees the operation itself."""

    @staticmethod
    def forward(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: bool) -> Tensor:
        return norm_relu_pool(z, gamma, beta, eps, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: autograd records what the vmap rule does."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: bool) -> Any:
        count = info.batch_size
        z = z.expand(count, *z.shape).movedim(0, 1) if in_dims[0] is None else z.movedim(in_dims[0], 1)
        gamma, beta = (
            each.expand(count, *each.shape) if dim is None else each.movedim(dim, 0)
            for each, dim in zip((gamma, beta), in_dims[1:3], strict=True)
        )
        y = norm_relu_pool(z.flatten(1, 2), gamma.flatten(), beta.flatten(), eps, pool)
        return y.unflatten(1, (count, -1)), 1


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: bool) -> Tensor:
        pooled, index = _winners(z, gamma) if pool else (z, None)
        mean = z.mean(_ALL_BUT_CHANNELS)
        # Centred first: sums of squares cancel in float32.
        squares = torch.stack([(each - _column(mean)).square_().sum(_ALL_BUT_CHANNELS) for each in _blocks(z)]).sum(0)
        root = torch.rsqrt(squares / (z.numel() // z.shape[1]) + eps)
        scale = gamma * root
        y = _affine(pooled, scale, beta - mean * scale).relu_()
        ctx.eps = eps
        ctx.save_for_backward(z, gamma, mean, root, pooled, index, y)
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (*_BlockGradient.apply(outputs[0], *ctx.saved_tensors, ctx.eps), None, None)


class _BlockGradient(torch.autograd.Function):
    """The backward of :class:`_Block` as a function of the output's gradient, ``z`` and ``gamma``.

    With ``N`` entries a channel, ``g`` the gradient behind the ReLU, ``S`` the adjoint of the pooling and
    ``c = sum g * (p - m)``: ``dz = S(gamma*r*g) - gamma*r*sum(g)/N - r^3*gamma*c*(z - m)/N``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        outer: Tensor,
        z: Tensor,
        gamma: Tensor,
        mean: Tensor,
        root: Tensor,
        pooled: Tensor,
        index: Tensor | None,
        y: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = z.numel() // z.shape[1]
        g, total, centred, slope = _sums(outer, y, pooled, gamma, mean, root, count)
        level = -gamma * root * total / count - slope * mean
        dz = _spread(_affine(z, slope, level), index, _column(gamma * root) * g)
        ctx.eps = eps
        ctx.save_for_backward(outer, z, gamma, mean, root, pooled, index, y, g, total, centred, slope)
        return dz, root * centred, total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        hz, hgamma, hbeta = outputs
        outer, z, gamma, mean, root, pooled, index, y, g, total, centred, slope = ctx.saved_tensors
        count = z.numel() // z.shape[1]
        if torch.is_grad_enabled():
            # To be differentiated again: what was saved must depend on z, gamma and the gradient once more.
            mean, root = _statistics(z, ctx.eps)
            pooled = z if index is None else _gather(index, z)
            g, total, centred, slope = _sums(outer, y, pooled, gamma, mean, root, count)
        h_total = hz.sum(_ALL_BUT_CHANNELS)
        h_centred = (hz * z).sum(_ALL_BUT_CHANNELS) - mean * h_total
        h_pooled = hz if index is None else _gather(index, hz)
        rest = (g * h_pooled).sum(_ALL_BUT_CHANNELS) - total * h_total / count
        cube = root**3
        # Derivatives of <hz, dz> + <hgamma, dgamma> + <hbeta, dbeta>, a function of a few sums a channel.
        by_gamma = root * rest - cube * centred * h_centred / count
        by_root = gamma * rest - 3 * root**2 * gamma * centred * h_centred / count + hgamma * centred
        by_centred = hgamma * root - cube * gamma * h_centred / count
        by_total = hbeta - gamma * root * h_total / count - mean * by_centred
        by_mean = -total * by_centred - h_total * slope
        by_variance = -cube * by_root / count  # twice the derivative, over the count
        by_outer = _column(by_centred) * pooled + _column(by_total) + _column(gamma * root) * h_pooled
        by_z = _affine(z, by_variance, by_mean / count - by_variance * mean).addcmul_(hz, _column(slope))
        by_z = _spread(by_z, index, _column(by_centred) * g)
        return _rectified(by_outer, y), by_z, by_gamma, None, None, None, None, None, None


def _sums(
    outer: Tensor, y: Tensor, pooled: Tensor, gamma: Tensor, mean: Tensor, root: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient behind the ReLU, its sum, its sum with the centred entries, and the slope of ``dz`` in ``z``."""
    g = _rectified(outer, y)
    total = g.sum(_ALL_BUT_CHANNELS)
    centred = (g * pooled).sum(_ALL_BUT_CHANNELS) - mean * total
    return g, total, centred, -(root**3) * gamma * centred / count


def _rectified(gradient: Tensor, y: Tensor) -> Tensor:
    """The gradient where ``y > 0``: ReLU's own backward, in a sixth of the time of a product with the comparison."""
    return torch.ops.aten.threshold_backward(gradient, y, 0)


def _affine(z: Tensor, slope: Tensor, level: Tensor) -> Tensor:
    if is_channels_last(z):
        return torch.addcmul(_column(level), z, _column(slope))  # in one pass, vectorised over the channels
    return (z * _column(slope)).add_(_column(level))


def _column(value: Tensor) -> Tensor:
    return value.reshape(-1, 1, 1)


def _statistics(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = z.mean(_ALL_BUT_CHANNELS)
    centred = z - _column(mean)
    return mean, torch.rsqrt((centred * centred).mean(_ALL_BUT_CHANNELS) + eps)


def _even(z: Tensor) -> Tensor:
    """Without the last row or column that pooling leaves out."""
    return z[..., : z.shape[-2] // 2 * 2, : z.shape[-1] // 2 * 2]


def _largest(z: Tensor) -> Tensor:
    z = _even(z)
    rows = torch.maximum(z[..., 0::2, :], z[..., 1::2, :])
    return torch.maximum(rows[..., 0::2], rows[..., 1::2])


def _winners(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """What each window's pooling takes, shape ``(n, channels, h, w)``, and where in its image: int64, or the masks."""
    with torch.no_grad():
        if is_channels_last(z):
            sign = _column(torch.where(gamma < 0, -1, 1).to(z.dtype)) if bool((gamma < 0).any()) else None
            largest, masks = winners((each if sign is None else each * sign for each in _blocks(z)), z)
            return largest if sign is None else largest * sign, masks
        negative = _column(gamma < 0) if bool((gamma < 0).any()) else None
        width, height, half = z.shape[-1], z.shape[-2] // 2, z.shape[-1] // 2
        first = torch.arange(0, 2 * height, 2, device=z.device).float().unsqueeze(-1) * width
        first = first + torch.arange(0, 2 * half, 2, device=z.device)
        found = [_winners_of(each if negative is None else torch.where(negative, -each, each)) for each in _blocks(z)]
        index = torch.cat([(row * width + column + first).long() for row, column in found])
        return _gather(index, z), index


def _winners_of(z: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column within each window, in floating point: torch's kernels are vectorised there, and 2^24 is exact."""
    z = _even(z)
    upper, lower = z[..., 0::2, :], z[..., 1::2, :]
    rows = torch.maximum(upper, lower)
    column = (rows[..., 1::2] > rows[..., 0::2]).float()
    row = torch.gt(lower, upper, out=torch.empty_like(rows, dtype=torch.float32))
    return torch.lerp(row[..., 0::2], row[..., 1::2], column), column


def _blocks(z: Tensor) -> tuple[Tensor, ...]:
    return z.split(max(1, _BLOCK // max(1, z.shape[1:].numel()))) if z.device.type == "cpu" else (z,)


def _gather(index: Tensor, z: Tensor) -> Tensor:
    if index.is_floating_point():
        return Take.apply(z, index)
    return z.flatten(2).gather(2, index.flatten(2)).view(index.shape)


def _spread(base: Tensor, index: Tensor | None, pooled: Tensor) -> Tensor:
    """Add the adjoint of the pooling to a tensor that nothing else holds."""
    if index is None:
        return base + pooled
    if index.is_floating_point():
        return base + Put.apply(pooled, index, base.shape) if torch.is_grad_enabled() else put(base, index, pooled)
    flat, places, values = base.flatten(2), index.flatten(2), pooled.flatten(2)
    if torch.is_grad_enabled():
        return flat.scatter_add(2, places, values).view(base.shape)
    return flat.scatter_add_(2, places, values).view(base.shape)
