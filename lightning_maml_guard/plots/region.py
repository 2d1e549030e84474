"""The safe region of the learning rates, with the path of a run in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_maml_guard.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_maml_guard.stability.report import StabilityReport

_BORDERS = 8  # at most so many checks have their border drawn
_POINTS = 160


def safe_region(
    reports: Sequence[StabilityReport],
    ax: Axes | None = None,
    *,
    rates: Sequence[float] = (),
    which: str = "last check",
    others: str = "earlier checks",
    border: Sequence[StabilityReport] = (),
) -> tuple[Any, Any]:
    """Draw the safe region ``alpha <= alpha_c, beta < beta_c(alpha)`` with the path of the rates in it.

    The last measured region is filled; the borders of earlier checks show how it moved, coloured by step. The curve is
    ``beta_c(alpha)`` of the simplified criterion (Takagi et al.), scaled to pass through the ``beta_c`` that was
    measured for the optimizer; checks that could not measure one are left out if others could. With
    ``criterion="exact"`` the curve holds at the measured ``alpha``: beyond it, where exact MAML's ``beta_c`` may fall
    instead, it is dashed and nothing is filled, unless ``border`` holds measurements there. Where no ``beta_c`` was
    measured (Adam before its first step), the inner rates below ``alpha_c`` are filled alone. Rates that a guard capped
    are joined to those applied.

    Args:
        reports: Reports of the checks, oldest first.
        ax: Axes to draw on (default: a new figure).
        rates: Outer learning rates that the axis must reach as well.
        which: How the legend calls the report whose region is filled, the last one.
        others: How it calls those of which only the border is drawn.
        border: Reports of the last report's parameters and batch at larger inner rates, ascending; see
            :func:`~lightning_maml_guard.stability.measure.measure_border`.

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
    mpl = style.import_matplotlib("axes", "cm", "collections", "colors")
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
    axes: Any = style.axes_or_new(ax)
    count = len(measured)
    shown = sorted({round(k * (count - 1) / (_BORDERS - 1)) for k in range(_BORDERS)})
    steps = [float(report.step if report.step is not None else i) for i, report in enumerate(measured)]
    # The last check is drawn over the others: keep it off the palest end of the map.
    colours = mpl.colors.ListedColormap(mpl.colormaps[style.STEP_COLOURMAP](range(20, 216)))
    norm = mpl.colors.Normalize(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1)

    with_applied = [(r, *_applied_rates(r)) for r in measured]
    low = min(min(r.alpha, alpha) if alpha > 0 else r.alpha_c for r, alpha, _ in with_applied)
    low = min([low, *(measured[i].alpha_c for i in shown)]) / 30
    borders = {i: _border(measured[i], low) for i in shown}
    curves = [curve for i, curve in borders.items() if math.isfinite(measured[i].safe_beta_c)]
    reached = [*rates, *(beta for _, curve in curves for beta in curve), *(each.beta_c for each in border)]
    reached += [rate for r, _, beta in with_applied for rate in (r.beta, beta)]
    reached = [rate for rate in reached if math.isfinite(rate) and rate > 0]
    floor, ceiling = (min(reached) / 3, max(reached) * 3) if reached else (0.1, 10.0)
    for i, curve in borders.items():
        last = i == shown[-1]
        if not math.isfinite(measured[i].safe_beta_c):
            _draw_inner_limit(axes, measured[i], colours(norm(steps[i])), low if last else None)
            continue
        name = which if last else None
        _draw_border(axes, measured[i], curve, floor, colours(norm(steps[i])), name, border if last else ())
    if len(shown) > 1:
        border_name = style.BORDER if curves else style.INNER_LIMIT
        axes.plot([], [], color=colours(norm(steps[shown[0]])), linewidth=1.0, label=f"{border_name}, {others}")
    _draw_rates(axes, measured, steps, colours, norm)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=style.INNER_RATE_AXIS,
        ylabel=style.OUTER_RATE_AXIS,
    )
    axes.set_ylim(floor, ceiling)
    narrow = style.is_narrow(axes)
    if not narrow:  # there the colour bar is above
        axes.set_title(style.REGION_TITLE)
    if narrow:
        style.legend_below(axes.figure, columns=1)
    elif style.root_figure(axes).get_layout_engine() is not None:
        style.legend_under(axes, columns=2)
    else:  # where nothing makes room below, it would be cut off
        axes.legend(loc="best", frameon=True, framealpha=0.9)
    if count > 1:
        place: dict[str, Any] = {"location": "top", "aspect": 40} if narrow else {}
        axes.figure.colorbar(mpl.cm.ScalarMappable(norm, colours), ax=axes, label=style.CHECK_STEP_AXIS, **place)
    elif measured[0].step is not None:
        axes.set_title((",\n" if narrow else ", ").join([style.REGION_TITLE, f"step {measured[0].step}"]))
    return axes.figure, axes


