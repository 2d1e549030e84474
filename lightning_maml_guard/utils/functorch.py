"""Whether code runs inside a transform of torch.func, is being compiled, or takes gradients itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def inside_transform() -> bool:
    """Return True inside ``torch.func.grad`` or ``vmap``, or while being compiled."""
    if torch.compiler.is_compiling():
        return True
    # torch's own way to ask (torch._functorch.pyfunctorch); there is no public one.
    return torch._C._functorch.peek_interpreter_stack() is not None


def inside_gradient() -> bool:
    """Return True while torch.func takes a gradient, inside more than one ``vmap``, or while being compiled."""
    if torch.compiler.is_compiling():
        return True
    levels = torch._C._functorch.get_interpreter_stack() or []
    return len(levels) > 1 or any(level.key() != torch._C._functorch.TransformType.Vmap for level in levels)


def is_batched(tensor: torch.Tensor) -> bool:
    """Return True if the surrounding ``vmap`` maps over a tensor."""
    return torch._C._functorch.is_batchedtensor(tensor)


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that the transforms of torch.func around this code have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


@contextmanager
def gradients_taken() -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Note each time this thread takes a gradient, by torch.autograd, ``backward()`` or a transform of torch.func.

    Each is noted by the tensors that it is taken by; none: by all parameters.
    """
    taken: list[tuple[torch.Tensor, ...]] = []
    # All of them go through this function, which torch has no public way to watch.
    engine, thread = getattr(torch.autograd, "_engine_run_backward", None), threading.get_ident()
    if engine is None:
        yield taken
        return

    def watched(*arguments: Any, **options: Any) -> Any:
        if threading.get_ident() == thread:
            # The inputs come fifth; a GradientEdge among them is no tensor.
            inputs = options.get("inputs", arguments[4] if len(arguments) > 4 else ()) or ()
            taken.append(tuple(unwrapped(each) for each in inputs if isinstance(each, torch.Tensor)))
        return engine(*arguments, **options)

    try:
        torch.autograd._engine_run_backward = watched
        yield taken
    finally:
        torch.autograd._engine_run_backward = engine
