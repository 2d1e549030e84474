"""Everything a check puts back: whatever it does to module, random state, loggers or inner rate is undone."""

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_maml_guard.utils.random_state import preserved_randomness

Undo = Callable[[], object]


@contextmanager
def undisturbed(trainer: Any, pl_module: Any) -> Iterator[None]:
    """Look at a run without a trace: isolated, unlogged, and at the inner rate as configured."""
    with unlogged(trainer), isolated(pl_module), configured_inner_rate(pl_module):
        yield


@contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """Keep what a measurement sends to the loggers away from them."""
    from lightning_maml_guard.utils.lightning_compat import DummyLogger  # measure() works without Lightning

    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def configured_inner_rate(pl_module: Any) -> Iterator[None]:
    """Measure at the inner rate as configured, not as capped by an earlier check."""
    if not hasattr(pl_module, "inner_lr_cap"):
        yield
        return
    cap, pl_module.inner_lr_cap = pl_module.inner_lr_cap, None
    try:
        yield
    finally:
        pl_module.inner_lr_cap = cap


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Put back on leaving, also after an error: random states, buffers, metrics, attributes, ``.grad``, modes, logging.

    Attributes are tensors, random generators and containers in containers; tensors in containers are left to the
    user's code. A tensor that nothing wrote into is not written into either: a graph may hold it. Inside, every
    ``.grad`` is None (so that nothing accumulates into the user's) and ``log`` and ``log_dict`` of the module and its
    parts do nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_randomness())
        modes = [(part, part.training) for part in module.modules()]
        buffers = [
            (part._buffers, name, value, _undo_tensor(value))
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
        for part, name in itertools.product(module.modules(), ("log", "log_dict")):
            # A module's own layer or number of that name is no logging.
            if (
                all(callable(getattr(type(part), each, None)) for each in ("log", "log_dict"))
                and name not in part.__dict__
            ):
                part.__dict__[name] = _silent
                stack.callback(part.__dict__.pop, name)
        yield


def _silent(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log`` during a measurement."""


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        part.training = training


def _restore_buffers(buffers: list[tuple[dict[str, Any], str, torch.Tensor, Undo]]) -> None:
    for owner, name, tensor, undo in buffers:
        undo()
        owner[name] = tensor


def _restore_gradients(gradients: list[tuple[nn.Parameter, torch.Tensor | None]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient


# What torch keeps of a module: restored above, or no one's business.
_OWN = frozenset({*nn.Module().__dict__, "_trainer", "_fabric"})
_CONTAINERS = frozenset({list, dict, set, deque, defaultdict, OrderedDict, Counter})


def _snapshot(part: nn.Module) -> dict[str, tuple[Any, Undo | None]]:
    """Keep a module's own attributes: counters, lists of outputs, and the tensors of a torchmetrics metric."""
    kept = {name: value for name, value in part.__dict__.items() if name not in _OWN}
    return {name: (value, _undo_tensor(value) if _is_state(value) else _undo(value)) for name, value in kept.items()}


def _is_state(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.requires_grad


def _undo_tensor(tensor: torch.Tensor) -> Undo:
    saved, version = tensor.clone(), None if tensor.is_inference() else tensor._version

    @torch.no_grad()
    def undo() -> None:
        written = version is None or tensor._version != version or tensor.layout != torch.strided
        if written or not torch.equal(tensor, saved):  # batch norm writes and leaves the version as it is
            tensor.copy_(saved)

    return undo


def _undo(value: Any, inside: frozenset[int] = frozenset()) -> Undo | None:
    """Find how to undo what happens in a value; None where nothing can. A container may contain itself."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if type(value) not in _CONTAINERS or id(value) in inside:
        return None
    content = copy.copy(value)
    parts = content.values() if isinstance(content, dict) else content
    inner = [found for part in parts if (found := _undo(part, inside | {id(value)}))]

    def undo() -> None:
        value.clear()
        if isinstance(value, (list, deque)):
            value.extend(content)
        else:
            value.update(content)
        for each in inner:
            each()

    return undo


def _restore_attributes(attributes: list[tuple[nn.Module, dict[str, tuple[Any, Undo | None]]]]) -> None:
    for part, saved in attributes:
        for name in set(part.__dict__) - set(saved) - _OWN:
            del part.__dict__[name]
        for name, (value, undo) in saved.items():
            if undo is not None:
                undo()
            part.__dict__[name] = value