def _draw_border(
    ax: Any,
    report: StabilityReport,
    border: tuple[list[float], list[float]],
    floor: float,
    colour: Any,
    which: str | None,
    measured: Sequence[StabilityReport],
) -> None:
    """Draw the border of one check's region; with ``which``, that of the last check, fill the region as well.

    ``measured`` are reports at larger inner rates.
    """
    alphas, curve = border
    line: dict[str, Any] = {"color": colour, "linewidth": 1.0 if which is None else 2.2}
    line["zorder"] = 2 if which is None else 3
    valid = sum(alpha <= report.safe_alpha for alpha in alphas) if report.criterion == "exact" else len(alphas)
    if measured:
        known = [(each.alpha, each.beta_c if each.beta_c > 0 else floor) for each in measured]
        alphas, curve = [*alphas[:valid], *(a for a, _ in known)], [*curve[:valid], *(b for _, b in known)]
        valid = len(alphas)
        dots: dict[str, Any] = {"color": colour, "linestyle": "none", "marker": ".", "markersize": 9, "zorder": 4}
        ax.plot(*zip(*known, strict=True), label=style.BORDER_MEASURED, **dots)
    outline = [*alphas, alphas[-1]], [*curve, floor]
    if which is not None:
        line["label"] = f"{style.BORDER}, {which}"
    if valid < len(alphas):
        ax.plot(alphas[:valid], curve[:valid], **line)
        outline = outline[0][max(valid - 1, 0) :], outline[1][max(valid - 1, 0) :]
        line |= {"linestyle": (0, (2, 2)), "label": style.BEYOND_MEASURED}
    if valid == len(alphas) or which is not None:
        ax.plot(*outline, **line)
    if which is not None:
        filled: dict[str, Any] = {"color": colour, "alpha": 0.18, "linewidth": 0}
        ax.fill_between(alphas[:valid], floor, curve[:valid], label=f"{style.SAFE_REGION}, {which}", **filled)


def _draw_inner_limit(ax: Any, report: StabilityReport, colour: Any, low: float | None) -> None:
    """Draw ``alpha_c`` alone, where no outer rate could be judged; from ``low`` on it is filled."""
    ax.axvline(report.alpha_c, color=colour, linewidth=1.0 if low is None else 2.2, zorder=2)
    if low is not None:
        ax.axvspan(low, report.alpha_c, color=colour, alpha=0.18, linewidth=0, label=style.INNER_REGION)
        ax.set_xlim(low, 3 * report.alpha_c)


def _draw_rates(ax: Any, measured: Sequence[StabilityReport], steps: Sequence[float], colours: Any, norm: Any) -> None:
    """Draw the configured rates of each check, joined to the applied ones where the two differ."""
    mpl = style.import_matplotlib("collections")
    drawn = [(r, step) for r, step in zip(measured, steps, strict=True) if math.isfinite(r.beta) and r.beta != 0]
    capped = [(r, step) for r, step in drawn if _is_capped(r)]
    applied = [_applied_rates(r) for r, _ in capped]
    joined = [[(r.alpha, r.beta), rates] for (r, _), rates in zip(capped, applied, strict=True)]
    inks = [colours(norm(step)) for _, step in capped]
    ax.add_collection(mpl.collections.LineCollection(joined, colors=inks, linewidths=0.8, zorder=4), autolim=False)
    marker: dict[str, Any] = {"s": 36, "edgecolors": style.MARKER_EDGE}
    dots: dict[str, Any] = {**marker, "cmap": colours, "norm": norm, "linewidths": 0.6}
    if capped:
        ax.scatter(*zip(*applied, strict=True), c=[step for _, step in capped], marker="v", zorder=6, **dots)
    if drawn:
        x, y = [r.alpha for r, _ in drawn], [r.beta for r, _ in drawn]
        ax.scatter(x, y, c=[step for _, step in drawn], zorder=5, **dots)
    ax.scatter([], [], color=style.MARKER_COLOUR, label=style.CONFIGURED_RATES, **marker)
    if any(_is_capped(r) for r in measured):
        ax.scatter([], [], color=style.MARKER_COLOUR, marker="v", label=style.APPLIED_RATES, **marker)


def _is_capped(report: StabilityReport) -> bool:
    return _applied_rates(report) != (report.alpha, report.beta)


def _applied_rates(report: StabilityReport) -> tuple[float, float]:
    """``alpha`` and ``beta`` as applied after a check; a measurement alone applies the configured ones."""
    alpha, beta = (getattr(report, f"{name}_applied", getattr(report, name)) for name in ("alpha", "beta"))
    return alpha, beta


def _border(report: StabilityReport, low: float) -> tuple[list[float], list[float]]:
    """``alpha`` from ``low`` to ``alpha_c``, and ``beta_c`` there."""
    known = report.spectrum.rates(report.alpha, report.inner_steps)
    # One inner rate per parameter, momentum or a preconditioner change the limits: scale to those measured.
    stretch = report.alpha_c / known.alpha_c
    at_safe = report.spectrum.rates(min(report.safe_alpha / stretch, known.alpha_c), report.inner_steps).beta_c
    lift = report.safe_beta_c / at_safe if math.isfinite(report.safe_beta_c) else 1.0
    alphas = [low * (report.alpha_c / low) ** (i / (_POINTS - 1)) for i in range(_POINTS)]
    if report.criterion == "exact" and low < report.safe_alpha < report.alpha_c:
        alphas = sorted([*alphas, report.safe_alpha])  # the solid part ends there
    return alphas, [
        lift * report.spectrum.rates(min(a / stretch, known.alpha_c), report.inner_steps).beta_c for a in alphas
    ]
