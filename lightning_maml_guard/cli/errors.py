"""Errors of the command line in one line: the option, what was passed, what is allowed, and the nearest name."""

from __future__ import annotations

import inspect
import pydoc
import re
import sys
import traceback
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import CodeType, FrameType, FunctionType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from lightning_maml_guard.utils.checks import check_number, did_you_mean, first_line

_OURS = f"{__name__.partition('.')[0]}."
_UNRECOGNIZED = "unrecognized arguments: "
# jsonargparse (4.53) chains its exceptions from the option at the command line down to the value that is wrong. Only in
# their text are the name of an option at each level, the name of an option that doesn't exist, and the first of the
# types that a value may have.
_KEY = re.compile(r'Parser key "([^"]+)"')
_QUOTED = re.compile(r"'([^']+)'")
_WRONG_TYPE = re.compile(r"Expected a (?:<class '[^']+'>|[\w.]+\[.*\]|collections\.abc\.\w+)(?=\. Got value: )")
# Also in their text: a path that names nothing in a module that there is, and a name that is no class of the option's.
_NOT_IN_MODULE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_NO_CLASS = re.compile(r"(?:Expected a dot import path string: |Got value: )(\w+)$")


class ClassOptionError(ArgumentError):
    """An error among the arguments of a class or function that the command line names."""

    def __init__(self, message: str, options: Sequence[Action]) -> None:
        super().__init__(None, message)
        self.options = options


def option_names(options: Iterable[Action]) -> list[str]:
    """List the options that the help shows, without their dashes."""
    words = [word for option in options if option.help != SUPPRESS for word in option.option_strings]
    return [word.removeprefix("--") for word in words if not word.endswith((".help", "+"))]


def with_nearest(message: str, known: Sequence[str]) -> str:
    """Add the options that were probably meant to an error about unrecognized arguments; leave other errors alone."""
    if not message.startswith(_UNRECOGNIZED):
        return message
    words = [word.partition("=")[0] for word in message.removeprefix(_UNRECOGNIZED).split()]
    hints = [_did_you_mean(word.removeprefix("--"), known) for word in words if word.startswith("--")]
    return ". ".join([message, *dict.fromkeys(filter(None, hints))])


def wrong_option(error: BaseException | None, options: Sequence[Action]) -> str | None:
    """Describe the option that an error of the parser with these options is about; None for errors of other kinds."""
    keys: list[str] = []
    above = text = ""
    while error is not None:
        text = str(error).strip()
        if isinstance(error, ClassOptionError):
            options, above = error.options, "".join(f"{key}." for key in keys)
        if unknown := _unknown_option(error, text):
            meant = _did_you_mean(unknown, option_names(options), above)
            return f"unrecognized option --{above}{unknown}. {meant}".rstrip()
        if isinstance(error, TypeError) and (found := _KEY.match(text)):
            keys.append(found[1])
        error = error.__cause__
    if not keys:
        return None
    said = text.partition("\n")[0]
    hint = next((getattr(option, "_typehint", None) for option in options if option.dest == keys[-1]), None)
    if hint is not None and (wrong := _WRONG_TYPE.search(said)):
        said = f"Expected {_type_name(hint)}{said[wrong.end() :]}"
    meant = _class_meant(said, hint)
    return f"--{'.'.join(keys)}: {said}" + (f". {meant}" if meant else "")


