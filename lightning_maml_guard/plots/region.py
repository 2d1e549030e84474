"""The safe region of the learning rates, with the path of a run in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_maml_guard.plots.style import matplotlib_parts, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_maml_guard.stability.report import StabilityReport


def safe_region(
    reports: Sequence[StabilityReport], ax: Axes | None = None, *, rates: Sequence[float] = ()
) -> tuple[Any, Any]:
    """Draw the safe region ``alpha <= alpha_c, beta < beta_c(alpha)`` with the path of the rates in it.

    The last measured region is filled; the borders of earlier checks show how it moved, coloured by step.
    The curve is the poster's ``beta_c(alpha)`` scaled to the optimizer at hand, so that it passes through
    the ``beta_c`` that was measured; checks that could not measure one are left out if others could. With
    ``criterion="exact"`` the curve holds at the measured ``alpha``: beyond it, where exact MAML's ``beta_c`` may fall
    instead, it is dashed and nothing is filled. Where no meta rate was measured (Adam before its first step), the curve
    is plain SGD's and says so. Rates that a guard capped are joined to what was applied.

    Args:
        reports: Reports of the checks, oldest first.
        ax: Axes to draw on (default: a new figure).
        rates: Meta rates that the axis reaches too.

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
    mpl = matplotlib_parts()
    if ax is not None and not isinstance(ax, mpl.axes.Axes):
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
        _, ax = pyplot().subplots(figsize=(6.4, 4.8), layout="constrained")
    figure = ax.figure
    shown = [measured[i] for i in sorted({round(k * (len(measured) - 1) / 7) for k in range(8)})]
    steps = [float(report.step if report.step is not None else i) for i, report in enumerate(measured)]
    # The last check is drawn over the others: keep it off the palest end of the map.
    colours = mpl.colors.ListedColormap(mpl.colormaps["viridis"](range(20, 216)))
    norm = mpl.colors.Normalize(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1)

    low = min(min(r.alpha, _applied(r, "alpha")) if _applied(r, "alpha") > 0 else r.alpha_c for r in measured)
    low = min([low, *(r.alpha_c for r in shown)]) / 30
    curves = {id(report): _border(report, low) for report in shown}
    betas = [beta for _, curve in curves.values() for beta in curve if math.isfinite(beta)]
    reached = [*rates, *betas, *(rate for r in measured for rate in (r.beta, _applied(r, "beta")))]
    reached = [rate for rate in reached if math.isfinite(rate) and rate > 0]
    floor, ceiling = min(reached) / 3, max(reached) * 3
    for report in shown:
        alphas, curve = curves[id(report)]
        last = report is shown[-1]
        colour = colours(norm(steps[measured.index(report)]))
        line: dict[str, Any] = {"color": colour, "linewidth": 2.2 if last else 1.0, "zorder": 3 if last else 2}
        held = sum(alpha <= report.safe_alpha for alpha in alphas) if report.criterion == "exact" else len(alphas)
        outline = [*alphas, alphas[-1]], [*curve, floor]
        if held < len(alphas):
            ax.plot(alphas[:held], curve[:held], **line)
            outline = outline[0][max(held - 1, 0) :], outline[1][max(held - 1, 0) :]
            line |= {"linestyle": (0, (2, 2)), "label": r"poster's curve beyond the measured $\alpha$"}
        if held == len(alphas) or last:
            ax.plot(*outline, **line)
        if last:
            name = "safe region" if math.isfinite(report.safe_beta_c) else "plain SGD's safe region"
            filled: dict[str, Any] = {"color": colour, "alpha": 0.18, "linewidth": 0, "label": f"{name}, last check"}
            ax.fill_between(alphas[:held], floor, curve[:held], **filled)
    drawn = [(r, step) for r, step in zip(measured, steps, strict=True) if math.isfinite(r.beta) and r.beta != 0]
    capped = [(r, step) for r, step in drawn if (_applied(r, "alpha"), _applied(r, "beta")) != (r.alpha, r.beta)]
    joined = [[(r.alpha, r.beta), (_applied(r, "alpha"), _applied(r, "beta"))] for r, _ in capped]
    inks = [colours(norm(step)) for _, step in capped]
    ax.add_collection(mpl.collections.LineCollection(joined, colors=inks, linewidths=0.8, zorder=4), autolim=False)
    dots: dict[str, Any] = {"cmap": colours, "norm": norm, "s": 36, "edgecolors": "black", "linewidths": 0.6}
    if capped:
        x, y = [_applied(r, "alpha") for r, _ in capped], [_applied(r, "beta") for r, _ in capped]
        ax.scatter(x, y, c=[step for _, step in capped], marker="v", zorder=6, **dots)
    if drawn:
        x, y = [r.alpha for r, _ in drawn], [r.beta for r, _ in drawn]
        ax.scatter(x, y, c=[step for _, step in drawn], zorder=5, **dots)
    ax.scatter([], [], color="0.6", edgecolors="black", s=36, label="configured rates")
    if any((_applied(r, "alpha"), _applied(r, "beta")) != (r.alpha, r.beta) for r in measured):
        ax.scatter([], [], color="0.6", edgecolors="black", marker="v", s=36, label="applied rates")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel=r"inner rate $\alpha$",
        ylabel=r"meta rate $\beta$",
        title="Safe region of the learning rates",
    )
    ax.set_ylim(floor, ceiling)
    ax.legend(loc="best", frameon=True, framealpha=0.9)
    if len(measured) > 1:
        figure.colorbar(mpl.cm.ScalarMappable(norm, colours), ax=ax, label="training step of the check")
    elif measured[0].step is not None:
        ax.set_title(f"Safe region of the learning rates, step {measured[0].step}")
    return figure, ax


def _border(report: StabilityReport, low: float, points: int = 160) -> tuple[list[float], list[float]]:
    """``alpha`` from ``low`` to ``alpha_c``, and ``beta_c`` there."""
    known = report.spectrum.rates(report.alpha, report.inner_steps)
    # Rates by parameter, momentum or a preconditioner change the limits: scale to those measured.
    stretch = report.alpha_c / known.alpha_c
    at_safe = report.spectrum.rates(min(report.safe_alpha / stretch, known.alpha_c), report.inner_steps).beta_c
    lift = report.safe_beta_c / at_safe if math.isfinite(report.safe_beta_c) else 1.0
    alphas = [low * (report.alpha_c / low) ** (i / (points - 1)) for i in range(points)]
    if report.criterion == "exact" and low < report.safe_alpha < report.alpha_c:
        alphas = sorted([*alphas, report.safe_alpha])  # the solid part ends there
    return alphas, [
        lift * report.spectrum.rates(min(a / stretch, known.alpha_c), report.inner_steps).beta_c for a in alphas
    ]


def _applied(report: StabilityReport, name: str) -> float:
    """The rate applied after a check; a measurement outside of a guard applies none but the configured one."""
    return float(getattr(report, f"{name}_applied", getattr(report, name)))
