"""The two ratios in the user's own progress bar, coloured by state where the bar can colour."""

from __future__ import annotations

from typing import Any

from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import EDGE, SAFE, UNSAFE

# What a terminal's theme makes of these words is readable on its background; unsafe is bold for who sees no red.
_STYLES = {SAFE: "green", EDGE: "yellow", UNSAFE: "bold red"}
_BARS = {EDGE: "yellow", UNSAFE: "red"}


def styles(report: StabilityReport) -> dict[str, str]:
    """Choose a style for each ratio: a rate within its limit is green, one beyond it has the colour of the run's state.

    Args:
        report: The check.

    Returns:
        Rich styles by the name of the ratio in the bar; a rate that is not judged has none.
    """
    own = {"guard/alpha_ratio": report.alpha_status, "guard/beta_ratio": report.beta_status}
    # A trial may fail although both rates keep their limits: then neither is to be green.
    blamed = UNSAFE in own.values() or report.status != UNSAFE
    states = {name: SAFE if status == SAFE and blamed else report.status for name, status in own.items()}
    return {name: _STYLES[state] for name, state in states.items() if state in _STYLES}


class Gauges:
    """Colours the ratios in a progress bar.

    Lightning's Rich bar prints its metrics in one column. That column is wrapped, not replaced: it goes on drawing what
    it drew, in the user's theme and by the user's own subclass, and the two ratios in its text are coloured and lose
    their ``guard/``, for which a terminal of 80 columns has no room. tqdm's bar has one colour, of the bar itself: in a
    terminal, and if the user chose none, it is yellow at the edge and red outside.
    """

    def __init__(self) -> None:
        self.styles: dict[str, str] = {}
        self._state = SAFE

    def show(self, trainer: Any, report: StabilityReport) -> None:
        """Colour by what a check found.

        Args:
            trainer: The Trainer.
            report: The check.
        """
        self.styles, self._state = styles(report), report.status
        self.dress(trainer)

    def dress(self, trainer: Any) -> None:
        """Find the bar at hand and colour it; Lightning makes a new one whenever it likes.

        Args:
            trainer: The Trainer.
        """
        bar = trainer.progress_bar_callback
        progress = getattr(bar, "progress", None)
        if progress is not None and hasattr(progress, "columns"):
            from lightning_maml_guard.guard.rich_column import coloured

            progress.columns = coloured(progress.columns, self.styles)
            return
        tqdm = getattr(bar, "train_progress_bar", None) if hasattr(bar, "init_train_tqdm") else None
        colour = _BARS.get(self._state)
        ours = getattr(tqdm, "colour", None) in {None, *_BARS.values()}
        if tqdm is not None and not tqdm.disable and ours and tqdm.fp.isatty():
            tqdm.colour = colour
