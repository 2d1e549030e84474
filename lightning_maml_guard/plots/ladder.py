"""The ladder of rates that ``suggest_rates`` climbed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_maml_guard.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_maml_guard.phase.ladder import RateLadder


def rate_ladder(
    ladder: RateLadder, suggested: tuple[float, float] = (math.nan, math.nan), ax: Any = None
) -> tuple[Any, Axes]:
    """Draw the loss after a rung's steps over the outer rate, one line for each inner rate.

    Args:
        ladder: The ladder.
        suggested: The pair to mark.
        ax: Axes to draw on (default: a new figure).

    Returns:
        ``(fig, ax)``. A cross at the top marks a rate at which the loss diverged.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    ax = style.axes_or_new(ax)
    colours = style.import_matplotlib("pyplot").pyplot.get_cmap(style.ERROR_COLOURMAP)
    known = [*ladder.losses[np.isfinite(ladder.losses)], *ladder.start[np.isfinite(ladder.start)]]
    low, high = (min(known), 1.1 * max(ladder.start[np.isfinite(ladder.start)])) if known else (0.0, 1.0)
    top = high + 0.05 * (high - low)
    for row, alpha in enumerate(ladder.alphas):
        colour = colours(0.85 * row / max(len(ladder.alphas) - 1, 1))  # its last yellow is hard to see on white
        tried = ~np.isnan(ladder.losses[row])
        losses = ladder.losses[row, tried]
        if not tried.any():
            continue
        label = style.LEARNING_RATE if math.isnan(alpha) else rf"$\alpha$ = {alpha:.2g}"
        betas, line = ladder.betas[tried], {"markersize": 4, "linewidth": 1, "label": label}
        ax.plot(betas, np.minimum(losses, top), "o-", color=colour, **line)
        left = losses > top
        ax.plot(betas[left], np.full(left.sum(), top), "x", color=colour, markersize=9)
    start = ladder.start[np.isfinite(ladder.start)]
    if len(start):
        ax.axhline(float(start.min()), color=style.MARKER_COLOUR, linestyle=":", label=style.BEFORE_TRAINING)
    if not math.isnan(suggested[1]):
        ax.axvline(suggested[1], color=style.LIMIT_COLOUR, linestyle="--", label=_words(suggested))
    ax.set(xscale="log", xlabel=style.OUTER_RATE_AXIS, ylabel=style.LOSS_AXIS, title=style.LADDER_TITLE)
    style.legend_under(ax, columns=2)
    return ax.figure, ax


def _words(pair: tuple[float, float]) -> str:
    beta = rf"suggested: $\beta$ = {pair[1]:.2g}"
    return beta if math.isnan(pair[0]) else rf"{beta} at $\alpha$ = {pair[0]:.2g}"
