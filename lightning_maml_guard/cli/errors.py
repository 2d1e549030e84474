"""Errors of the command line in one line: the option, what was passed, what is allowed, and the nearest name."""

from __future__ import annotations

import inspect
import pydoc
import re
import traceback
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from types import FrameType, FunctionType
from typing import Any

_OURS = __name__.partition(".")[0]
# jsonargparse (4.53) tells every type that a value could have had, and shows the value once for each level.
_NOISE = re.compile(
    r"Does not validate against any of the Union|Subtypes: |Errors:$|Given value|Expected a <class 'NoneType'>$"
)
_KEY = re.compile(r'Parser key "([^"]+)":(.*)')
_GIVEN = re.compile(r"Given value: (?!NestedArg\()(.*)")
_CLASS = re.compile(r"class_path[ =]'([\w.]+)'")
_UNKNOWN = re.compile(r"(?:Group '(?P<group>[\w.]+)' does not accept option|Option) '(?P<name>[\w.]+)'")
_UNRECOGNIZED = "unrecognized arguments: "


def explained(message: str, known: Iterable[str]) -> str:
    """Shorten an error of jsonargparse, and name the option that was meant.

    Args:
        message: The error.
        known: The parser's own options, without their dashes.

    Returns:
        One line that names the option; the message as it was where it is of another kind.
    """
    if message.startswith(_UNRECOGNIZED):
        words = [word.partition("=")[0] for word in message.removeprefix(_UNRECOGNIZED).split()]
        near = [_meant(word.removeprefix("--"), known).strip() for word in words if word.startswith("--")]
        return ". ".join([message, *dict.fromkeys(filter(None, near))])
    keys, indents, said = [], [], []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if found := _KEY.match(text):
            keys.append(found[1])
            indents.append(len(line) - len(line.lstrip()))
            text = found[2].strip()
        if text and not _NOISE.match(text) and not text.startswith("Problem with given class_path"):
            said.append(re.sub(r"a <class '([\w.]+)'>", r"\1", text))
    if unknown := _UNKNOWN.search(message):
        name = ".".join([*keys, *filter(None, [unknown["group"]]), unknown["name"]])
        classes = _CLASS.findall(message)
        names = [".".join([*keys, each]) for each in _parameters(classes[-1])] if keys and classes else known
        return f"unrecognized option --{name}.{_meant(name, names)}"
    # Where the values of several keys were tried in turn, the path to one of them is not to be told from its text.
    if not keys or not said or sorted(set(indents)) != indents:
        return message
    text = "; ".join(dict.fromkeys(said))
    given = _GIVEN.search(message)
    shown = given is None or text.endswith(given[1])
    return f"--{'.'.join(keys)}: {text}" + ("" if shown else f". Got value: {given[1]}")  # type: ignore[index]


def refusal(error: BaseException, config: dict[str, Any]) -> str | None:
    """Say what a class or function of this package refused of what the configuration gives it.

    Args:
        error: What the instantiation of the configuration raised.
        config: The configuration, as plain dicts.

    Returns:
        The option and the refusal; None if something else went wrong.
    """
    frames = _frames(error)
    while not frames[-1].f_globals.get("__name__", "").startswith(f"{_OURS}."):
        if error.__cause__ is None:
            return None
        error = error.__cause__  # jsonargparse raises its own from the one that counts
        frames = _frames(error)
    codes = [frame.f_code for frame in frames]
    called = [(codes.index(code), key, target) for key, target, code in _targets(config) if code in codes]
    if not called:
        return None
    _, key, target = max(called, key=lambda each: each[0])
    name = re.search(r"argument `(\w+)", str(error))
    option = f"{key}.{name[1]}" if name and name[1] in _parameters(target) else key
    return f"--{option}: {error}"


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _meant(name: str, known: Iterable[str]) -> str:
    near = _nearest(name, list(known))
    return "" if near is None else f" Did you mean --{near}?"


def _nearest(name: str, known: list[str]) -> str | None:
    """Correct the part before the first dot, and the rest among what stands behind that part."""
    head, _, rest = name.partition(".")
    heads = get_close_matches(head, {each.partition(".")[0] for each in known}, 1)
    if not heads or not rest:
        return heads[0] if heads and name not in known else None
    behind = [each.partition(".")[2] for each in known if each.startswith(f"{heads[0]}.")]
    right = rest if rest in behind or not behind else _nearest(rest, behind)
    return None if right is None or (right, heads[0]) == (rest, head) else f"{heads[0]}.{right}"


def _parameters(target: Any) -> list[str]:
    found = pydoc.locate(target) if isinstance(target, str) else target
    return list(inspect.signature(found).parameters) if callable(found) else []


def _targets(config: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Find every class and function that a configuration names: its key, it, and the code that takes its arguments."""
    if not isinstance(config, dict):
        return
    target = pydoc.locate(config["class_path"]) if isinstance(config.get("class_path"), str) else None
    takes = target if isinstance(target, FunctionType) else getattr(target, "__init__", None)
    if isinstance(takes, FunctionType):
        yield key, target, takes.__code__
    for name, value in config.items():
        yield from _targets(value, key if name == "init_args" else f"{key}.{name}".lstrip("."))
