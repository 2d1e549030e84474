"""Copies of batches, whatever their type, and whether a training step changed the batch it was given."""

from __future__ import annotations

import copy
import enum
import types
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Types whose values never change.
ATOMS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type,
    range,
    slice,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.Size,
    types.FunctionType,
    types.BuiltinFunctionType,
    weakref.ref,
)


class _WithoutSlots:
    """An object as small as one without ``__slots__`` can be, to compare others with."""


def is_plain(value: Any) -> bool:
    """Return True if an object holds all of its state in ``__dict__``."""
    return getattr(value, "__dict__", None) is not None and type(value).__basicsize__ <= _WithoutSlots.__basicsize__


class BatchCopyError(TypeError):
    """A batch holds something that cannot be copied; ``kind`` is the name of its type, ``cause`` the reason."""

    def __init__(self, kind: str, cause: BaseException) -> None:
        super().__init__(f"{kind} cannot be copied: {cause}")
        self.kind, self.cause = kind, str(cause)


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad) if tensor.is_leaf else tensor.clone()


def copied(batch: Any, clone: Callable[[Tensor], Tensor] = _clone) -> Any:
    """Copy a batch: containers and objects in their own type, tensors cloned, what cannot change by reference.

    ``clone`` makes the copy of a tensor. Raises a BatchCopyError for what cannot be copied.
    """
    try:
        with _Clones(clone):
            return copy.deepcopy(batch)
    except Exception as error:
        return _copy_parts(batch, clone, error)


class _Clones(TorchFunctionMode):
    """Has ``copy.deepcopy`` clone tensors; by itself it copies the whole storage of a view and no result of a graph."""

    def __init__(self, clone: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._clone = clone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self._clone(args[0])
        return func(*args, **(kwargs or {}))


def _copy_parts(batch: Any, clone: Callable[[Tensor], Tensor], error: Exception) -> Any:
    """Copy what ``deepcopy`` failed at: part by part, and objects by a ``clone`` of their own."""
    kind = type(batch)
    if kind is dict:
        return {key: copied(value, clone) for key, value in batch.items()}
    if kind in (list, tuple, set, deque):
        return kind(copied(value, clone) for value in batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*(copied(value, clone) for value in batch))
    own = getattr(batch, "clone", None)
    if callable(own):
        try:
            return own()
        except Exception as second:
            error = second
    raise BatchCopyError(kind.__name__, error) from error


# Each object that a batch holds, with what changes when the object is written into.
Trace = list[tuple[Any, Any]]


def trace(batch: Any) -> Trace | None:
    """List what a batch holds, so that a change can be seen; None where one could not (NumPy arrays, ``__slots__``)."""
    found: Trace = []
    seen, rest = set(), [batch]
    for value in rest:  # grows while it is gone through
        if isinstance(value, Tensor):
            if value.is_inference():
                return None
            found.append((value, (value._version, value.requires_grad)))
        elif not isinstance(value, (tuple, list, dict)) and isinstance(value, ATOMS):
            found.append((value, None))
        elif id(value) not in seen:
            seen.add(id(value))
            inside = _parts_of(value)
            if inside is None:
                return None
            parts, names = inside
            rest += parts
            found.append((value, None if names is None else (names, [*map(id, parts)])))
    return found


def _parts_of(value: Any) -> tuple[Sequence[Any], Any] | None:
    """List the parts of a container or an object, and their names (None if the parts cannot be replaced by others).

    Returns None if the parts cannot be seen.
    """
    own = getattr(value, "__dict__", None)
    if own is None and isinstance(value, (list, tuple, deque)):
        return value, None if isinstance(value, tuple) else ()
    values, names = ([], ()) if own is None else (list(own.values()), tuple(own))
    if isinstance(value, (list, tuple, deque)):
        return [*value, *values], (len(value), names)
    if isinstance(value, dict):
        return [*value.values(), *values], (tuple(value), names)
    if isinstance(value, (set, frozenset)):
        return values, (frozenset(value), names)
    return (values, (None, names)) if is_plain(value) else None


def changed(before: Trace, batch: Any) -> bool:
    """Return True if a batch is not what it was, or cannot be compared."""
    if before[0][0] is not batch:
        return True
    for value, held in before:
        if held is None:
            continue
        if isinstance(value, Tensor):
            if held != (value._version, value.requires_grad):
                return True
            continue
        inside = _parts_of(value)
        # The trace keeps the parts alive, so no other object has the address of one.
        if inside is None or held != (inside[1], [*map(id, inside[0])]):
            return True
    return False


def equal(one: Trace, other: Trace | None) -> bool:
    """Return True if the tensors of a batch and of its copy hold the same values, bit for bit but for NaN."""
    pairs = zip(_tensors(one), _tensors(other or []), strict=False)
    return other is not None and len(one) == len(other) and all(_same(*pair) for pair in pairs)


def _tensors(found: Trace) -> Sequence[Tensor]:
    return [value for value, _ in found if isinstance(value, Tensor)]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.layout is not torch.strided:
        return True
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
