"""What training does to the curvature: ``alpha * lambda_max`` and the limit of the outer rate, at start and end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_maml_guard.plots import style

if TYPE_CHECKING:
    from lightning_maml_guard.phase.result import PhaseDiagram

# Beyond it an inner step of exact MAML overshoots along the sharpest direction.
INNER_LIMIT = 2.0


def start_and_end(
    diagram: PhaseDiagram, axes: Any = None, *, title: str = style.START_AND_END_TITLE
) -> tuple[Any, Any]:
    """Draw the curvature before training and after the best run of each inner rate.

    Above, ``alpha * lambda_max`` of the Hessian of the mean support loss; the line is exact MAML's own limit of the
    inner rate, 2. Below, ``beta_c(alpha)`` of the Jacobian of the update as configured, and the ``beta`` of the best
    run: that with the smallest final error among those that trained.

    Args:
        diagram: The diagram, with critical rates measured before and after training.
        axes: Two axes to draw on (default: a new figure).
        title: Title of the upper axes.

    Returns:
        ``(fig, axes)``.

    Raises:
        ValueError: If the critical rates were not measured before and after training.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if len(diagram.measured_steps) < 2:
        raise ValueError(
            "Expected argument `diagram` to hold critical rates before and after training but it was measured at "
            f"steps {diagram.measured_steps.tolist()}. Leave phase_diagram's `measure_every` at None."
        )
    if axes is None:
        pyplot = style.import_matplotlib("pyplot").pyplot
        _, axes = pyplot.subplots(2, figsize=(6.4, 5.6), sharex=True, layout="constrained")
    upper, lower = axes
    alphas = diagram.alphas
    for when, look, mark in (
        (style.START, diagram.at_start, {"color": style.START_COLOUR, "marker": "o", "markerfacecolor": "white"}),
        (style.END, diagram.at_end_of_best, {"color": style.END_COLOUR, "marker": "o"}),
    ):
        with np.errstate(divide="ignore"):
            sharpness = alphas / (diagram.inner_steps * look("alpha_c"))
        for ax, values in ((upper, sharpness), (lower, look("exact_beta_c"))):
            known = np.isfinite(values) & (values > 0) & (alphas > 0)
            ax.plot(alphas[known], values[known], label=when if ax is upper else None, markersize=4, **mark)
    limit = r"exact MAML's inner limit, 2"
    upper.axhline(INNER_LIMIT, color=style.LIMIT_COLOUR, linestyle="-.", linewidth=1.2, label=limit)
    known = np.isfinite(diagram.best_beta) & (alphas > 0)
    lower.plot(alphas[known], diagram.best_beta[known], "D", color=style.CURVE_COLOUR, label=style.BEST_BETA)
    for ax in (upper, lower):
        ax.set(xscale="log", yscale="log")
    upper.set(ylabel=style.SHARPNESS_AXIS, title=title)
    lower.set(xlabel=style.INNER_RATE_AXIS, ylabel=style.BETA_C_EXACT)
    style.legend_below(upper.figure, columns=2)
    return upper.figure, axes
