"""A phase diagram: training error over a grid of inner and outer learning rates, beside the critical rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_maml_guard.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_maml_guard.phase.result import PhaseDiagram


def phase_diagram(
    diagram: PhaseDiagram,
    ax: Axes | None = None,
    *,
    found: Any = None,
    others: Sequence[PhaseDiagram] = (),
    critical_rates: bool = True,
    title: str = style.ERROR_TITLE,
) -> tuple[Any, Any]:
    """Draw the training error over the grid, the largest outer rate that trained, and the critical rates.

    The darker a cell, the smaller its error. Grey cells did not train (see :class:`PhaseDiagram`); crossed ones
    diverged. A cell's rates are those of its centre. Found by training are the curve of the largest ``beta`` that
    trained, the largest ``alpha`` at which any did (dotted), and, if the diagram has ``alpha = 0``, the largest
    ``beta`` before training diverges there (dashed). Measured before training are ``alpha_c`` of the simplified
    criterion (Takagi et al.), and ``beta_c(alpha)`` of the simplified criterion and of the Jacobian of the update as
    configured.

    Args:
        diagram: The diagram.
        ax: Axes to draw on (default: a new figure).
        found: Largest convergent outer rates found by training, shape ``(n, 2)``: an inner and an outer rate per row.
        others: Diagrams of other seeds, of which the curve is drawn.
        critical_rates: Whether to draw the critical rates before training.
        title: Title of the axes.

    Returns:
        ``(fig, ax)``.

    Raises:
        ValueError: If an outer rate is 0, which has no place on log axes, or if there are fewer than two of either
            besides 0.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    mpl = style.import_matplotlib("ticker")
    shown = diagram.alphas > 0
    for name, rates in (("alphas", diagram.alphas[shown]), ("betas", diagram.betas)):
        if len(rates) < 2 or min(rates) <= 0:
            raise ValueError(
                f"A phase diagram on log axes needs at least 2 `{name}` above 0 but got {rates.tolist()}: draw a part "
                "of the grid, or train another."
            )
    ax = style.axes_or_new(ax)
    figure: Any = ax.figure
    columns, rows = _edges(diagram.alphas[shown]), _edges(diagram.betas)
    handles = _draw_cells(ax, diagram, shown, columns, rows)
    if critical_rates and len(diagram.alpha_c):
        _draw_critical_rates(ax, diagram, columns, rows)
    _draw_trained(ax, diagram, others, rows)
    if found is not None:
        x, y = np.asarray(found, dtype=np.float64).T
        dot: dict[str, Any] = {"color": style.FOUND_COLOUR, "edgecolors": style.MARKER_EDGE, "s": 26, "zorder": 5}
        ax.scatter(x, y, label=style.FOUND, **dot)
    ax.set(
        xscale="log",
        yscale="log",
        xlim=columns[[0, -1]],
        ylim=rows[[0, -1]],
        xlabel=style.INNER_RATE_AXIS,
        ylabel=style.OUTER_RATE_AXIS,
        title=title,
    )
    for axis in (ax.xaxis, ax.yaxis):  # as in the figures of Takagi et al.
        axis.set_minor_locator(mpl.ticker.LogLocator(subs=(3, 5, 7, 9), numticks=99))
    handles += ax.get_legend_handles_labels()[0]
    if handles:
        style.legend_below(figure, handles, columns=2)
    return figure, ax


