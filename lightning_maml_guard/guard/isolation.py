"""Leave no trace: whatever a measurement does to the module or the random state is undone."""

from __future__ import annotations

import copy
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
    """Put back on leaving, also after an error: random states, buffers, metrics, attributes, ``.grad``, modes, logging.

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
        attributes = [(part, _snapshot(part)) for part in module.modules()]
        gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
        stack.callback(_restore_modes, modes)
        stack.callback(_restore_buffers, buffers)
        stack.callback(_restore_gradients, gradients)
        stack.callback(_restore_attributes, attributes)
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


# What torch keeps of a module: restored above, or no one's business.
_OWN = frozenset({*nn.Module().__dict__, "_trainer", "_fabric"})


def _snapshot(part: nn.Module) -> dict[str, Any]:
    """Copy a module's own attributes: counters, lists of outputs, and the tensors of a torchmetrics metric."""
    return {name: _copied(value) for name, value in part.__dict__.items() if name not in _OWN}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.requires_grad:
        return value, value.clone()
    return value, copy.copy(value) if type(value) in {list, dict, set} else None


def _restore_attributes(attributes: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for part, saved in attributes:
        for name in set(part.__dict__) - set(saved) - _OWN:
            del part.__dict__[name]
        for name, (value, content) in saved.items():
            if isinstance(content, torch.Tensor):
                with torch.no_grad():
                    value.copy_(content)
            elif isinstance(content, list):
                value[:] = content
            elif content is not None:
                value.clear()
                value.update(content)
            part.__dict__[name] = value
