"""Copies of learning-rate schedulers that can be stepped without a trace on the live ones.

``copy.deepcopy`` would copy a module and its Trainer with a method that computes the rate, and would share the counter
in a closure. Here a pickler copies what a scheduler may write into (itself, its optimizer's groups, callable objects,
closures) and passes by what it only reads.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# A scheduler that holds more than this holds data, not a schedule.
LARGEST_COPY = 2**24
_CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, defaultdict})


class SchedulerCopies:
    """Stand-ins of optimizers, with the same groups and no parameters, and copies of schedulers that move them.

    ``shared`` are objects that schedulers may read and that are not copied, as a Trainer.
    """

    def __init__(self, optimizers: Iterable[Optimizer], shared: Iterable[object] = ()) -> None:
        # By identity; the live object is kept as well, so that no other takes its id.
        self._instead: dict[int, tuple[object, Any]] = {id(each): (each, each) for each in shared}
        live = list(optimizers)
        # Numbers for tensor rates (capturable, fused): a scheduler of tensors takes ten times as long to step.
        self._numbers = any(isinstance(group["lr"], Tensor) for each in live for group in each.param_groups)
        self.optimizers = [self._stand_in(each) for each in live]

    def copies(self, schedulers: list[Any]) -> list[Any]:
        """Copy schedulers together, so that what they share is shared by the copies; raises what copying raises."""
        file, kept = _Bounded(), list[Any]()
        _Pickler(file, self, kept).dump(schedulers)
        file.seek(0)
        unpickler = _Unpickler(file)
        unpickler.kept = kept
        return unpickler.load()

    def instead_of(self, value: object) -> tuple[Any] | None:
        """Return what the copies use in place of an object, in a tuple; None if the object is to be pickled."""
        if id(value) in self._instead:
            return (self._instead[id(value)][1],)
        if isinstance(value, Optimizer):
            return (self._stand_in(value),)
        if isinstance(value, nn.Module):
            return (self._put(value, _twin(value)),)
        if isinstance(value, Tensor):
            return (self._put(value, self._copied(value)),)
        if isinstance(value, (type, ModuleType, CodeType)):
            return (value,)
        if isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, (ModuleType, type(None))):
            return (value,)
        if isinstance(value, FunctionType) and not _has_state(value):
            return (value,)
        return None

    def _put(self, live: object, instead: Any) -> Any:
        self._instead[id(live)] = (live, instead)
        return instead

    def _stand_in(self, optimizer: Optimizer) -> Optimizer:
        if id(optimizer) in self._instead:
            return self._instead[id(optimizer)][1]
        # Not of the optimizer's own class, whose `param_groups` may be a property that reaches the live ones.
        stand_in = object.__new__(Optimizer)
        groups = [self._group(group) for group in optimizer.param_groups]
        stand_in.__dict__.update(
            param_groups=groups, defaults=dict(optimizer.defaults), state=defaultdict(dict), step=_step
        )
        stand_in._opt_called = True  # type: ignore[attr-defined]
        self._put(optimizer.param_groups, groups)
        return self._put(optimizer, stand_in)

    def _group(self, group: dict[str, Any]) -> dict[str, Any]:
        if id(group) not in self._instead:  # a wrapper and the optimizer inside have the same groups
            options = {
                key: self._copied(value) if isinstance(value, Tensor) else _copied_container(value)
                for key, value in group.items()
                if key != "params"
            }
            self._put(group, {**options, "params": []})
        return self._instead[id(group)][1]

    def _copied(self, tensor: Tensor) -> Tensor | float:
        if self._numbers and tensor.dim() == 0 and tensor.is_floating_point():
            return float(tensor)
        if tensor.requires_grad or tensor.grad_fn is not None:
            return tensor
        if tensor.numel() * tensor.element_size() > LARGEST_COPY:
            raise ValueError("the scheduler holds a large tensor and was not copied")
        return tensor.detach().clone()


def _step(*_: Any, **__: Any) -> None:
    """Do nothing: a stand-in has no parameters."""


_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


class _Kept:
    """Passes an object by the pickler as it is."""

    def __init__(self, value: object) -> None:
        self.value = value


class _Bounded(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > LARGEST_COPY:
            raise ValueError(f"the scheduler holds more than {LARGEST_COPY >> 20} MB and was not copied")
        return super().write(data)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, copies: SchedulerCopies, kept: list[Any]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._copies, self._kept = copies, kept

    def persistent_id(self, value: Any) -> int | None:
        instead = (value.value,) if type(value) is _Kept else self._copies.instead_of(value)
        if instead is None:
            return None
        self._kept.append(instead[0])
        return len(self._kept) - 1

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, LRScheduler):
            # Its own __getstate__, if any, is for checkpoints.
            return object.__new__, (type(value),), vars(value), None, None, _set_attributes
        if isinstance(value, MethodType):
            return MethodType, (value.__func__, value.__self__)
        if isinstance(value, FunctionType):
            contents = [_contents(cell) for cell in value.__closure__ or ()]
            state = contents, value.__defaults__, value.__kwdefaults__, vars(value)
            return _without_state, (_Kept(value),), state, None, None, _set_state
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    kept: list[Any]

    def persistent_load(self, pid: int) -> Any:
        return self.kept[pid]


def _set_attributes(scheduler: LRScheduler, attributes: dict[str, Any]) -> None:
    scheduler.__dict__.update(attributes)


def _has_state(function: FunctionType) -> bool:
    return bool(function.__closure__ or function.__defaults__ or function.__kwdefaults__ or vars(function))


def _contents(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:
        return []  # a name that nothing was assigned to yet


def _without_state(function: FunctionType) -> FunctionType:
    cells = tuple(CellType() for _ in function.__closure__ or ())
    return FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)


def _set_state(function: FunctionType, state: tuple[list[list[Any]], Any, Any, dict[str, Any]]) -> None:
    contents, function.__defaults__, function.__kwdefaults__, attributes = state
    function.__dict__.update(attributes)
    for cell, content in zip(function.__closure__ or (), contents, strict=True):
        if content:
            (cell.cell_contents,) = content


def _twin(module: nn.Module) -> nn.Module:
    """A module with attributes and containers of its own; parameters, buffers and layers are the live ones."""
    if hasattr(module, "__del__"):
        return module  # a twin's end would close what the live one uses
    twin = object.__new__(type(module))
    twin.__dict__.update({name: _copied_container(value) for name, value in vars(module).items()})
    return twin


def _copied_container(value: Any) -> Any:
    return copy.copy(value) if type(value) in _CONTAINERS else value
