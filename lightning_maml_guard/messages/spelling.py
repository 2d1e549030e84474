"""How messages look: how arguments and numbers are written, and lines wrapped for a terminal."""

from __future__ import annotations

import math
import shutil
import textwrap
from typing import Any

_NARROWEST, _WIDEST = 40, 100


class Spelling:
    """How a guard's arguments are written: in Python. The command line has a spelling of its own."""

    def arguments(self, **given: Any) -> str:
        """Write arguments by name and value."""
        return ", ".join(f"{name}={value!r}" for name, value in given.items())

    def guard(self, **given: Any) -> str:
        """Write a guard with these arguments."""
        return f"ConvergenceGuard({self.arguments(**given)})"

    def trainer(self, **given: Any) -> str:
        """Write a Trainer with these arguments."""
        return f"Trainer({self.arguments(**given)})"


IN_PYTHON = Spelling()


def two_digits(value: float) -> str:
    """Write a number with two digits, or with all before its point: 0.25, 7.2, 13, 130."""
    return f"{value:.0f}" if 10 <= value < 1e5 else f"{value:.2g}"


def multiple(share: float) -> str:
    """Write how many times its limit a rate is: two digits, and three around 1."""
    return f"{share:.3g}x" if 0.95 < share < 1.05 else f"{two_digits(share)}x"


def rates(alpha: float, beta: float, joint: str = ", ") -> str:
    """Write a pair of rates, the inner one only where there is an inner loop."""
    return ("" if math.isnan(alpha) else f"alpha = {alpha:.3g}{joint}") + f"beta = {beta:.3g}"


def to_configure(alpha: float | None, beta: float | None, setting: str = "lr", *, several: bool = False) -> list[str]:
    """Write the rates to set, each with the argument that it is for; None or ``nan``: one that is left as it is."""
    found = []
    if alpha is not None and not math.isnan(alpha):
        found.append(f"the inner rate (inner_lr) to {alpha:.3g}")
    if beta is not None and not math.isnan(beta):
        owner = "schedule" if setting == "max_lr" else "optimizer"
        groups = " (the largest of several; lower the others in proportion)" if several else ""
        found.append(f"the {owner}'s {setting} to {beta:.3g}{groups}")
    return found


def block(message: str) -> str:
    """Wrap a message to the terminal, between words; all lines but the first are indented."""
    first, *others = message.splitlines()
    width = min(max(shutil.get_terminal_size((_WIDEST, 24)).columns, _NARROWEST), _WIDEST)
    options: dict[str, Any] = {"width": width, "break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(first, subsequent_indent="  ", **options)
    for other in others:
        lines += textwrap.wrap(other, initial_indent="  ", subsequent_indent="    ", **options)
    return "\n".join(lines)
