"""Errors of the command line in one line: the option, what was passed, what is allowed, and the nearest name."""

from __future__ import annotations

import inspect
import pydoc
import re
import traceback
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import FunctionType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin

_OURS = f"{__name__.partition('.')[0]}."
_UNRECOGNIZED = "unrecognized arguments: "
# jsonargparse (4.53) chains its exceptions from the option at the command line down to the value that is wrong. Only in
# their text are the name of an option at each level, the name of an option that doesn't exist, and the first of the
# types that a value may have.
_KEY = re.compile(r'Parser key "([^"]+)"')
_QUOTED = re.compile(r"'([^']+)'")
_WRONG_TYPE = re.compile(r"Expected a (?:<class '[^']+'>|[\w.]+\[.*\]|collections\.abc\.\w+)(?=\. Got value: )")


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
        elif isinstance(error, KeyError):  # no such option: its name, behind its group's where it has one
            name = ".".join(_QUOTED.findall(text))
            return f"unrecognized option --{above}{name}. {_did_you_mean(name, option_names(options), above)}".rstrip()
        elif isinstance(error, TypeError) and (found := _KEY.match(text)):
            keys.append(found[1])
        error = error.__cause__
    if not keys:
        return None
    hint = next((getattr(option, "_typehint", None) for option in options if option.dest == keys[-1]), None)
    said = _WRONG_TYPE.sub(f"Expected {_type_name(hint)}", text.partition("\n")[0])
    return f"--{'.'.join(keys)}: {said}"


def wrong_argument(error: BaseException, config: Mapping[str, Any]) -> str | None:
    """Describe the option whose value an argument check of this package rejected; None for errors of other kinds.

    ``config`` is jsonargparse's, which lists its values by their full keys.
    """
    classes = [(key, pydoc.locate(path)) for key, path in config.items() if key.endswith("class_path") and path]
    codes = {_code(target): (key, target) for key, target in reversed(classes)}
    while True:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if frames[-1].f_globals.get("__name__", "").startswith(_OURS):
            break
        if error.__cause__ is None:
            return None
        error = error.__cause__  # jsonargparse raises its own from that of the check
    called = [codes[frame.f_code] for frame in frames if frame.f_code in codes]
    if not called:
        return None
    key, target = called[-1]
    option = key.removesuffix("class_path").replace(".init_args.", ".")
    name = re.search(r"argument `(\w+)", str(error))
    known = name and name[1] in inspect.signature(target).parameters
    return f"--{f'{option}{name[1]}' if known else option.rstrip('.')}: {error}"


def _code(target: Any) -> Any:
    takes = target if isinstance(target, FunctionType) else getattr(target, "__init__", None)
    return getattr(takes, "__code__", None)


def _type_name(hint: Any) -> str:
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = [each.__name__ if isinstance(each, type) else str(each) for each in types if each is not NoneType]
    return re.sub(r"(?:\w+\.)+", "", " or ".join(names))


def _did_you_mean(name: str, known: Sequence[str], above: str = "") -> str:
    """Correct the part before the first dot, and the rest among the options that begin with that part."""
    head, dot, rest = name.partition(".")
    heads = get_close_matches(head, {each.partition(".")[0] for each in known}, 1)
    behind = [each.partition(".")[2] for each in known if heads and each.startswith(f"{heads[0]}.")]
    rests = get_close_matches(rest, behind, 1) if rest and behind else [rest]
    near = f"{heads[0]}{dot}{rests[0]}" if heads and rests else name
    return "" if near == name else f"Did you mean --{above}{near}?"
