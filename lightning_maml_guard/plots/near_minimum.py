"""Training from near a minimum beside the theory: the largest convergent outer rates over ``alpha / alpha_c``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_maml_guard.plots import style

if TYPE_CHECKING:
    from lightning_maml_guard.phase.result import PhaseDiagram

# Final errors below this share of the start's have the same colour.
_LEAST = 1e-8


def near_minimum(
    cases: Sequence[tuple[str, PhaseDiagram, float, np.ndarray]], *, title: str = style.NEAR_MINIMUM_TITLE
) -> tuple[Any, Any]:
    """Draw, for each minimum, the error after training over that before, and theory's largest outer rate.

    Rates are in units of the limits of plain gradient descent: ``alpha * lambda_max`` is 1 at ``alpha_c`` of the
    simplified criterion, and ``beta * lambda_max / 2`` is 1 at the limit without adaptation.

    Args:
        cases: For each axes its title; the diagram; ``lambda_max`` of the task loss's Hessian at the minimum; theory's
            inner rates and largest outer ones, shape ``(2, n)``, 0 where no outer rate is stable.
        title: Title of the figure.

    Returns:
        ``(fig, axes)``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    mpl = style.import_matplotlib("pyplot", "patches")
    rows = -(-len(cases) // 2)
    size = (9.6, 0.9 + 3.3 * rows)
    figure, axes = mpl.pyplot.subplots(
        rows, 2, figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    colours = mpl.colormaps[style.ERROR_COLOURMAP].with_extremes(bad=style.UNTRAINED_COLOUR)
    for ax, (name, diagram, sharpest, theory) in zip(axes.flat, cases, strict=True):
        shares, levels = diagram.alphas * sharpest, diagram.betas * sharpest / 2
        ratio = np.ma.masked_where(~diagram.trained, diagram.final / diagram.start)
        mesh = ax.pcolormesh(
            shares,
            levels,
            ratio.T,
            cmap=colours,
            norm=mpl.colors.LogNorm(_LEAST, 1),
            rasterized=True,
            shading="nearest",
        )
        stable = theory[1] > 0
        line = {"color": style.LIMIT_COLOUR, "linewidth": 2.2, "label": style.BETA_C_THEORY}
        ax.plot(theory[0, stable] * sharpest, theory[1, stable] * sharpest / 2, **line)
        found = diagram.contiguous_beta * sharpest / 2
        dot = {"color": style.FOUND_COLOUR, "markeredgecolor": style.MARKER_EDGE, "markersize": 4.5}
        ax.plot(shares, found, "o", label=style.CONTIGUOUS_BETA, **dot)
        ax.set(yscale="log", ylim=(levels[0], levels[-1]), title=name)
    for ax in axes[-1]:
        ax.set_xlabel(r"$\alpha\,/\,\alpha_c$ of the simplified criterion")
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$\beta\,\lambda_{\max}\,/\,2$")
    figure.suptitle(title)
    figure.colorbar(mesh, ax=axes, label="error after training / before", extend="min")
    grey = mpl.patches.Patch(
        facecolor=style.UNTRAINED_COLOUR, label=f"{style.UNTRAINED}: the error did not fall by 10 %"
    )
    style.legend_below(figure, [grey, *axes[0, 0].get_legend_handles_labels()[0]])
    return figure, axes
