"""Spectra of Hessians: a density of eigenvalues, the Ritz values of a check, and their histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_maml_guard.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_maml_guard.linalg.density import SpectralDensity
    from lightning_maml_guard.stability.report import StabilityReport

_BINS = 64  # of a histogram


def spectrum(
    density: SpectralDensity, ax: Axes | None = None, *, alpha: float | None = None, title: str = style.SPECTRUM_TITLE
) -> tuple[Any, Any]:
    """Draw the density of a Hessian's eigenvalues: a smoothed curve over the Ritz values and their weights.

    Args:
        density: What :func:`linalg.density.spectral_density` returned.
        ax: Axes to draw on (default: a new figure).
        alpha: Inner learning rate; ``1/alpha`` is marked: under simplified MAML no eigenvalue may exceed it.
        title: Title of the axes.

    Returns:
        ``(fig, ax)``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    mpl = style.import_matplotlib("ticker")
    ax = style.axes_or_new(ax)
    low, high = float(density.nodes.min()), float(density.nodes.max())
    extent = high - low if high > low else max(abs(high), 1.0)
    at = np.linspace(low - 0.05 * extent, high + 0.05 * extent, 800)
    width = extent / 100
    # A single eigenvalue of the n stands this high: less is the quadrature's own noise.
    floor = 0.1 / (density.size * width)
    curve = np.maximum(density.smooth(at, width), floor)
    ax.fill_between(at, floor, curve, color=style.SPECTRUM_COLOUR, alpha=0.25, linewidth=0)
    ax.plot(at, curve, color=style.SPECTRUM_COLOUR, linewidth=1.5, label=style.SMOOTHED_DENSITY)
    nodes = np.full(len(density.nodes), floor)
    ax.plot(density.nodes, nodes, "|", color=style.EXACT_COLOUR, markersize=9, label=style.RITZ_VALUES)
    if alpha:
        inside = 1 / alpha <= high + extent
        label = rf"$1/\alpha$ = {1 / alpha:.3g}" + ("" if inside else ", to the right of this picture")
        x, y = ([1 / alpha] * 2, [floor, curve.max()]) if inside else ([], [])
        ax.plot(x, y, color=style.LIMIT_COLOUR, linestyle="--", linewidth=2, label=label)
    ax.set(
        yscale="log",
        ylim=(floor / 1.6, 2 * float(curve.max())),
        xlabel=style.EIGENVALUE_AXIS,
        ylabel=style.DENSITY_AXIS,
        title=title,
    )
    ax.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    style.legend_below(ax.figure)
    return ax.figure, ax


def ritz_values(report: StabilityReport, ax: Axes | None = None, *, title: str | None = None) -> tuple[Any, Any]:
    """Draw what a check saw of the Hessian's spectrum: its Ritz values, as high as their weights.

    A weight estimates the share of eigenvalues that a Ritz value stands for, from one random vector: rough, but it
    tells a lone sharp direction from the bulk. The inner learning rate's limits ``1/alpha`` and ``2/alpha`` are marked.

    Args:
        report: The check.
        ax: Axes to draw on (default: a new figure, without pyplot).
        title: Title of the axes (default: the step).

    Returns:
        ``(fig, ax)``.

    Raises:
        ValueError: If the check saw no eigenvalue.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    values, weights = report.ritz()
    if not values:
        raise ValueError("There is nothing to draw: this check saw no eigenvalue. Draw another report.")
    if ax is None:
        ax = style.new_figure(5.4, 3.4).subplots()
    low, high = min(*values, 0.0), max(*values, 0.0)
    extent = high - low or 1.0
    smallest = min((weight for weight in weights if weight > 0), default=1.0)
    floor = max(smallest / 4, 1e-12)
    tops = [max(weight, floor) for weight in weights]
    ax.vlines(values, floor, tops, color=style.SPECTRUM_COLOUR, linewidth=2)
    ax.plot(values, tops, "o", color=style.SPECTRUM_COLOUR, markersize=5, label=style.RITZ_VALUES)
    for factor, dashes in ((1, "--"), (2, ":")):
        limit = factor / report.alpha if report.alpha > 0 else math.inf
        if limit <= high + extent:
            label = rf"${factor}/\alpha$ = {limit:.3g}"
            ax.axvline(limit, color=style.LIMIT_COLOUR, linestyle=dashes, linewidth=1.6, label=label)
    step = "" if report.step is None else f", step {report.step}"
    ax.set(
        yscale="log",
        ylim=(floor, 2 * max(tops)),
        xlabel=style.EIGENVALUE_AXIS,
        ylabel=style.WEIGHT_AXIS,
        title=f"Spectrum{step}" if title is None else title,
    )
    style.legend_under(ax)
    return ax.figure, ax


def histogram(values: Sequence[float], weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Sum weighted values in 64 equal bins, for loggers that have histograms.

    Args:
        values: The values, ascending.
        weights: Their weights.

    Returns:
        The weight in each bin and the 65 edges.
    """
    low, high = values[0], values[-1]
    if high <= low:
        low, high = low - 0.5 * max(abs(low), 1.0), high + 0.5 * max(abs(high), 1.0)
    counts = [0.0] * _BINS
    for value, weight in zip(values, weights, strict=True):
        counts[min(int((value - low) / (high - low) * _BINS), _BINS - 1)] += weight
    return counts, [low + (high - low) * i / _BINS for i in range(_BINS + 1)]
