"""Checks of arguments that every room makes in the same words: what was expected, what came, what to do."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np


def shown(value: Any) -> str:
    """Show a value in a message, cut where it is long.

    Args:
        value: The value.

    Returns:
        At most 100 characters of one line.
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."


def first_line(error: BaseException) -> str:
    """Say what an error says, in one line.

    Args:
        error: The error.

    Returns:
        The first line of its text; its type's name where it has none.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse a count that is not an integer of at least ``least``.

    Args:
        name: What the message calls it.
        value: The count.
        least: Smallest that is allowed.

    Raises:
        ValueError: If it is not allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"Expected argument `{name}` to be an integer of at least {least} but got {shown(value)}. Pass a Python "
            f"integer such as {max(least, 1)}; int(x) makes one of a NumPy or torch number."
        )


def check_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    """Refuse what is not a finite number within its limits.

    Args:
        name: What the message calls it.
        value: The number.
        least: Smallest that is allowed.
        above: What it must exceed.
        below: What it must stay below.

    Raises:
        ValueError: If it is not allowed.
    """
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if (
        number
        and math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
    ):
        return
    if below is not None:
        allowed = f"number between {above:g} and {below:g}"
    else:
        allowed = f"finite number above {above:g}" if above is not None else f"finite number of at least {least:g}"
    remedy = "Choose one in that range" if number else "Pass a plain number; float(x) makes one of text or a tensor"
    raise ValueError(f"Expected argument `{name}` to be a {allowed} but got {shown(value)}. {remedy}.")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False: words and numbers would count as one of them unasked.

    Args:
        name: What the message calls it.
        value: The flag.

    Raises:
        ValueError: If it is not allowed.
    """
    if not isinstance(value, bool):
        raise ValueError(
            f"Expected argument `{name}` to be True or False but got {shown(value)}. Pass the boolean itself: "
            f"{name}=True or {name}=False."
        )


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a word that is not among those allowed.

    Args:
        name: What the message calls it.
        value: The word.
        allowed: The words.

    Raises:
        ValueError: If it is not allowed.
    """
    if isinstance(value, str) and value in allowed:
        return
    near = get_close_matches(value, allowed, 1) if isinstance(value, str) else []
    raise ValueError(
        f"Expected argument `{name}` to be one of {tuple(allowed)} but got {shown(value)}. "
        + (f"Did you mean {near[0]!r}?" if near else "Pass one of these words.")
    )


def check_function(name: str, value: Any, signature: str, example: str) -> None:
    """Refuse what can't be called.

    Args:
        name: What the message calls it.
        value: The function.
        signature: What it takes and returns.
        example: One that would do.

    Raises:
        TypeError: If it is not callable.
    """
    if not callable(value):
        raise TypeError(
            f"Expected argument `{name}` to be callable, {signature}, but got {shown(value)}. Pass a function, such "
            f"as {example}."
        )


def check_folder(name: str, value: Any) -> None:
    """Refuse what can't be the path of a folder; whether it exists is found out when it is read.

    Args:
        name: What the message calls it.
        value: The path, or None for the default.

    Raises:
        TypeError: If it is no path.
    """
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(
            f"Expected argument `{name}` to be the path of a folder or None but got {shown(value)}. Pass a string or "
            "a pathlib.Path, or None for the default."
        )


def check_device(name: str, value: Any) -> None:
    """Refuse what names no device that can hold values.

    Args:
        name: What the message calls it.
        value: The device, or None for the default.

    Raises:
        ValueError: If it is not allowed.
    """
    import torch  # here, for the numbers of `theory` are to be had without it

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
    """Make a check a ``type`` of argparse's, so that what it refuses is the parser's error.

    Args:
        kind: Makes the value of the text.
        check: Raises if the value is not allowed.

    Returns:
        From the text to the value.
    """

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from error
        try:
            check(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return parse
