"""Spectra of Hessians: a density of eigenvalues, the Ritz values of a check, and their histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_maml_guard.plots.style import ALPHA_COLOUR, STATE_COLOURS, new_figure, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_maml_guard.linalg.density import SpectralDensity
    from lightning_maml_guard.stability.report import StabilityReport


def spectrum(
    density: SpectralDensity, ax: Axes | None = None, *, alpha: float | None = None, title: str = "Eigenvalue spectrum"
) -> tuple[Any, Any]:
    """Draw the density of a Hessian's eigenvalues: a smoothed curve over the Ritz values and their weights.

    Args:
        density: What :func:`curvature.density.spectral_density` found.
        ax: Axes to draw on (default: a new figure).
        alpha: Inner rate; ``1/alpha`` is marked, up to which simplified MAML's ``alpha <= alpha_c`` holds.
        title: Title of the axes.

    Returns:
        ``(fig, ax)``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    plt = pyplot()
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    low, high = float(density.nodes.min()), float(density.nodes.max())
    extent = high - low if high > low else max(abs(high), 1.0)
    at = np.linspace(low - 0.05 * extent, high + 0.05 * extent, 800)
    width = extent / 100
    # A single eigenvalue of the n stands this high: less is the quadrature's own noise.
    floor = 0.1 / (density.size * width)
    curve = np.maximum(density.smooth(at, width), floor)
    ax.fill_between(at, floor, curve, color="#0072B2", alpha=0.25, linewidth=0)
    ax.plot(at, curve, color="#0072B2", linewidth=1.5, label="density, smoothed")
    ax.plot(density.nodes, np.full(len(density.nodes), floor), "|", color="black", markersize=9, label="Ritz values")
    if alpha:
        within = 1 / alpha <= high + extent
        label = rf"$1/\alpha$ = {1 / alpha:.3g}" + ("" if within else ", to the right of this picture")
        at_limit = [1 / alpha] * 2 if within else []
        ax.plot(
            at_limit, [floor, curve.max()][: len(at_limit)], color="#D55E00", linestyle="--", linewidth=2, label=label
        )
    ax.set(
        yscale="log",
        ylim=(floor / 1.6, 2 * float(curve.max())),
        xlabel=r"eigenvalue $\lambda$ of the task loss's Hessian",
        ylabel="density of eigenvalues",
        title=title,
    )
    ax.yaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
    ax.figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return ax.figure, ax


def ritz(report: StabilityReport, ax: Axes | None = None, *, title: str | None = None) -> tuple[Any, Any]:
    """Draw what a check saw of the Hessian's spectrum: its Ritz values, as high as their weights.

    A weight estimates the share of eigenvalues that a Ritz value stands for, from one random vector: rough, but it
    tells a lone sharp direction from the bulk. Where the inner rate has its limits, ``1/alpha`` and ``2/alpha`` are
    marked.

    Args:
        report: The check.
        ax: Axes to draw on (default: a new figure).
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
        ax = new_figure(5.4, 3.4).subplots()
    low, high = min(*values, 0.0), max(*values, 0.0)
    extent = high - low or 1.0
    smallest = min((weight for weight in weights if weight > 0), default=1.0)
    floor = max(smallest / 4, 1e-12)
    tops = [max(weight, floor) for weight in weights]
    ax.vlines(values, floor, tops, color=ALPHA_COLOUR, linewidth=2)
    ax.plot(values, tops, "o", color=ALPHA_COLOUR, markersize=5, label="Ritz values")
    for factor, style in ((1, "--"), (2, ":")):
        limit = factor / report.alpha if report.alpha > 0 else math.inf
        if limit <= high + extent:
            label = rf"${factor}/\alpha$ = {limit:.3g}"
            ax.axvline(limit, color=STATE_COLOURS["unsafe"], linestyle=style, linewidth=1.6, label=label)
    step = "" if report.step is None else f", step {report.step}"
    ax.set(
        yscale="log",
        ylim=(floor, 2 * max(tops)),
        xlabel=r"eigenvalue $\lambda$ of the task loss's Hessian",
        ylabel="weight (share of a random vector)",
        title=f"Spectrum{step}" if title is None else title,
    )
    ax.legend(loc="best", fontsize="small", framealpha=0.9)
    return ax.figure, ax


def histogram(values: Sequence[float], weights: Sequence[float], bins: int = 64) -> tuple[list[float], list[float]]:
    """Put weighted values into equal bins, for loggers with histograms of their own.

    Args:
        values: Where, ascending.
        weights: How much.
        bins: Number of bins.

    Returns:
        The weight in each bin and the ``bins + 1`` edges.
    """
    low, high = values[0], values[-1]
    if high <= low:
        low, high = low - 0.5 * max(abs(low), 1.0), high + 0.5 * max(abs(high), 1.0)
    counts = [0.0] * bins
    for value, weight in zip(values, weights, strict=True):
        counts[min(int((value - low) / (high - low) * bins), bins - 1)] += weight
    return counts, [low + (high - low) * i / bins for i in range(bins + 1)]
