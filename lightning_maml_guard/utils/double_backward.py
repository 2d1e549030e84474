"""The context in which second derivatives work, and norm layers that are right at every order of differentiation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

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


def _without_cudnn(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function use torch's own kernels."""

    def native(*args: Any, **kwargs: Any) -> Any:
        cudnn = torch.backends.cudnn
        before, cudnn.enabled = cudnn.enabled, False
        try:
            return function(*args, **kwargs)
        finally:
            cudnn.enabled = before

    return native


class NativeRecurrence(TorchFunctionMode):
    """Computes without cuDNN what its kernels can differentiate only once: recurrent layers, CTC loss, grid sampling.

    Not convolutions: their cuDNN kernels can be differentiated as often as one likes, and torch's own took ten times as
    long (H200).
    """

    layers: ClassVar[dict[Any, Callable[..., Any]]] = {
        function: _without_cudnn(function)
        for function in (
            torch.lstm,
            torch.gru,
            torch.rnn_tanh,
            torch.rnn_relu,
            torch.ctc_loss,
            F.ctc_loss,
            torch.grid_sampler,
            F.grid_sample,
            torch.affine_grid_generator,
            F.affine_grid,
        )
    }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.layers.get(func, func)(*args, **(kwargs or {}))


class PrimitiveNorms(NativeRecurrence):
    """Computes batch, layer, instance and weight norm from primitives while the mode is on.

    The derivatives of the native kernels are silently wrong beyond the second order and under some transforms, those of
    weight norm already at the second (torch 2.13, CPU). Mean, product and ``rsqrt`` are right at every order. Running
    statistics are read where the layer would read them, and never written. Embeddings get dense gradients, and what
    :class:`NativeRecurrence` names is computed as it says.
    """

    layers: ClassVar[dict[Any, Callable[..., Any]]] = {
        **NativeRecurrence.layers,
        F.batch_norm: _batch_norm,
        F.layer_norm: _layer_norm,
        F.instance_norm: _instance_norm,
        torch._weight_norm: _weight_norm,
        F.embedding: _embedding,
    }


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


def _precisions() -> tuple[str, bool] | None:
    """Precision of products and whether cuDNN may use TF32; None if torch 2.9's ``fp32_precision`` was set instead."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # what torch raises then
        return None


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32: TF32 and bfloat16 round by 1e-3, as much as a residual may be."""
    cudnn: Any = torch.backends.cudnn
    before = _precisions()
    if before is not None:
        # Not fp32_precision: with it, a module that reads the older settings, as cudnn.flags() does, gets an error.
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            cudnn.allow_tf32 = before[1]
        return
    mkldnn: Any = torch.backends.mkldnn
    # A setting that is not reduced is left alone: it may follow one above it, and reading does not tell.
    kinds: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    reduced = [(kind, kind.fp32_precision) for kind in kinds if kind.fp32_precision in ("tf32", "bf16")]
    try:
        for kind, _ in reduced:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in reduced:
            kind.fp32_precision = precision


@contextmanager
def _activations_kept() -> Iterator[None]:
    """Run what is under ``torch.utils.checkpoint`` as if it were not, in this thread.

    Recomputed in a backward pass, activations would be those of a module's live parameters, not of the ones that
    ``functional_call`` gave it, and without the contexts here. Reentrant checkpoints know no ``autograd.grad``.
    """
    module, thread = cast(Any, checkpoint), threading.get_ident()
    # Both kinds go through these; torch has no public way to switch a checkpoint off.
    generator, function = getattr(module, "_checkpoint_without_reentrant_generator", None), module.CheckpointFunction

    def kept(*args: Any, **kwargs: Any) -> Iterator[None]:
        if threading.get_ident() == thread or generator is None:
            yield
        else:
            yield from generator(*args, **kwargs)

    class Kept:
        @staticmethod
        def apply(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return run(*args) if threading.get_ident() == thread else function.apply(run, preserve, *args)

    module._checkpoint_without_reentrant_generator, module.CheckpointFunction = kept, Kept
    try:
        yield
    finally:
        module._checkpoint_without_reentrant_generator, module.CheckpointFunction = generator, function


@contextmanager
def double_backward() -> Iterator[None]:
    """Make gradients that can be differentiated again, in full precision.

    Gradients are on (also under ``no_grad`` and inference mode), attention uses its differentiable kernel, compiled
    code runs eagerly, cuDNN's recurrent kernels, autocast, TF32 and checkpoints of activations are off, norm layers are
    computed from primitives, and embeddings have dense gradients.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(full_precision())
        stack.enter_context(_activations_kept())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(PrimitiveNorms())
        yield