def wrong_for_trainer(error: BaseException) -> str | None:
    """Describe what Lightning's Trainer rejected of its options; None for errors of other places."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    module = last.f_globals.get("__name__", "")
    return (
        f"--trainer: {first_line(error)}" if module.startswith(("pytorch_lightning.", "lightning.pytorch.")) else None
    )


def wrong_rate(config: Mapping[str, Any]) -> str | None:
    """Describe the first option of an optimizer or schedule that is no learning rate; torch takes inf for one."""
    for key, value in config.items():
        name = key.rpartition(".")[2]
        if name in {"lr", "max_lr"} and isinstance(value, (int, float)):
            try:
                check_number(name, value, least=0)
            except ValueError as error:
                return f"--{key.replace('.init_args', '')}: {error}"
    return None


def wrong_argument(error: BaseException, config: Mapping[str, Any]) -> str | None:
    """Describe the option whose value an argument check of this package rejected; None for errors of other kinds."""
    while True:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if frames[-1].f_globals.get("__name__", "").startswith(_OURS):
            break
        if error.__cause__ is None:
            return None
        error = error.__cause__  # jsonargparse raises its own from that of the check
    places: dict[CodeType, tuple[str, Iterable[str]]] = {}
    for key, path in config.items():  # jsonargparse lists a configuration's values by their full keys
        target: Any = pydoc.locate(str(path)) if key.endswith(".class_path") else None
        if code := _code(target):
            places.setdefault(code, (key.removesuffix(".class_path"), inspect.signature(target).parameters))
    called = [place for frame in frames if (place := places.get(frame.f_code) or _dataclass_place(frame, config))]
    if not called:
        return None
    key, parameters = called[-1]
    name = re.search(r"[Aa]rgument `(\w+)", str(error))
    option = f"{key}.{name[1]}" if name and name[1] in parameters else key
    return f"--{option.replace('.init_args', '')}: {error}"


def _class_meant(said: str, hint: Any) -> str:
    """Name the class or function that was probably meant by a path that leads nowhere."""
    if found := _NOT_IN_MODULE.search(said):
        module = sys.modules[found[1]]
        near = did_you_mean(found[2], [name for name in vars(module) if not name.startswith("_")])
        return near.replace("mean '", f"mean '{found[1]}.")
    found = _NO_CLASS.search(said)
    return did_you_mean(found[1], _classes(hint)) if found else ""


def _classes(hint: Any) -> set[str]:
    """The classes that an option of this type takes by their name alone."""
    if isinstance(hint, type) and get_origin(hint) is None:
        return {hint.__name__}.union(*map(_classes, hint.__subclasses__())) if hint.__module__ != "builtins" else set()
    return set().union(*(_classes(part) for part in get_args(hint) if not isinstance(part, list)))


def _unknown_option(error: BaseException, text: str) -> str | None:
    if isinstance(error, KeyError) and "not accept" in text:  # behind its group's name where it has one
        return ".".join(_QUOTED.findall(text))
    if isinstance(error, ArgumentError) and text.startswith(_UNRECOGNIZED):
        return text.removeprefix(f"{_UNRECOGNIZED}--").partition("=")[0]
    return None


def _dataclass_place(frame: FrameType, config: Mapping[str, Any]) -> tuple[str, Iterable[str]] | None:
    """Return the key and fields of an options dataclass made here: a configuration has no class_path of those."""
    options = frame.f_locals.get("self")
    if not is_dataclass(options):
        return None
    names = {field.name for field in fields(options)}
    groups: dict[str, set[str]] = {}
    for key, _ in config.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, set()).add(name)
    return next(((group, names) for group, found in groups.items() if found == names), None)


def _code(target: Any) -> CodeType | None:
    takes = target if isinstance(target, FunctionType) else getattr(target, "__init__", None)
    return getattr(takes, "__code__", None)


def _type_name(hint: Any) -> str:
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = [each.__name__ if isinstance(each, type) else str(each) for each in types if each is not NoneType]
    return re.sub(r"(?:\w+\.)+", "", " or ".join(names))


def _did_you_mean(name: str, known: Sequence[str], above: str = "") -> str:
    """Correct the part before the first dot and the rest among the options that begin so; else complete the name."""
    head, dot, rest = name.partition(".")
    heads = get_close_matches(head, {each.partition(".")[0] for each in known}, 1)
    behind = [each.partition(".")[2] for each in known if heads and each.startswith(f"{heads[0]}.")]
    rests = get_close_matches(rest, behind, 1) if rest and behind else [rest]
    near = f"{heads[0]}{dot}{rests[0]}" if heads and rests else name
    if near == name and not dot:  # --optimizer for --model.optimizer
        ends = {each.rpartition(".")[2]: each for each in reversed(known)}
        near = next((ends[each] for each in get_close_matches(name, ends, 1)), name)
    return "" if near == name else f"Did you mean --{above}{near}?"
