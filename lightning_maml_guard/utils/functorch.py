"""Whether code runs inside a transform of torch.func or is being compiled."""

from __future__ import annotations

import torch


def inside_transform() -> bool:
    """Say whether the calling code is inside ``torch.func.grad`` or ``vmap``, or is being compiled.

    Returns:
        Whether it is.
    """
    if torch.compiler.is_compiling():
        return True
    # torch's own way to ask (torch._functorch.pyfunctorch); there is no public one.
    return torch._C._functorch.peek_interpreter_stack() is not None


def inside_gradient() -> bool:
    """Say whether a gradient is being taken by torch.func, or the code compiled: more than one ``vmap`` around it.

    Returns:
        Whether it is.
    """
    if torch.compiler.is_compiling():
        return True
    levels = torch._C._functorch.get_interpreter_stack() or []
    return len(levels) > 1 or any(level.key() != torch._C._functorch.TransformType.Vmap for level in levels)


def is_batched(tensor: torch.Tensor) -> bool:
    """Say whether a ``vmap`` around the calling code maps over a tensor.

    Args:
        tensor: The tensor.

    Returns:
        Whether it does.
    """
    return torch._C._functorch.is_batchedtensor(tensor)
