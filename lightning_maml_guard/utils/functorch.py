"""Whether code runs inside a transform of torch.func or is being compiled."""

from __future__ import annotations

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
