"""Whether code runs inside a transform of torch.func, is being compiled, or takes gradients itself."""

from __future__ import annotations

import threading
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


class GradientsTaken:
    """Notes whether this thread takes gradients: by torch.autograd, by ``backward()``, or by a transform of torch.func.

    Attributes:
        seen: Whether it did.
    """

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> GradientsTaken:
        # All of them go through this function, which torch has no public way to watch.
        self._engine, thread = getattr(torch.autograd, "_engine_run_backward", None), threading.get_ident()

        def watched(*arguments: Any, **options: Any) -> Any:
            self.seen = self.seen or threading.get_ident() == thread
            assert self._engine is not None
            return self._engine(*arguments, **options)

        if self._engine is not None:
            torch.autograd._engine_run_backward = watched
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            torch.autograd._engine_run_backward = self._engine
