"""The context in which second derivatives work, and norm layers that are right at every order of differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_maml_guard.utils.statistics import statistics


def _per_channel(x: Tensor, value: Tensor) -> Tensor:
    return value.reshape([1, -1] + [1] * (x.dim() - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, fit: Callable[[Tensor], Tensor]) -> Tensor:
    x = x if weight is None else x * fit(weight)
    return x if bias is None else x + fit(bias)


def _normalise(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch_dims: tuple[int, ...] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    if batch_dims is not None or running_mean is None or running_var is None:
        _, centred, inverse_std = statistics(x, batch_dims or (0, *range(2, x.dim())), eps)
        standard = centred * inverse_std
    else:
        standard = (x - _per_channel(x, running_mean)) * torch.rsqrt(_per_channel(x, running_var) + eps)
    return _affine(standard, weight, bias, lambda value: _per_channel(x, value))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    dims = (0, *range(2, input.dim())) if training else None
    return _normalise(input, running_mean, running_var, dims, weight, bias, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(2, input.dim())) if use_input_stats else None
    return _normalise(input, running_mean, running_var, dims, weight, bias, eps)


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    _, centred, inverse_std = statistics(input, tuple(range(-len(normalized_shape), 0)), eps)
    return _affine(centred * inverse_std, weight, bias, lambda value: value)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [d for d in range(v.dim()) if d != dim % v.dim()] if dim != -1 else list(range(v.dim()))
    return v * (g * torch.rsqrt((v * v).sum(others, keepdim=True)))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    # A sparse gradient cannot be differentiated again.
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse=False)


class PrimitiveNorms(TorchFunctionMode):
    """Computes batch, layer, instance and weight norm from primitives while the mode is on.

    The derivatives of the native kernels are silently wrong beyond the second order and under some transforms, those of
    weight norm already at the second (torch 2.13, CPU). Mean, product and ``rsqrt`` are right at every order. Running
    statistics are read where the layer would read them, and never written. Embeddings get dense gradients.
    """

    _layers: ClassVar[dict[Any, Callable[..., Any]]] = {
        F.batch_norm: _batch_norm,
        F.layer_norm: _layer_norm,
        F.instance_norm: _instance_norm,
        torch._weight_norm: _weight_norm,
        F.embedding: _embedding,
    }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._layers.get(func, func)(*args, **(kwargs or {}))


class BatchStatistics(TorchFunctionMode):
    """Makes batch norm use the statistics of its batch, in training and in evaluation, as MAML does.

    The batch is the support or query set of a task. Running statistics are neither read nor written, so the layer has
    no state that tasks could share or that ``vmap`` could not handle.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)

        def stateless(
            input: Tensor,
            running_mean: Tensor | None = None,
            running_var: Tensor | None = None,
            weight: Tensor | None = None,
            bias: Tensor | None = None,
            training: bool = False,
            momentum: float = 0.1,
            eps: float = 1e-5,
        ) -> Tensor:
            if weight is not None and weight.dtype != input.dtype:
                # Autocast: the native kernel's backward raises for mixed dtypes under vmap (torch 2.13, CPU).
                return _batch_norm(input, None, None, weight, bias, True, momentum, eps).to(input.dtype)
            return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)

        return stateless(*args, **kwargs)


@contextmanager
def double_backward() -> Iterator[None]:
    """Make gradients that can be differentiated again.

    Gradients are on (also under ``no_grad`` and inference mode), attention uses its differentiable kernel, compiled
    code runs eagerly, cuDNN's RNN kernels and autocast are off, norm layers are computed from primitives, and
    embeddings have dense gradients.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(PrimitiveNorms())
        yield
