"""What a guard has to show after, or in the middle of, a run."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_maml_guard.guard.messages import IN_PYTHON, Spelling
from lightning_maml_guard.guard.run import Run
from lightning_maml_guard.stability.report import StabilityReport

if TYPE_CHECKING:
    import pandas as pd


class Results:
    """The readable side of a :class:`~lightning_maml_guard.ConvergenceGuard`.

    Attributes:
        spelling: How messages write the guard's arguments; the command line sets its own.
    """

    spelling: Spelling = IN_PYTHON
    _run: Run

    @property
    def history(self) -> list[StabilityReport]:
        """The reports of the latest ``history_size`` checks."""
        return self._run.history

    @property
    def severities(self) -> list[tuple[int, float]]:
        """Steps of the latest trials, with ``log(loss after it / loss training started from)``."""
        return self._run.severities

    @property
    def stopped_step(self) -> int | None:
        """Step at which the guard stopped the run; None if it did not."""
        return self._run.intervention.stopped_step

    @property
    def stopping_reason(self) -> str | None:
        """Why the guard stopped the run; None if it did not."""
        return self._run.intervention.stopping_reason

    def frame(self) -> pd.DataFrame:
        """Put the history into a pandas table.

        Returns:
            A check a row, indexed by ``step``: ``status``, the numbers of a :class:`StabilityReport` under their own
            names, intervals as ``..._low`` and ``..._high``, and ``reasons`` as one text.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        from lightning_maml_guard.guard.table import frame

        return frame(self.history)

    def settings(self) -> dict[str, Any]:
        """Read the guard's arguments.

        Returns:
            Their values by name, in the constructor's order.
        """
        return {name: getattr(self, name) for name in signature(type(self)).parameters if hasattr(self, name)}

    def plot(self) -> Any:
        """Draw the safe region with the path of ``(alpha, beta)`` in it.

        Returns:
            ``(fig, ax)`` of matplotlib.
        """
        from lightning_maml_guard.plots.region import safe_region

        return safe_region(self.history)

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page about the run: no network, readable in light, dark and on paper.

        Args:
            path: Where to, for example ``"run.html"``; its folder must exist.

        Returns:
            The path.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from lightning_maml_guard.guard.html_report import write

        return write(self, path)
