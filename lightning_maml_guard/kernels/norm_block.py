"""Batch norm, ReLU and 2x2 max-pooling as one operation with hand-written first and second derivatives.

With ``m``, ``v`` the mean and variance of a channel over the batch, ``r = (v + eps)^(-1/2)`` and ``P`` the pooling::

    y = P(relu(gamma * r * (z - m) + beta)) = relu(gamma * r * (p - m) + beta),   p = P(z) where gamma >= 0

ReLU and pooling commute with the increasing affine part, so the affine part is applied to a quarter of the entries;
where ``gamma < 0`` the pooling takes the smallest entry. On a CPU, passes over memory take half of a small
convolutional network's time; derivatives composed from torch's operations make several times as many, and torch's
max-pooling takes ten times as long as the comparisons of ``pooling``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_maml_guard.kernels.channels_last import is_channels_last
from lightning_maml_guard.kernels.pooling import blocks, largest, put, take, winners
from lightning_maml_guard.utils.functorch import inside_gradient, inside_transform, is_batched
from lightning_maml_guard.utils.statistics import statistics

_ALL_BUT_CHANNELS = (0, 2, 3)
_HALF = (torch.float16, torch.bfloat16)


def norm_relu_pool(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: bool) -> Tensor:
    """Normalise images over the batch, apply ReLU and, with ``pool``, ``MaxPool2d(2)``; right at every order.

    ``gamma`` and ``beta``, each of shape ``(channels,)``, are batch norm's scale and shift.
    """
    if z.dtype in _HALF or z.dtype != gamma.dtype or z.is_meta or inside_gradient():
        return _composed(z, gamma, beta, eps, pool)
    if inside_transform():  # vmap alone: the tasks' channels side by side
        if not any(is_batched(each) for each in (z, gamma, beta)):
            return _composed(z, gamma, beta, eps, pool)  # vmap would skip the rule, and autograd would see nothing
        return _OverTasks.apply(z, gamma, beta, eps, pool)
    return _Block.apply(z if is_channels_last(z) else z.contiguous(), gamma, beta, eps, pool)


def _composed(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: bool) -> Tensor:
    # Statistics of half precision are taken in float32, as by the native kernel.
    wide, gamma, beta = (each.float() if each.dtype in _HALF else each for each in (z, gamma, beta))
    mean, root = _statistics(wide, eps)
    if pool:
        sign = _column(torch.where(gamma < 0, -1, 1).to(wide.dtype))
        wide = sign * largest(sign * wide)
    scale = gamma * root
    return F.relu(wide * _column(scale) + _column(beta - mean * scale)).to(z.dtype)


class _OverTasks(torch.autograd.Function):
    """Under vmap: the channels of all tasks in one tensor, so that autograd sees the operation itself."""

    @staticmethod
    def forward(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: bool) -> Tensor:
        return norm_relu_pool(z, gamma, beta, eps, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing: autograd records what the vmap rule does."""

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
        pooled, index = winners(z, gamma) if pool else (z, None)
        mean = z.mean(_ALL_BUT_CHANNELS)
        # As `statistics`, but block by block in place, which makes no copy of z. Centred first: in float32 the sum of
        # squares minus the squared mean cancels.
        squares = torch.stack([(each - _column(mean)).square_().sum(_ALL_BUT_CHANNELS) for each in blocks(z)]).sum(0)
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

    With ``N`` entries per channel, ``g`` the gradient before the ReLU, ``S`` the adjoint of the pooling and
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
        dz = _add_at(_affine(z, slope, level), index, _column(gamma * root) * g)
        ctx.eps = eps
        ctx.save_for_backward(outer, z, gamma, mean, root, pooled, index, y, g, total, centred, slope)
        return dz, root * centred, total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        hz, hgamma, hbeta = outputs
        outer, z, gamma, mean, root, pooled, index, y, g, total, centred, slope = ctx.saved_tensors
        count = z.numel() // z.shape[1]
        if torch.is_grad_enabled():
            # To be differentiated again: recompute what was saved, so that it depends on z, gamma and the gradient.
            mean, root = _statistics(z, ctx.eps)
            pooled = z if index is None else take(z, index)
            g, total, centred, slope = _sums(outer, y, pooled, gamma, mean, root, count)
        h_total = hz.sum(_ALL_BUT_CHANNELS)
        h_centred = (hz * z).sum(_ALL_BUT_CHANNELS) - mean * h_total
        h_pooled = hz if index is None else take(hz, index)
        rest = (g * h_pooled).sum(_ALL_BUT_CHANNELS) - total * h_total / count
        cube = root**3
        # Derivatives of <hz, dz> + <hgamma, dgamma> + <hbeta, dbeta>, a function of a few sums per channel.
        by_gamma = root * rest - cube * centred * h_centred / count
        by_root = gamma * rest - 3 * root**2 * gamma * centred * h_centred / count + hgamma * centred
        by_centred = hgamma * root - cube * gamma * h_centred / count
        by_total = hbeta - gamma * root * h_total / count - mean * by_centred
        by_mean = -total * by_centred - h_total * slope
        by_variance = -cube * by_root / count  # twice the derivative, over the count
        by_outer = _column(by_centred) * pooled + _column(by_total) + _column(gamma * root) * h_pooled
        by_z = _affine(z, by_variance, by_mean / count - by_variance * mean).addcmul_(hz, _column(slope))
        by_z = _add_at(by_z, index, _column(by_centred) * g)
        return _rectified(by_outer, y), by_z, by_gamma, None, None, None, None, None, None


def _sums(
    outer: Tensor, y: Tensor, pooled: Tensor, gamma: Tensor, mean: Tensor, root: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient before the ReLU, its sum, its product with the centred entries, and the slope of ``dz`` in ``z``."""
    g = _rectified(outer, y)
    total = g.sum(_ALL_BUT_CHANNELS)
    centred = (g * pooled).sum(_ALL_BUT_CHANNELS) - mean * total
    return g, total, centred, -(root**3) * gamma * centred / count


def _rectified(gradient: Tensor, y: Tensor) -> Tensor:
    # ReLU's own backward: six times as fast as multiplying with y > 0.
    return torch.ops.aten.threshold_backward(gradient, y, 0)


def _affine(z: Tensor, slope: Tensor, level: Tensor) -> Tensor:
    if is_channels_last(z):
        return torch.addcmul(_column(level), z, _column(slope))  # in one pass, vectorised over the channels
    return (z * _column(slope)).add_(_column(level))


def _column(value: Tensor) -> Tensor:
    return value.reshape(-1, 1, 1)


def _statistics(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean, _, root = statistics(z, _ALL_BUT_CHANNELS, eps)
    return mean.flatten(), root.flatten()


def _add_at(base: Tensor, index: Tensor | None, pooled: Tensor) -> Tensor:
    """Add the adjoint of the pooling to a tensor that nothing else refers to."""
    return base + pooled if index is None else put(base, index, pooled)
