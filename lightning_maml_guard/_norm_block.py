"""Batch norm, ReLU and 2x2 max-pooling as one operation with hand-written first and second derivatives.

With ``m``, ``v`` the mean and variance of a channel over the batch, ``r = (v + eps)^(-1/2)`` and ``P`` the pooling::

    y = relu(P(gamma * r * (z - m) + beta)) = relu(gamma * r * (p - m) + beta),   p = P(z) where gamma >= 0

ReLU and pooling commute with the increasing affine part, so that it is applied to a quarter of the entries; where
``gamma < 0`` the pooling takes the smallest. On a CPU most of a small convolutional network's time goes into passes
over memory, of which the derivatives composed from torch's operations make about three times as many.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_maml_guard._functorch import inside_transform

_ALL_BUT_CHANNELS = (0, 2, 3)
_HALF = (torch.float16, torch.bfloat16)


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
    # Inside torch.func a Function is called from Python at every level; torch.compile fuses the plain operations.
    if z.dtype in _HALF or z.dtype != gamma.dtype or inside_transform():
        return _composed(z, gamma, beta, eps, pool)
    return _Block.apply(z, gamma, beta, eps, pool)


def _composed(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: bool) -> Tensor:
    keep = _winners(z, gamma) if pool else None
    # Statistics of half precision are taken in float32, as the native kernel's.
    wide, gamma, beta = (each.float() if each.dtype in _HALF else each for each in (z, gamma, beta))
    mean, root = _statistics(wide, eps)
    pooled = wide if keep is None else _gather(keep.to(wide.dtype), wide)
    scale = gamma * root
    return F.relu(pooled * _column(scale) + _column(beta - mean * scale)).to(z.dtype)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: bool) -> Tensor:
        keep = _winners(z, gamma) if pool else None
        mean, root = _statistics(z, eps)
        pooled = z if keep is None else _gather(keep, z)
        scale = gamma * root
        y = torch.addcmul(_column(beta - mean * scale), pooled, _column(scale)).relu_()
        ctx.eps = eps
        ctx.save_for_backward(z, gamma, mean, root, pooled, keep, y)
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
        keep: Tensor | None,
        y: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = z.numel() // z.shape[1]
        g = outer * (y > 0)
        total = g.sum(_ALL_BUT_CHANNELS)
        centred = (g * pooled).sum(_ALL_BUT_CHANNELS) - mean * total
        slope = -(root**3) * gamma * centred / count
        level = -gamma * root * total / count - slope * mean
        dz = torch.addcmul(_column(level), z, _column(slope))
        dz = _spread(dz, keep, _column(gamma * root) * g)
        ctx.eps = eps
        ctx.save_for_backward(outer, z, gamma, mean, root, pooled, keep, y, g, total, centred, slope)
        return dz, root * centred, total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        hz, hgamma, hbeta = outputs
        outer, z, gamma, mean, root, pooled, keep, y, g, total, centred, slope = ctx.saved_tensors
        count = z.numel() // z.shape[1]
        if torch.is_grad_enabled():
            # To be differentiated again: what was saved must depend on z, gamma and the gradient once more.
            mean, root = _statistics(z, ctx.eps)
            pooled = z if keep is None else _gather(keep, z)
            g = outer * (y > 0)
            total = g.sum(_ALL_BUT_CHANNELS)
            centred = (g * pooled).sum(_ALL_BUT_CHANNELS) - mean * total
            slope = -(root**3) * gamma * centred / count
        h_total = hz.sum(_ALL_BUT_CHANNELS)
        h_centred = (hz * z).sum(_ALL_BUT_CHANNELS) - mean * h_total
        h_pooled = hz if keep is None else _gather(keep, hz)
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
        by_z = torch.addcmul(_column(by_mean / count - by_variance * mean), z, _column(by_variance))
        by_z = by_z + _column(slope) * hz
        by_z = _spread(by_z, keep, _column(by_centred) * g)
        return by_outer * (y > 0), by_z, by_gamma, None, None, None, None, None, None


def _column(value: Tensor) -> Tensor:
    return value.reshape(-1, 1, 1)


def _statistics(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = z.mean(_ALL_BUT_CHANNELS)
    # Centred first: sums of squares cancel in float32.
    centred = z - _column(mean)
    return mean, torch.rsqrt((centred * centred).mean(_ALL_BUT_CHANNELS) + eps)


def _windows(z: Tensor) -> Tensor:
    """The 2x2 windows, shape ``(n, channels, h, 2, w, 2)``: a view."""
    height, width = z.shape[-2] // 2, z.shape[-1] // 2
    return z[..., : 2 * height, : 2 * width].unflatten(-2, (height, 2)).unflatten(-1, (width, 2))


def _winners(z: Tensor, gamma: Tensor) -> Tensor:
    """1 at the entry that each window's pooling takes, the first of equals as ``MaxPool2d`` does; 0 elsewhere."""
    with torch.no_grad():
        z, gamma = z.detach(), gamma.detach()
        window = _windows(torch.where(_column(gamma < 0), -z, z))
        a, b, c, d = (window[..., row, :, column] for row in (0, 1) for column in (0, 1))
        left, right = a >= b, c >= d
        upper = torch.maximum(a, b) >= torch.maximum(c, d)
        keep = torch.zeros_like(z)
        places = _windows(keep)
        places[..., 0, :, 0] = upper & left
        places[..., 0, :, 1] = upper & ~left
        places[..., 1, :, 0] = ~upper & right
        places[..., 1, :, 1] = ~(upper | right)
        return keep


def _gather(keep: Tensor, z: Tensor) -> Tensor:
    return (_windows(keep) * _windows(z)).sum((-3, -1))


def _spread(base: Tensor, keep: Tensor | None, pooled: Tensor) -> Tensor:
    """Add the adjoint of the pooling to a tensor that nothing else holds."""
    if keep is None:
        return base + pooled
    if torch.is_grad_enabled():
        height, width = 2 * pooled.shape[-2], 2 * pooled.shape[-1]
        spread = (_windows(keep) * pooled.unsqueeze(-1).unsqueeze(-3)).flatten(-2).flatten(-3, -2)
        return base + F.pad(spread, (0, base.shape[-1] - width, 0, base.shape[-2] - height))
    _windows(base).addcmul_(_windows(keep), pooled.unsqueeze(-1).unsqueeze(-3))
    return base
