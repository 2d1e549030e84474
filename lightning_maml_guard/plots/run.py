"""A run over its checks: states, ratios and lookaheads.

Drawn without pyplot, so that a picture made in the middle of a training leaves the user's backend, settings and open
figures alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_maml_guard.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_maml_guard.stability.report import StabilityReport


def run_history(
    reports: Sequence[StabilityReport],
    *,
    severities: Sequence[tuple[int, float]] = (),
    divergence_ratio: float = 3.0,
    margin: float = 1.0,
) -> tuple[Any, list[Axes]]:
    """Draw a run over its checks: its state, its rates in units of their critical values, and its lookaheads.

    Args:
        reports: Reports of the checks, oldest first.
        severities: Steps and severities of the lookaheads, those between checks included.
        divergence_ratio: The lookahead's ``divergence_ratio``; its logarithm and half of that are marked.
        margin: The guard's ``margin``, marked beside 1.

    Returns:
        ``(fig, axes)``: the states, the ratios and, if there are any, the lookaheads.

    Raises:
        ValueError: If there is no report.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not reports:
        raise ValueError("There is nothing to draw: no check was made. Train first, or draw other reports.")
    lookaheads = [(step, value) for step, value in severities if not math.isnan(value)]
    heights = [0.8, 2.0, 1.4][: 3 if lookaheads else 2]
    figure = style.new_figure(8.4, 0.7 + 1.25 * sum(heights))
    axes = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    steps = [float(report.step if report.step is not None else i) for i, report in enumerate(reports)]
    _draw_states(axes[0], reports, steps)
    _draw_ratios(axes[1], reports, steps, margin)
    if lookaheads:
        _draw_lookaheads(axes[2], lookaheads, divergence_ratio)
    axes[-1].set_xlabel(style.STEP_AXIS)
    return figure, axes


def _draw_states(ax: Axes, reports: Sequence[StabilityReport], steps: Sequence[float]) -> None:
    rows = [name for name in style.STATE_COLOURS if name != "unresolved" or any(r.status == name for r in reports)]
    gap = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) or 1.0
    # Equal neighbours are one bar: between two the page would shine through.
    begins = [i for i, report in enumerate(reports) if i == 0 or report.status != reports[i - 1].status]
    ends = [*(steps[i] for i in begins[1:]), steps[-1] + gap]
    for row, name in enumerate(rows):
        spans = [
            (steps[i], max(end - steps[i], 0.0))
            for i, end in zip(begins, ends, strict=True)
            if reports[i].status == name
        ]
        ax.broken_barh(spans, (row - 0.38, 0.76), facecolors=style.STATE_COLOURS[name], linewidth=0)
    ax.set_yticks(range(len(rows)), rows)
    ax.set(ylim=(len(rows) - 0.5, -0.5), title=style.STATES_TITLE)


def _draw_ratios(ax: Axes, reports: Sequence[StabilityReport], steps: Sequence[float], margin: float) -> None:
    drawn = []
    for name, colour, mark in (("alpha", style.ALPHA_COLOUR, "o"), ("beta", style.BETA_COLOUR, "s")):
        ratios = [getattr(report, f"{name}_ratio") for report in reports]
        limits = [getattr(report, f"{name}_c") for report in reports]
        applied = [getattr(report, f"{name}_applied") for report in reports]
        capped = [a / c if c > 0 and a > 0 else math.nan for a, c in zip(applied, limits, strict=True)]
        configured = [ratio if math.isfinite(ratio) and ratio > 0 else math.nan for ratio in ratios]
        marker = mark if len(reports) <= style.MOST_MARKERS else ""
        symbol = rf"$\{name}/\{name}_c$"
        if any(math.isfinite(ratio) for ratio in configured):
            ax.plot(steps, configured, color=colour, marker=marker, markersize=4, linewidth=1.6, label=symbol)
            drawn += configured
        differing = [
            c if math.isfinite(c) and (math.isnan(s) or abs(c - s) > 1e-9 * s) else math.nan
            for c, s in zip(capped, configured, strict=True)
        ]
        if any(math.isfinite(ratio) for ratio in differing):
            options: dict[str, Any] = {"linestyle": "--", "marker": marker and "v", "markersize": 5, "linewidth": 1.2}
            ax.plot(steps, differing, color=colour, label=f"{symbol}, applied", **options)
            drawn += differing
    ax.axhline(1.0, color=style.LIMIT_COLOUR, linewidth=1.2, label=style.CRITICAL)
    if margin != 1:
        ax.axhline(margin, color=style.MARGIN_COLOUR, linewidth=1.2, linestyle=":", label=f"margin {margin:g}")
    finite = [ratio for ratio in drawn if math.isfinite(ratio)] + [1.0, margin]
    ax.set(yscale="log", ylim=(min(finite) / 1.8, max(finite) * 1.8), title=style.RATIOS_TITLE)
    style.legend_beside(ax)


def _draw_lookaheads(ax: Axes, lookaheads: Sequence[tuple[int, float]], ratio: float) -> None:
    fails, passes = math.log(ratio), 0.5 * math.log(ratio)
    finite = [value for _, value in lookaheads if math.isfinite(value)]
    # A loss that grows by many orders of magnitude would flatten all others: it becomes an arrow at the ceiling.
    ceiling, floor = max(3 * fails, 1.0), min([*finite, 0.0])
    floor = max(floor, -6 * max(fails, 1.0))
    marker = "o" if len(lookaheads) <= style.MOST_MARKERS else ""
    inside = [value if value <= ceiling else math.nan for _, value in lookaheads]
    line: dict[str, Any] = {"color": style.ALPHA_COLOUR, "marker": marker, "markersize": 4, "linewidth": 1.4}
    ax.plot([step for step, _ in lookaheads], inside, label=style.LOOKAHEAD, **line)
    above = [step for step, value in lookaheads if value > ceiling]
    if above:
        arrows: dict[str, Any] = {"color": style.LIMIT_COLOUR, "markersize": 6, "label": style.DIVERGED_BEYOND}
        ax.plot(above, [ceiling] * len(above), "^", **arrows)
    ax.axhline(fails, color=style.LIMIT_COLOUR, linewidth=1.2, label=f"fails (x {ratio:g})")
    ax.axhline(passes, color=style.PASSED_COLOUR, linewidth=1.2, linestyle=":", label=f"passes (x {ratio**0.5:.3g})")
    pad = 0.08 * (ceiling - floor)
    ax.set(ylim=(floor - pad, ceiling + pad), title=style.LOOKAHEADS_TITLE)
    style.legend_beside(ax)
