"""How messages look: the spelling of a guard's arguments, and lines wrapped for a terminal."""

from __future__ import annotations

import math
import textwrap
from typing import Any

_WIDTH = 100


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


def rates(alpha: float, beta: float, joint: str = ", ") -> str:
    """Write a pair of rates, the inner one only where there is an inner loop."""
    return ("" if math.isnan(alpha) else f"alpha = {alpha:.3g}{joint}") + f"beta = {beta:.3g}"


def block(message: str) -> str:
    """Wrap a message for a terminal: all lines but the first are indented."""
    first, *others = message.splitlines()
    options: dict[str, Any] = {"width": _WIDTH, "break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(first, subsequent_indent="  ", **options)
    for other in others:
        lines += textwrap.wrap(other, initial_indent="  ", subsequent_indent="    ", **options)
    return "\n".join(lines)
