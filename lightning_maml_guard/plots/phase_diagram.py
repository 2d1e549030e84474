"""A phase diagram: training error over a grid of inner and meta rates, beside the critical rates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_maml_guard.plots.style import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_maml_guard.phase.result import PhaseDiagram


def phase_diagram(
    diagram: PhaseDiagram,
    ax: Axes | None = None,
    *,
    found: Any = None,
    title: str = "Training error after meta-training",
) -> tuple[Any, Any]:
    """Draw the training error over the grid, with the critical rates that theory gives for its start.

    Dark cells trained furthest. Grey cells did not train (see :class:`PhaseDiagram`); crossed ones diverged. A
    cell's rates are those of its centre. The vertical line is
    the poster's ``alpha_c``, the curves are ``beta_c(alpha)`` by the poster and by the Jacobian of the update as
    configured, all before training.

    Args:
        diagram: The diagram.
        ax: Axes to draw on (default: a new figure).
        found: Largest convergent meta rates found by training, shape ``(n, 2)``: inner rate and meta rate a row.
        title: Title of the axes.

    Returns:
        ``(fig, ax)``.

    Raises:
        ValueError: If a rate is 0, for which log axes have no place, or if there is but one of either.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    plt = pyplot()
    for name, rates in (("alphas", diagram.alphas), ("betas", diagram.betas)):
        if len(rates) < 2 or min(rates) <= 0:
            raise ValueError(
                f"A phase diagram on log axes needs at least 2 `{name}` above 0 but got {rates.tolist()}: draw a part "
                "of the grid, or train another."
            )
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    figure = ax.figure
    shown = np.ma.masked_where(~diagram.trained, diagram.final)
    start = float(np.nanmax(diagram.unadapted))
    low = float(shown.min()) if shown.count() else start / 10
    norm = plt.matplotlib.colors.LogNorm(max(low, start * 1e-12), start) if low < start else None
    colours = plt.get_cmap("viridis").with_extremes(bad="0.82")
    mesh = ax.pcolormesh(
        _edges(diagram.alphas), _edges(diagram.betas), shown.T, cmap=colours, norm=norm, rasterized=True, zorder=0
    )
    lost = np.argwhere(diagram.diverged)
    if len(lost):
        x, y = diagram.alphas[lost[:, 0]], diagram.betas[lost[:, 1]]
        ax.scatter(x, y, marker="x", s=14, color="0.35", linewidths=0.8, label="diverged", zorder=1)
    top, bottom = _edges(diagram.betas)[-1], _edges(diagram.betas)[0]
    if len(diagram.alpha_c):
        alpha_c = np.nanmin(diagram.at_start("alpha_c")) if np.isfinite(diagram.at_start("alpha_c")).any() else math.inf
        if _edges(diagram.alphas)[0] < alpha_c < _edges(diagram.alphas)[-1]:
            _outlined(ax, [alpha_c] * 2, [bottom, top], "#D55E00", "-.", r"$\alpha_c$, poster")
        for name, colour, style, label in (
            ("beta_c", "#D55E00", "-", r"$\beta_c(\alpha)$, poster"),
            ("exact_beta_c", "black", "--", r"$\beta_c(\alpha)$, exact"),
        ):
            curve = diagram.at_start(name)
            known = np.isfinite(curve) & (curve > 0)
            if known.any():
                _outlined(ax, diagram.alphas[known], curve[known], colour, style, label)
    if found is not None:
        x, y = np.asarray(found, dtype=np.float64).T
        ax.scatter(x, y, s=26, color="white", edgecolors="black", label="found by training", zorder=5)
    ax.set(
        xscale="log",
        yscale="log",
        xlim=_edges(diagram.alphas)[[0, -1]],
        ylim=(bottom, top),
        xlabel=r"inner rate $\alpha$",
        ylabel=r"meta rate $\beta$",
        title=title,
    )
    handles, _ = ax.get_legend_handles_labels()
    if (~diagram.trained & ~diagram.diverged).any() or len(lost):
        handles.insert(0, plt.matplotlib.patches.Patch(facecolor="0.82", label="did not train"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    if shown.count():
        bar = figure.colorbar(mesh, ax=ax, label="training error")
        if norm is not None and start / low < 30:  # too few powers of ten to mark the scale by them alone
            for which in ("major", "minor"):
                getattr(bar.ax.yaxis, f"set_{which}_formatter")(plt.matplotlib.ticker.FormatStrFormatter("%.3g"))
    return figure, ax


def _edges(rates: np.ndarray) -> np.ndarray:
    logs = np.log(np.asarray(rates, dtype=np.float64))
    middles = (logs[1:] + logs[:-1]) / 2
    return np.exp(np.concatenate([[2 * logs[0] - middles[0]], middles, [2 * logs[-1] - middles[-1]]]))


def _outlined(ax: Axes, x: Any, y: Any, colour: str, style: str, label: str) -> None:
    """A line that is seen on every cell: white around it."""
    from matplotlib import patheffects

    around = [patheffects.Stroke(linewidth=4.2, foreground="white"), patheffects.Normal()]
    ax.plot(x, y, color=colour, linestyle=style, linewidth=2.2, zorder=4, label=label, path_effects=around)
