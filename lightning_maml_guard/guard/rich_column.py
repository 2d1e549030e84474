"""A column of a Rich progress bar that shortens and colours the guard's ratios; the only file that needs rich."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import ProgressColumn, Task
from rich.text import Text

# In 80 columns Lightning's bar leaves some 17 to its metrics, and Rich cuts a longer word.
_PREFIX = re.compile(r"\bguard/(?=(?:alpha|beta)_ratio\b)")


class Coloured(ProgressColumn):
    """Draws another column, without ``guard/`` before the guard's ratios, and colours these.

    Args:
        column: The column.
        styles: Rich styles by the name of the ratio; read at every drawing.
    """

    def __init__(self, column: ProgressColumn, styles: Mapping[str, str]) -> None:
        self.column, self.styles = column, styles
        super().__init__(column.get_table_column())
        self.max_refresh = column.max_refresh

    def render(self, task: Task) -> Any:
        """Draw the column.

        Args:
            task: Rich's task.

        Returns:
            What the column draws, shortened and with colours if it is text.
        """
        drawn = self.column.render(task)
        if not isinstance(drawn, Text):
            return drawn
        for name, style in self.styles.items():
            drawn.highlight_regex(rf"{re.escape(name)}\W*[-+.\w]+", style)
        for found in reversed([*_PREFIX.finditer(drawn.plain)]):
            drawn = drawn[: found.start()] + drawn[found.end() :]
        return drawn


def coloured(columns: Sequence[Any], styles: Mapping[str, str]) -> tuple[Any, ...]:
    """Wrap the columns that print Lightning's metrics.

    Args:
        columns: A bar's columns.
        styles: See :class:`Coloured`; a column that is wrapped already takes them.

    Returns:
        The columns.
    """
    for column in columns:
        if isinstance(column, Coloured):
            column.styles = styles
    return tuple(
        Coloured(column, styles) if type(column).__name__ == "MetricsTextColumn" else column for column in columns
    )
