"""Leave no trace: whatever a measurement does to the module or the random state is undone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch (every device in use) back on leaving.

    Yields:
        Nothing.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Put random states, buffers, ``.grad``, train/eval modes and logging back on leaving, also after an error.

    Inside, every ``.grad`` is None (so that nothing accumulates into the user's) and ``module.log`` and
    ``module.log_dict`` do nothing.

    Args:
        module: The module the measurement may touch.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_randomness())
        modes = [(part, part.training) for part in module.modules()]
        buffers = [
            (part._buffers, name, value, value.clone())
            for part in module.modules()
            for name, value in part._buffers.items()
            if value is not None
        ]
        gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
        stack.callback(_restore_modes, modes)
        stack.callback(_restore_buffers, buffers)
        stack.callback(_restore_gradients, gradients)
        for parameter, _ in gradients:
            parameter.grad = None
        for name in ("log", "log_dict"):
            if hasattr(module, name) and name not in module.__dict__:
                module.__dict__[name] = _silent
                stack.callback(module.__dict__.pop, name)
        yield


def _silent(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log`` during a measurement."""


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        part.training = training


def _restore_buffers(buffers: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for owner, name, tensor, saved in buffers:
            tensor.copy_(saved)
            owner[name] = tensor


def _restore_gradients(gradients: list[tuple[nn.Parameter, torch.Tensor | None]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient
