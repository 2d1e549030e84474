"""A run over its steps: losses, states, ratios and lookaheads.

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

    from lightning_maml_guard.lookahead.loss_curve import LossCurve
    from lightning_maml_guard.stability.report import StabilityReport

# A loss this many times as large as the one at the start, or the median, is beyond the picture.
_CEILING = 10.0
_PAD = 0.012
_LEAST_SPAN = 1.3
_FEW = 20  # losses that are drawn with a mark each: a line alone does not show a single one


def run_history(
    reports: Sequence[StabilityReport],
    *,
    severities: Sequence[tuple[int, float]] = (),
    divergence_ratio: float = 3.0,
    margin: float = 1.0,
    losses: LossCurve | None = None,
    events: Sequence[tuple[int, str]] = (),
    rolled_back: Sequence[tuple[int, int]] = (),
    end: int | None = None,
    width: float = style.WIDE,
) -> tuple[Any, list[Axes]]:
    """Draw a run: its loss with what happened, its state, its rates over their critical values, its lookaheads.

    Args:
        reports: Reports of the checks, oldest first.
        severities: Steps and severities of the lookaheads, those between checks included.
        divergence_ratio: The lookahead's ``divergence_ratio``; its logarithm and half of that are marked.
        margin: The guard's ``margin``, marked beside 1.
        losses: The losses of the steps; None draws no loss.
        events: Steps and kinds (``"unsafe"``, ``"capped"``, ``"rolled back"``, ``"stopped"``) of what happened.
        rolled_back: Steps that a rollback went back to, each with the step it was made at; shaded between the two.
        end: Steps taken, where the picture ends (default: a check's interval after the last check).
        width: Width of the figure in inches; below 5, legends go below their axes.

    Returns:
        ``(fig, axes)``: the losses, the states, the ratios and the lookaheads, as far as there are any.

    Raises:
        ValueError: If there is no report.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not reports:
        raise ValueError("There is nothing to draw: no check was made. Train first, or draw other reports.")
    lookaheads = [(step, value) for step, value in severities if not math.isnan(value)]
    steps = [float(report.step if report.step is not None else i) for i, report in enumerate(reports)]
    gap = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) or 1.0
    stop = max(end, steps[-1]) if end else steps[-1] + gap
    drawn = losses if losses is not None and losses.points else None
    heights = [2.0] * (drawn is not None) + [0.8, 2.0] + [1.4] * bool(lookaheads)
    legends = 0.42 * len(heights) if width < style.NARROW_BELOW else 0.0
    figure = style.new_figure(width, 0.7 + 1.25 * sum(heights) + legends)
    axes = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    rest = list(axes)
    if drawn is not None:
        _draw_losses(rest.pop(0), drawn, events)
    _draw_states(rest[0], reports, steps, stop)
    _draw_ratios(rest[1], reports, steps, margin, last=not lookaheads)
    if lookaheads:
        _draw_lookaheads(rest[2], lookaheads, divergence_ratio)
    for ax in axes:
        for begin, at in rolled_back:
            ax.axvspan(begin, max(at, begin), color=style.ROLLED_BACK_COLOUR, alpha=0.18, linewidth=0, zorder=0)
    axes[-1].set_xlabel(style.STEP_AXIS)
    first, last = min(steps[0], 0.0), max(stop, 1.0)
    pad = _PAD * (last - first)  # room for the marks of the first check and the last
    axes[-1].set_xlim(first - pad, last + pad)
    ticker = style.import_matplotlib("ticker").ticker
    axes[-1].xaxis.set_major_locator(ticker.MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _draw_losses(ax: Axes, losses: LossCurve, events: Sequence[tuple[int, str]]) -> None:
    mpl = style.import_matplotlib("transforms")
    points = losses.points
    finite = sorted(value for p in points for value in (p.mean, p.low, p.high) if math.isfinite(value))
    before = [(step, value) for step, value, _ in losses.adapted if math.isfinite(value)]
    lowest = min([*finite, *(value for _, value in before)], default=0.0)
    middle = max(next((p.mean for p in points if p.finite), 1.0), finite[len(finite) // 2] if finite else 1.0)
    ceiling = _CEILING * middle if lowest > 0 else math.inf
    x = [p.step + (losses.stride - 1) / 2 for p in points]
    shown = [p.mean if p.mean <= ceiling else math.nan for p in points]
    if losses.stride > 1:
        low, high = ([min(value, ceiling) for value in ends] for ends in zip(*((p.low, p.high) for p in points)))  # noqa: B905
        ax.fill_between(x, low, high, color=style.AFTER_COLOUR, alpha=0.18, linewidth=0)
    name = style.AFTER_ADAPTATION if before else style.LOSS
    mark = "o" if len(points) <= _FEW else ""
    ax.plot(x, shown, color=style.AFTER_COLOUR, marker=mark, markersize=3, linewidth=1.4, label=name)
    if before:
        inside = [value if value <= ceiling else math.nan for _, value in before]
        dots: dict[str, Any] = {"marker": ".", "markersize": 4, "linewidth": 1.0}
        ax.plot([step for step, _ in before], inside, color=style.BEFORE_COLOUR, label=style.BEFORE_ADAPTATION, **dots)
    beyond = [at for at, p in zip(x, points, strict=True) if p.high > ceiling]
    if beyond and math.isfinite(ceiling):
        arrows: dict[str, Any] = {"color": style.LIMIT_COLOUR, "markersize": 5, "label": style.DIVERGED_BEYOND}
        ax.plot(beyond, [ceiling] * len(beyond), "^", **arrows)
    top = mpl.transforms.blended_transform_factory(ax.transData, ax.transAxes)
    for kind, (marker, colour) in style.EVENT_MARKS.items():
        at = [step for step, each in events if each == kind]
        if at:
            # A cross is larger and on top, so that it is seen where the guard acted in the same step.
            size, layer = (8, 7) if marker == "x" else (6, 6)
            marks: dict[str, Any] = {"marker": marker, "color": colour, "linestyle": "none", "markersize": size}
            ax.plot(at, [1.0] * len(at), transform=top, clip_on=False, label=kind, zorder=layer, **marks)
    ax.set(title=style.LOSS_TITLE, yscale="log" if lowest > 0 else "linear")
    ax.margins(y=0.08)
    if lowest > 0:
        bottom, top_loss = ax.get_ylim()
        if top_loss < _LEAST_SPAN * bottom:  # of losses that hardly differ, ticks would read alike
            widened = (_LEAST_SPAN * bottom / top_loss) ** 0.5
            ax.set_ylim(bottom / widened, top_loss * widened)
        style.plain_ticks(ax.yaxis, *ax.get_ylim())
    style.legend_beside(ax)


def _draw_states(ax: Axes, reports: Sequence[StabilityReport], steps: Sequence[float], stop: float) -> None:
    rows = [name for name in style.STATE_COLOURS if name != "unresolved" or any(r.status == name for r in reports)]
    # Equal neighbours are one bar: between two the page would shine through.
    begins = [i for i, report in enumerate(reports) if i == 0 or report.status != reports[i - 1].status]
    ends = [*(steps[i] for i in begins[1:]), stop]
    for row, name in enumerate(rows):
        spans = [
            (steps[i], max(end - steps[i], 0.0))
            for i, end in zip(begins, ends, strict=True)
            if reports[i].status == name
        ]
        ax.broken_barh(spans, (row - 0.38, 0.76), facecolors=style.STATE_COLOURS[name], linewidth=0)
    ax.set_yticks(range(len(rows)), rows)
    ax.set(ylim=(len(rows) - 0.5, -0.5), title=style.STATES_TITLE)


def _draw_ratios(
    ax: Axes, reports: Sequence[StabilityReport], steps: Sequence[float], margin: float, *, last: bool
) -> None:
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
    style.legend_beside(ax, label_below=last)


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
    ax.axhline(fails, color=style.LIMIT_COLOUR, linewidth=1.2, label=f"fails from x {ratio:g} on")
    ax.axhline(passes, color=style.PASSED_COLOUR, linewidth=1.2, linestyle=":", label=f"passes to x {ratio**0.5:.3g}")
    pad = 0.08 * (ceiling - floor)
    ax.set(ylim=(floor - pad, ceiling + pad), title=style.LOOKAHEADS_TITLE)
    style.legend_beside(ax, label_below=True)
