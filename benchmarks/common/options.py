"""Seeds, and arguments of a guard, from the command line: ``--option curvature.criterion=simplified``."""

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


def add_seeds(parser: argparse.ArgumentParser, sets: dict[str, tuple[int, ...]]) -> None:
    """Add ``--set`` and ``--seeds``."""
    parser.add_argument("--set", choices=tuple(sets), default="report")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of the set")


def seeds_of(
    parser: argparse.ArgumentParser, given: argparse.Namespace, sets: dict[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """Read them; a seed that the set does not have is refused."""
    known = sets[given.set]
    if unknown := sorted(set(given.seeds or ()) - set(known)):
        parser.error(f"--seeds {unknown}: the set {given.set!r} has {', '.join(map(str, known))}")
    return tuple(given.seeds or known)


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
