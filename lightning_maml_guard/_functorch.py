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
