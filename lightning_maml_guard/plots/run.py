"""A run over its checks: states, ratios and lookaheads.

Drawn without pyplot, so that a picture made in the middle of a training leaves the user's backend, settings and open
figures alone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_maml_guard.plots.style import ALPHA_COLOUR, BETA_COLOUR, DOTS, STATE_COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_maml_guard.stability.report import StabilityReport


def course(
    reports: Sequence[StabilityReport],
    *,
    severities: Sequence[tuple[int, float]] = (),
    alarm: float = 3.0,
    margin: float = 1.0,
) -> tuple[Any, list[Axes]]:
    """Draw a run over its checks: its state, its rates in units of their critical values, and its trials.

    Args:
        reports: Reports of the checks, oldest first.
        severities: Steps and severities of the trials, those between checks included.
        alarm: The guard's ``alarm``; its logarithm and half of that are marked.
        margin: The guard's ``margin``, marked beside 1.

    Returns:
        ``(fig, axes)``: the states, the ratios and, if there are any, the trials.

    Raises:
        ValueError: If there is no report.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not reports:
        raise ValueError("There is nothing to draw: no check was made. Train first, or draw other reports.")
    trials = [(step, value) for step, value in severities if not math.isnan(value)]
    heights = [0.8, 2.0, 1.4][: 3 if trials else 2]
    figure = new_figure(8.4, 0.7 + 1.25 * sum(heights))
    axes = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    steps = [float(report.step if report.step is not None else i) for i, report in enumerate(reports)]
    _states(axes[0], reports, steps)
    _ratios(axes[1], reports, steps, margin)
    if trials:
        _trials(axes[2], trials, alarm)
    axes[-1].set_xlabel("training step")
    return figure, axes


def svg(figure: Any) -> str:
    """Draw a figure as a piece of HTML that takes its ink and its paper from the page around it.

    Args:
        figure: The figure.

    Returns:
        An ``<svg>`` element: what is black becomes ``currentColor``, what is white the page's ``--paper``, and colours
        too dark for a dark page have a lighter one there.
    """
    import matplotlib
    from matplotlib.colors import to_hex

    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # A user's own style may draw white on black: what is ink and what is paper is in it.
    style: Any = matplotlib.rcParams
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    inks = {to_hex(style[name]) for name in names if style[name] != "auto"}
    for ink in {"#000000", *inks} - {to_hex(style["axes.facecolor"])}:
        drawn = drawn.replace(f": {ink}", ": currentColor")
    drawn = drawn.replace(f": {to_hex(style['axes.facecolor'])}", ": var(--paper)")
    # A browser that does not know light-dark() keeps the declaration before it.
    drawn = re.sub(r"(stroke|fill): (#[0-9a-f]{6})", lambda found: _on_both(*found.groups()), drawn)
    return drawn.replace("<svg ", '<svg fill="currentColor" ', 1)


def _on_both(what: str, colour: str) -> str:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    lighter = channels
    while sum(w * c**2.2 for w, c in zip((0.2126, 0.7152, 0.0722), lighter, strict=True)) < 0.25:
        lighter = [c + 0.1 * (1 - c) for c in lighter]
    if lighter is channels:
        return f"{what}: {colour}"
    light = "".join(f"{round(255 * c):02x}" for c in lighter)
    return f"{what}: {colour}; {what}: light-dark({colour}, #{light})"


def _states(ax: Axes, reports: Sequence[StabilityReport], steps: Sequence[float]) -> None:
    rows = [name for name in STATE_COLOURS if name != "unresolved" or any(r.status == name for r in reports)]
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
        ax.broken_barh(spans, (row - 0.38, 0.76), facecolors=STATE_COLOURS[name], linewidth=0)
    ax.set_yticks(range(len(rows)), rows)
    ax.set(ylim=(len(rows) - 0.5, -0.5), title="State of the run")


def _ratios(ax: Axes, reports: Sequence[StabilityReport], steps: Sequence[float], margin: float) -> None:
    drawn = []
    for name, colour, mark in (("alpha", ALPHA_COLOUR, "o"), ("beta", BETA_COLOUR, "s")):
        configured = [getattr(report, f"{name}_ratio") for report in reports]
        limits = [getattr(report, f"{name}_c") for report in reports]
        applied = [getattr(report, f"{name}_applied") for report in reports]
        capped = [a / c if c > 0 and a > 0 else math.nan for a, c in zip(applied, limits, strict=True)]
        shown = [ratio if math.isfinite(ratio) and ratio > 0 else math.nan for ratio in configured]
        marker = mark if len(reports) <= DOTS else ""
        symbol = rf"$\{name}/\{name}_c$"
        if any(math.isfinite(ratio) for ratio in shown):
            ax.plot(steps, shown, color=colour, marker=marker, markersize=4, linewidth=1.6, label=symbol)
            drawn += shown
        differs = [
            c if math.isfinite(c) and (math.isnan(s) or abs(c - s) > 1e-9 * s) else math.nan
            for c, s in zip(capped, shown, strict=True)
        ]
        if any(math.isfinite(ratio) for ratio in differs):
            options: dict[str, Any] = {"linestyle": "--", "marker": marker and "v", "markersize": 5, "linewidth": 1.2}
            ax.plot(steps, differs, color=colour, label=f"{symbol}, applied", **options)
            drawn += differs
    ax.axhline(1.0, color=STATE_COLOURS["unsafe"], linewidth=1.2, label="critical")
    if margin != 1:
        ax.axhline(margin, color=STATE_COLOURS["edge"], linewidth=1.2, linestyle=":", label=f"margin {margin:g}")
    finite = [ratio for ratio in drawn if math.isfinite(ratio)] + [1.0, margin]
    ax.set(yscale="log", ylim=(min(finite) / 1.8, max(finite) * 1.8), title="Rates over their critical values")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)


def _trials(ax: Axes, trials: Sequence[tuple[int, float]], alarm: float) -> None:
    top, half = math.log(alarm), 0.5 * math.log(alarm)
    finite = [value for _, value in trials if math.isfinite(value)]
    # A run that is lost by many orders of magnitude would flatten all others: those leave the picture as arrows.
    ceiling, floor = max(3 * top, 1.0), min([*finite, 0.0])
    floor = max(floor, -6 * max(top, 1.0))
    marker = "o" if len(trials) <= DOTS else ""
    inside = [value if value <= ceiling else math.nan for _, value in trials]
    steps = [step for step, _ in trials]
    ax.plot(steps, inside, color=ALPHA_COLOUR, marker=marker, markersize=4, linewidth=1.4, label="trial")
    lost = [step for step, value in trials if value > ceiling]
    if lost:
        colour = STATE_COLOURS["unsafe"]
        ax.plot(lost, [ceiling] * len(lost), "^", color=colour, markersize=6, label="lost, beyond the picture")
    ax.axhline(top, color=STATE_COLOURS["unsafe"], linewidth=1.2, label=f"fails (x {alarm:g})")
    ax.axhline(half, color=STATE_COLOURS["safe"], linewidth=1.2, linestyle=":", label=f"passes (x {alarm**0.5:.3g})")
    pad = 0.08 * (ceiling - floor)
    ax.set(ylim=(floor - pad, ceiling + pad), title="Severity of the trials: log(loss after / loss at the start)")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