def _draw_cells(ax: Axes, diagram: PhaseDiagram, shown: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> list[Any]:
    """Draw a cell per run with its error, and what it became if it did not train; return what the legend says of it."""
    mpl = style.import_matplotlib("patches", "ticker")
    trained, diverged = diagram.trained[shown], diagram.diverged[shown]
    errors = np.ma.masked_where(~trained, diagram.final[shown])
    start = float(np.nanmax(diagram.unadapted))
    low = float(errors.min()) if errors.count() else start / 10
    norm = mpl.colors.LogNorm(max(low, start * 1e-12), start) if low < start else None
    colours = mpl.colormaps[style.ERROR_COLOURMAP].with_extremes(bad=style.UNTRAINED_COLOUR)
    mesh = ax.pcolormesh(columns, rows, errors.T, cmap=colours, norm=norm, rasterized=True, zorder=0)
    if errors.count():
        figure: Any = ax.figure
        bar = figure.colorbar(mesh, ax=ax, label=style.ERROR_AXIS)
        if norm is not None and start / low < 30:  # the scale spans too few powers of ten to mark only those
            for which in ("major", "minor"):
                getattr(bar.ax.yaxis, f"set_{which}_formatter")(mpl.ticker.FormatStrFormatter("%.3g"))
    crossed = np.argwhere(diverged)
    handles: list[Any] = []
    if not trained.all():
        limit = "" if math.isinf(diagram.chance) else " or of chance"
        label = f"{style.UNTRAINED}: error above {diagram.trained_share:g} of the start's{limit}"
        handles.append(mpl.patches.Patch(facecolor=style.UNTRAINED_COLOUR, label=label))
    if len(crossed):
        x, y = diagram.alphas[shown][crossed[:, 0]], diagram.betas[crossed[:, 1]]
        cross: dict[str, Any] = {"marker": "x", "s": 14, "linewidths": 0.8, "zorder": 1}
        label = f"{style.DIVERGED}: loss over {diagram.divergence:g} times the start's, or not finite"
        ax.scatter(x, y, color=style.DIVERGED_COLOUR, label=label, **cross)
    return handles


def _draw_trained(ax: Axes, diagram: PhaseDiagram, others: Sequence[PhaseDiagram], rows: np.ndarray) -> None:
    """Draw what was found by training: the largest outer rates, the largest inner rate, the rate at ``alpha = 0``."""
    for each in reversed((diagram, *others)):
        usable = (each.alphas > 0) & np.isfinite(each.largest_beta)
        if not usable.any():
            continue
        x, y = each.alphas[usable], each.largest_beta[usable]
        if each is not diagram:
            label = style.LARGEST_BETA_OF_OTHERS if each is others[-1] else None
            ax.plot(x, y, color=style.CURVE_COLOUR, linewidth=1.0, marker=".", zorder=3, label=label)
            continue
        _draw_outlined(ax, x, y, style.CURVE_COLOUR, "-", style.LARGEST_BETA, marker="o", markersize=4)
        if x[-1] < diagram.alphas[-1]:
            _draw_outlined(ax, [x[-1]] * 2, rows[[0, -1]], style.CURVE_COLOUR, ":", style.LARGEST_ALPHA)
    if not math.isnan(diagram.beta_without_adaptation):
        ends, level = diagram.alphas[[int(diagram.alphas[0] == 0), -1]], [diagram.beta_without_adaptation] * 2
        _draw_outlined(ax, ends, level, style.CURVE_COLOUR, "--", style.BETA_WITHOUT_ADAPTATION)


def _draw_critical_rates(ax: Axes, diagram: PhaseDiagram, columns: np.ndarray, rows: np.ndarray) -> None:
    at_start = diagram.at_start("alpha_c")
    alpha_c = np.nanmin(at_start) if np.isfinite(at_start).any() else math.inf
    if columns[0] < alpha_c < columns[-1]:
        _draw_outlined(ax, [alpha_c] * 2, rows[[0, -1]], style.LIMIT_COLOUR, "-.", style.ALPHA_C_SIMPLIFIED)
    for name, colour, dashes, label in (
        ("beta_c", style.LIMIT_COLOUR, "-", style.BETA_C_SIMPLIFIED),
        ("exact_beta_c", style.EXACT_COLOUR, "--", style.BETA_C_EXACT),
    ):
        curve = diagram.at_start(name)
        known = np.isfinite(curve) & (curve > 0) & (diagram.alphas > 0)
        if known.any():
            _draw_outlined(ax, diagram.alphas[known], curve[known], colour, dashes, label)


def _draw_outlined(ax: Axes, x: Any, y: Any, colour: str, dashes: str, label: str, **marks: Any) -> None:
    """Draw a line with white around it, so that it is seen on every cell."""
    effects = style.import_matplotlib("patheffects").patheffects
    around = [effects.Stroke(linewidth=4.2, foreground=style.OUTLINE_COLOUR), effects.Normal()]
    ax.plot(x, y, color=colour, linestyle=dashes, linewidth=2.2, zorder=4, label=label, path_effects=around, **marks)


def _edges(rates: np.ndarray) -> np.ndarray:
    """Edges of the cells whose centres on a log axis are the rates."""
    logs = np.log(np.asarray(rates, dtype=np.float64))
    middles = (logs[1:] + logs[:-1]) / 2
    return np.exp(np.concatenate([[2 * logs[0] - middles[0]], middles, [2 * logs[-1] - middles[-1]]]))
