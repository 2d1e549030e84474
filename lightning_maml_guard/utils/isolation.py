"""Everything a check puts back: whatever it does to module, random state, loggers or inner rate is undone."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from io import IOBase
from logging import Logger
from pathlib import PurePath
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from lightning_maml_guard.utils.batch_copy import ATOMS, BatchCopyError, copied, is_plain
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

    Attributes are tensors, arrays, random generators, iterators, and containers and objects of such. An object that
    holds anything else (a file, a lock, a simulator) is left alone, and so are tensors in containers beyond 64 MB. A
    tensor that nothing wrote into is not written into either: a graph may hold it. Inside, every ``.grad`` is None (so
    that nothing accumulates into the user's) and ``log`` and ``log_dict`` of the module and its parts do nothing.
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
        attributes = _Attributes(module)
        gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
        stack.callback(_restore_modes, modes)
        stack.callback(_restore_buffers, buffers)
        stack.callback(_restore_gradients, gradients)
        stack.callback(attributes.undo)
        attributes.begin()
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
# They hold a run, which goes on, or nothing that a step writes into.
_LEFT = (*ATOMS, torch.optim.Optimizer, LRScheduler, Logger, PurePath, ModuleType, np.generic, np.dtype)
_FRAMES = frozenset({"lightning", "lightning_fabric", "lightning_maml_guard", "pytorch_lightning"})
# Tensors and arrays in containers and objects are kept up to so many bytes, each counted as a few KB at least.
_MOST, _LEAST = 2**26, 2**12
# A container of more values (a replay buffer, a vocabulary) is put back, but not what is in it.
_VALUES = 10_000


class OwnIteratorError(RuntimeError):
    """A step draws from an iterator that the module keeps: what a check drew, training would miss."""


class _NoDraw:
    """Stands in for an iterator that cannot be copied."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __iter__(self) -> _NoDraw:
        return self

    def __next__(self) -> Any:
        raise OwnIteratorError(
            f"the module draws from an iterator that it keeps (a {self._kind}), and training would miss what a check "
            "draws. Have the Trainer's data loader return these batches; it may be several loaders at once."
        )


class _OpaqueError(Exception):
    """An object holds something that cannot be put back."""


class _Attributes:
    """Puts back the own attributes of a module's parts: counters, lists of outputs, metrics, objects, iterators."""

    def __init__(self, module: nn.Module) -> None:
        self._seen, self._room, self._values = {id(part) for part in module.modules()}, _MOST, _VALUES
        self._swaps: list[tuple[Any, Any, Any]] = []
        self._kept = [(part, self._of_part(part)) for part in module.modules()]

    def _of_part(self, part: nn.Module) -> dict[str, tuple[Any, Undo | None]]:
        kept = {name: value for name, value in part.__dict__.items() if name not in _OWN}
        self._stand_in(part.__dict__, kept.items())
        return {
            name: (value, _undo_tensor(value) if _is_state(value) else self._of(value)) for name, value in kept.items()
        }

    def begin(self) -> None:
        """Have copies stand in for iterators."""
        for owner, name, instead in self._swaps:
            owner[name] = instead

    def undo(self) -> None:
        """Put everything back."""
        for part, saved in self._kept:
            for name in set(part.__dict__) - set(saved) - _OWN:
                del part.__dict__[name]
            for name, (value, undo) in saved.items():
                if undo is not None:
                    undo()
                part.__dict__[name] = value

    def _of(self, value: Any, *, inside: bool = False) -> Undo | None:
        """Find how to undo what happens in a value; None where it is left. ``inside`` an object all must be known."""
        if isinstance(value, torch.Generator):
            return partial(value.set_state, value.get_state())
        if isinstance(value, np.random.Generator):
            return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        if isinstance(value, np.random.RandomState):
            return partial(value.set_state, value.get_state())
        if isinstance(value, random.Random):
            return partial(value.setstate, value.getstate())
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return self._of_numbers(value)
        if type(value) in (tuple, frozenset, MethodType, partial):
            return _all(self._of_parts(_parts(value), inside=inside))
        if isinstance(value, _LEFT) or id(value) in self._seen or _is_frame(value):
            return None
        self._seen.add(id(value))
        if type(value) in _CONTAINERS:
            return self._of_container(value, inside=inside)
        if is_plain(value):
            return self._of_object(value, inside=inside)
        if inside and not _is_iterator(value):
            raise _OpaqueError
        return None

    def _of_parts(self, parts: Collection[Any], *, inside: bool) -> list[Undo]:
        if len(parts) > self._values:
            return []
        self._values -= len(parts)
        return [found for part in parts if (found := self._of(part, inside=inside))]

    def _of_numbers(self, value: Any) -> Undo | None:
        if not (_is_state(value) or (isinstance(value, np.ndarray) and value.flags.writeable)):
            return None
        self._room -= max(value.nbytes, _LEAST)
        if self._room < 0:
            return None
        return _undo_tensor(value) if isinstance(value, torch.Tensor) else partial(np.copyto, value, value.copy())

    def _of_container(self, value: Any, *, inside: bool) -> Undo:
        content = copy.copy(value)
        if isinstance(value, (list, dict)) and len(value) <= self._values:
            self._stand_in(value, content.items() if isinstance(value, dict) else enumerate(content))
        inner = self._of_parts(content.values() if isinstance(content, dict) else content, inside=inside)

        def undo() -> None:
            value.clear()
            if isinstance(value, (list, deque)):
                value.extend(content)
            else:
                value.update(content)
            for each in inner:
                each()

        return undo

    def _of_object(self, value: Any, *, inside: bool) -> Undo | None:
        """An object as a whole: one that holds what cannot be put back, as a file, a lock or a simulator, is left."""
        seen, swaps = set(self._seen), len(self._swaps)
        try:
            return self._of_container(value.__dict__, inside=True)
        except _OpaqueError:
            if inside:
                raise
            self._seen = seen
            del self._swaps[swaps:]
            return None

    def _stand_in(self, owner: Any, items: Iterable[tuple[Any, Any]]) -> None:
        self._swaps += [(owner, name, _without_draws(value)) for name, value in items if _is_iterator(value)]


def _all(undos: list[Undo]) -> Undo | None:
    return (lambda: [each() for each in undos]) if undos else None


def _parts(value: Any) -> Collection[Any]:
    if isinstance(value, MethodType):
        return (value.__self__,)
    return (*value.args, *value.keywords.values()) if isinstance(value, partial) else value


def _is_frame(value: Any) -> bool:
    return any(base.__module__.partition(".")[0] in _FRAMES for base in type(value).__mro__)


def _is_iterator(value: Any) -> bool:
    return isinstance(value, Iterator) and not isinstance(value, IOBase) and not is_plain(value)


def _without_draws(iterator: Any) -> Any:
    """Copy an iterator, of tensors by reference; where it cannot be copied, say so when a step draws from it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of itertools, from Python 3.12 on
            return copied(iterator, lambda tensor: tensor)
    except BatchCopyError as error:
        return _NoDraw(error.kind)


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
