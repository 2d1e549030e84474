"""Pictures of what the guard found; each function returns ``(fig, ax)``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_maml_guard.guard.report import StabilityReport


def safe_region(reports: Sequence[StabilityReport], ax: Axes | None = None) -> tuple[Any, Any]:
    """Draw the safe region ``alpha <= alpha_c, beta < beta_c(alpha)`` with the path of the rates in it.

    The last measured region is filled; the borders of earlier checks show how it moved, coloured by step.
    The curve is the poster's ``beta_c(alpha)`` scaled to the optimizer at hand, so that it passes through
    the ``beta_c`` that was measured; checks that could not measure one are left out if others could. Rates
    that a guard capped are joined to what was applied.

    Args:
        reports: Reports of the checks, oldest first.
        ax: Axes to draw on (default: a new figure).

    Returns:
        ``(fig, ax)``.

    Raises:
        TypeError: If ``reports`` or ``ax`` is something else.
        ValueError: If no report holds a measured limit.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not isinstance(reports, Sequence) or not all(hasattr(report, "safe_beta_c") for report in reports):
        raise TypeError(
            f"Expected argument `reports` to be a list of StabilityReport but got {type(reports).__name__} "
            f"{str(reports)[:60]}. Pass guard.history, or [measure(...)]."
        )
    plt = _pyplot()
    if ax is not None and not isinstance(ax, plt.Axes):
        raise TypeError(
            f"Expected argument `ax` to be matplotlib's Axes or None but got {type(ax).__name__}. Pass the second of "
            "plt.subplots()."
        )
    measured = [report for report in reports if math.isfinite(report.alpha_c) and report.lambda_max > 0]
    measured = [report for report in measured if math.isfinite(report.safe_beta_c)] or measured
    if not measured:
        raise ValueError(
            "There is nothing to draw: no check has measured a finite limit yet. Train until "
            "one has, or draw other reports."
        )
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    figure = ax.figure
    shown = [measured[i] for i in sorted({round(k * (len(measured) - 1) / 7) for k in range(8)})]
    steps = [float(report.step if report.step is not None else i) for i, report in enumerate(measured)]
    # The last check is drawn over the others: keep it off the palest end of the map.
    colours = plt.matplotlib.colors.ListedColormap(plt.get_cmap("viridis")(range(20, 216)))
    norm = plt.Normalize(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1)

    low = min(min(r.alpha, r.alpha_applied) if r.alpha_applied > 0 else r.alpha_c for r in measured)
    low = min([low, *(r.alpha_c for r in shown)]) / 30
    curves = {id(report): _border(report, low) for report in shown}
    betas = [beta for _, curve in curves.values() for beta in curve if math.isfinite(beta)]
    rates = [rate for r in measured for rate in (r.beta, r.beta_applied) if math.isfinite(rate) and rate > 0]
    floor, ceiling = min(rates + betas) / 3, max(rates + betas) * 3
    for report in shown:
        alphas, curve = curves[id(report)]
        last = report is shown[-1]
        colour = colours(norm(steps[measured.index(report)]))
        ax.plot(
            [*alphas, alphas[-1]],
            [*curve, floor],
            color=colour,
            linewidth=2.2 if last else 1.0,
            zorder=3 if last else 2,
        )
        if last:
            ax.fill_between(
                alphas, floor, curve, color=colour, alpha=0.18, linewidth=0, label="safe region, last check"
            )
    for report, step in zip(measured, steps, strict=True):
        if not math.isfinite(report.beta) or report.beta == 0:
            continue
        colour = colours(norm(step))
        moved = (report.alpha_applied, report.beta_applied) != (report.alpha, report.beta)
        if moved:
            ax.plot(
                [report.alpha, report.alpha_applied],
                [report.beta, report.beta_applied],
                color=colour,
                linewidth=0.8,
                zorder=4,
            )
            ax.scatter(
                report.alpha_applied,
                report.beta_applied,
                color=[colour],
                marker="v",
                s=36,
                edgecolors="black",
                linewidths=0.6,
                zorder=6,
            )
        ax.scatter(report.alpha, report.beta, color=[colour], s=36, edgecolors="black", linewidths=0.6, zorder=5)
    ax.scatter([], [], color="0.6", edgecolors="black", s=36, label="configured rates")
    if any((r.alpha_applied, r.beta_applied) != (r.alpha, r.beta) for r in measured):
        ax.scatter([], [], color="0.6", edgecolors="black", marker="v", s=36, label="applied rates")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel=r"inner rate $\alpha$",
        ylabel=r"meta rate $\beta$",
        title="Safe region of the learning rates",
    )
    ax.set_ylim(floor, ceiling)
    ax.legend(loc="lower left", frameon=True, framealpha=0.9)
    figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=ax, label="training step of the check")
    return figure, ax


def _border(report: StabilityReport, low: float, points: int = 160) -> tuple[list[float], list[float]]:
    """``alpha`` from ``low`` to ``alpha_c``, and ``beta_c`` there."""
    known = report.spectrum.rates(report.alpha, report.inner_steps)
    # Rates by parameter, momentum or a preconditioner change the limits: scale to those measured.
    stretch = report.alpha_c / known.alpha_c
    at_safe = report.spectrum.rates(min(report.safe_alpha / stretch, known.alpha_c), report.inner_steps).beta_c
    lift = report.safe_beta_c / at_safe if math.isfinite(report.safe_beta_c) else 1.0
    alphas = [low * (report.alpha_c / low) ** (i / (points - 1)) for i in range(points)]
    return alphas, [
        lift * report.spectrum.rates(min(a / stretch, known.alpha_c), report.inner_steps).beta_c for a in alphas
    ]


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Drawing needs matplotlib: pip install 'lightning-maml-guard[plot]'.") from error
    return plt
