"""Arguments of a guard from the command line: ``--option margin=0.5 --option curvature.criterion=simplified``."""

from __future__ import annotations

import argparse
import ast
from typing import Any

from lightning_maml_guard import CurvatureOptions, LookaheadOptions


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--option NAME=VALUE``."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of every guard: margin=0.5, curvature.criterion=simplified",
    )


def options_of(given: argparse.Namespace) -> dict[str, Any]:
    """Read them."""
    return dict(map(_option, given.option))


def _option(text: str) -> tuple[str, Any]:
    name, value = text.split("=", 1)
    try:
        return name, ast.literal_eval(value)
    except ValueError:
        return name, value


def guard_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Gather options such as ``curvature.criterion`` in the dataclasses that the guard takes."""
    found = {name: value for name, value in options.items() if "." not in name}
    for group, made in (("curvature", CurvatureOptions), ("lookahead", LookaheadOptions)):
        inner = {name.partition(".")[2]: value for name, value in options.items() if name.startswith(f"{group}.")}
        if inner:
            found[group] = made(**inner)
    return found
