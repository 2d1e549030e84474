"""The modules that a function can call: in its closure, among the globals and behind the attributes that it names."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

Names = frozenset[str]


def modules_of(*roots: Any) -> list[nn.Module]:
    """List the modules that functions can call, directly or through others, without the parts of a listed one."""
    found: list[nn.Module] = []
    seen: dict[tuple[int, Names], Any] = {}  # holds what it has seen, so that no id is used twice
    waiting: list[tuple[Any, Names]] = [(root, frozenset()) for root in roots]
    while waiting:
        value, names = waiting.pop()
        if (id(value), names) in seen:
            continue
        seen[id(value), names] = value
        if not isinstance(value, nn.Module):
            waiting += _reachable_from(value, names)
        elif all(value is not each for each in found):
            found.append(value)
    parts = {id(part) for module in found for part in module.modules() if part is not module}
    return [module for module in found if id(module) not in parts]


def _reachable_from(value: Any, names: Names) -> Iterator[tuple[Any, Names]]:
    """Yield what a value leads to; ``names`` are those used by the function that led to the value."""
    if isinstance(value, FunctionType):
        yield from _from_function(value)
    elif isinstance(value, MethodType):
        yield value.__func__, names
        yield value.__self__, _names(value.__func__)
    elif isinstance(value, functools.partial):
        yield from ((each, names) for each in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((each, names) for each in value)
    elif isinstance(value, dict):
        yield from ((each, names) for each in value.values())
    else:
        yield from _from_object(value, names)


def _from_function(function: FunctionType) -> Iterator[tuple[Any, Names]]:
    names = _names(function)
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    held = [*defaults, *vars(function).values()]
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:
            continue  # a name that is not bound yet
    if (function.__module__ or "").partition(".")[0] != "torch":
        held += [function.__globals__[name] for name in names if name in function.__globals__]
    yield from ((each, names) for each in held)


def _from_object(value: Any, names: Names) -> Iterator[tuple[Any, Names]]:
    own = getattr(value, "__dict__", {})
    if isinstance(value, (ModuleType, type)):
        yield from ((own[name], names) for name in names if name in own)
        return
    for name in sorted(names | {"__call__"}):
        held = own[name] if name in own else _of_class(type(value), name)
        if isinstance(held, FunctionType) and name not in own:
            yield held, names
            yield value, _names(held)
        elif name in own:
            yield held, names


def _of_class(kind: type, name: str) -> Any:
    """An attribute as a class or one of its bases holds it: `inspect.getattr_static` takes ten times as long."""
    return next((vars(each)[name] for each in kind.__mro__ if name in vars(each)), None)


def _names(function: Any) -> Names:
    code = getattr(function, "__code__", None)
    return frozenset() if code is None else frozenset(_names_in(code))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _names_in(each)
