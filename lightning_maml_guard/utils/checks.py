"""Checks of arguments, with messages in the same words: what was expected, what was given, what to do."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np


def encodable(text: str) -> str:
    """Escape lone surrogates, which UTF-8 cannot hold: a file's name that is not UTF-8 has them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any) -> str:
    """Return the repr of a value in one line, cut to 100 characters."""
    text = encodable(" ".join(repr(value).split()))
    return text if len(text) <= 100 else text[:97] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type without one."""
    return encodable((str(error).strip().splitlines() or [type(error).__name__])[0])


def check_count(name: str, value: Any, least: int = 1, most: float = sys.maxsize) -> None:
    """Raise a ValueError if a count is not an integer from ``least`` to ``most``, by default what a container holds."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"Expected argument `{name}` to be an integer of at least {least} but got {shown(value)}. Pass a Python "
            f"integer such as {max(least, 1)}; int(x) makes one of a NumPy or torch number."
        )
    if value > most:
        raise ValueError(
            f"Expected argument `{name}` to be an integer of at most {most} but got {shown(value)}. Choose a smaller "
            "one."
        )


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    infinite: bool = False,
) -> None:
    """Raise a ValueError if a value is not a finite number within its limits; ``infinite``: or infinity."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if (
        number
        and (math.isfinite(value) or (infinite and value == math.inf))
        and (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
        and (most is None or value <= most)
    ):
        return
    if below is not None and above is not None:
        allowed = f"number between {above:g} and {below:g}"
    elif below is not None:
        allowed = f"number of at least {least:g} and below {below:g}"
    elif most is not None:
        allowed = f"number above {above:g} and at most {most:g}"
    else:
        allowed = f"finite number above {above:g}" if above is not None else f"finite number of at least {least:g}"
    remedy = "Choose one in that range" if number else "Pass a plain number; float(x) makes one of text or a tensor"
    raise ValueError(f"Expected argument `{name}` to be a {allowed} but got {shown(value)}. {remedy}.")


def check_rates(name: str, values: Any) -> list[float]:
    """Return learning rates as floats; raise a ValueError if they are no list of finite numbers of at least 0."""
    found = values.tolist() if hasattr(values, "tolist") else values  # of NumPy or torch
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes, dict)):
        raise ValueError(
            f"Expected argument `{name}` to hold learning rates but got {shown(values)}. Pass a list of numbers, such "
            "as [0.01, 0.1]."
        )
    found = list(found)
    for each in found:
        check_number(name, each, least=0)
    return [float(each) for each in found]


def check_flag(name: str, value: Any) -> None:
    """Raise a ValueError if a value is neither True nor False: text and numbers would silently count as one of them."""
    if not isinstance(value, bool):
        raise ValueError(
            f"Expected argument `{name}` to be True or False but got {shown(value)}. Pass the boolean itself: "
            f"{name}=True or {name}=False."
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question after the nearest of the known names, or an empty text; case does not count."""
    by_lower = {each.lower(): each for each in known}
    near = get_close_matches(name.lower(), list(by_lower), 1)
    return f"Did you mean {by_lower[near[0]]!r}?" if near else ""


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise a ValueError if a word is not among those allowed."""
    if isinstance(value, str) and value in allowed:
        return
    meant = did_you_mean(value, allowed) if isinstance(value, str) else ""
    raise ValueError(
        f"Expected argument `{name}` to be one of {tuple(allowed)} but got {shown(value)}. "
        f"{meant or 'Pass one of these words.'}"
    )


def check_function(name: str, value: Any, signature: str, example: str) -> None:
    """Raise a TypeError if a value cannot be called; the message shows its signature and an example."""
    if not callable(value):
        raise TypeError(
            f"Expected argument `{name}` to be callable, {signature}, but got {shown(value)}. Pass a function, such "
            f"as {example}."
        )


def check_folder(name: str, value: Any) -> None:
    """Raise a TypeError if a value is neither None nor a path; the folder need not exist."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(
            f"Expected argument `{name}` to be the path of a folder or None but got {shown(value)}. Pass a string or "
            "a pathlib.Path, or None for the default."
        )


def check_attribute(name: str, value: Any) -> None:
    """Raise a TypeError if a value is neither None nor the name of an attribute."""
    if value is not None and not isinstance(value, str):
        raise TypeError(
            f"Expected argument `{name}` to be the name of an attribute or None but got {shown(value)}. Pass the name "
            "as a string, such as 'inner_lr'."
        )


def check_file(name: str, value: Any) -> None:
    """Raise a TypeError if a value is not a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(
            f"Expected argument `{name}` to be the path of a file but got {shown(value)}. Pass a string or a "
            "pathlib.Path, such as 'run.html'."
        )


def check_holds_rate(name: str, rate: float, values: Iterable[Any]) -> None:
    """Raise a ValueError if the type of a tensor among the parameters that a rate is to move cannot hold it."""
    import torch  # here, so that `theory` can be imported without torch

    for dtype in {value.dtype for value in values}:
        most = torch.finfo(dtype).max
        if rate > most:
            raise ValueError(
                f"Expected argument `{name}` to be a number that the parameters' type {dtype} holds, {most:.3g} at "
                f"most, but got {shown(rate)}. Choose a smaller rate, or convert the network with double()."
            )


def check_device(name: str, value: Any) -> None:
    """Raise a ValueError if a value is neither None nor a device that can hold values."""
    import torch  # here, so that `theory` can be imported without torch

    if value is None:
        return
    message = (
        f"Expected argument `{name}` to be a device such as 'cpu' or 'cuda:0', or None, but got {shown(value)}. Pass "
        "its name; the 'meta' device holds no values."
    )
    if not isinstance(value, (str, torch.device)):
        raise ValueError(message)
    try:
        kind = torch.device(value).type
    except RuntimeError as error:
        raise ValueError(message) from error
    if kind == "meta":
        raise ValueError(message)


def checked(kind: Callable[[str], Any], check: Callable[[Any], None]) -> Callable[[str], Any]:
    """Make a ``type`` for argparse from a conversion and a check, whose errors become errors of the parser."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from error
        try:
            check(value)
        except ValueError as error:
            said, _, _ = str(error).partition(". ")  # what follows is advice on Python's types
            raise argparse.ArgumentTypeError(said) from error
        return value

    return parse
