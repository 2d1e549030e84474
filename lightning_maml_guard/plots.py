"""Pictures of what the guard found; each function returns ``(fig, ax)``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_maml_guard.curvature.density import SpectralDensity
    from lightning_maml_guard.grid.diagram import PhaseDiagram
    from lightning_maml_guard.guard.report import StabilityReport


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
    mpl = _matplotlib()
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
        _, ax = _pyplot().subplots(figsize=(6.4, 4.8), layout="constrained")
    figure = ax.figure
    shown = [measured[i] for i in sorted({round(k * (len(measured) - 1) / 7) for k in range(8)})]
    steps = [float(report.step if report.step is not None else i) for i, report in enumerate(measured)]
    # The last check is drawn over the others: keep it off the palest end of the map.
    colours = mpl.colors.ListedColormap(mpl.colormaps["viridis"](range(20, 216)))
    norm = mpl.colors.Normalize(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1)

    low = min(min(r.alpha, r.alpha_applied) if r.alpha_applied > 0 else r.alpha_c for r in measured)
    low = min([low, *(r.alpha_c for r in shown)]) / 30
    curves = {id(report): _border(report, low) for report in shown}
    betas = [beta for _, curve in curves.values() for beta in curve if math.isfinite(beta)]
    reached = [*rates, *betas, *(rate for r in measured for rate in (r.beta, r.beta_applied))]
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
    capped = [(r, step) for r, step in drawn if (r.alpha_applied, r.beta_applied) != (r.alpha, r.beta)]
    joined = [[(r.alpha, r.beta), (r.alpha_applied, r.beta_applied)] for r, _ in capped]
    inks = [colours(norm(step)) for _, step in capped]
    ax.add_collection(mpl.collections.LineCollection(joined, colors=inks, linewidths=0.8, zorder=4), autolim=False)
    dots: dict[str, Any] = {"cmap": colours, "norm": norm, "s": 36, "edgecolors": "black", "linewidths": 0.6}
    if capped:
        x, y = [r.alpha_applied for r, _ in capped], [r.beta_applied for r, _ in capped]
        ax.scatter(x, y, c=[step for _, step in capped], marker="v", zorder=6, **dots)
    if drawn:
        x, y = [r.alpha for r, _ in drawn], [r.beta for r, _ in drawn]
        ax.scatter(x, y, c=[step for _, step in drawn], zorder=5, **dots)
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
    ax.legend(loc="best", frameon=True, framealpha=0.9)
    if len(measured) > 1:
        figure.colorbar(mpl.cm.ScalarMappable(norm, colours), ax=ax, label="training step of the check")
    elif measured[0].step is not None:
        ax.set_title(f"Safe region of the learning rates, step {measured[0].step}")
    return figure, ax


def phase_diagram(
    diagram: PhaseDiagram,
    ax: Axes | None = None,
    *,
    found: Any = None,
    title: str = "Training error after meta-training",
) -> tuple[Any, Any]:
    """Draw the training error over the grid, with the critical rates that theory gives for its start.

    Dark cells trained furthest. Grey cells did not train (see :class:`PhaseDiagram`); crossed ones diverged. A
    cell's rates are those of its centre. The vertical line is
    the poster's ``alpha_c``, the curves are ``beta_c(alpha)`` by the poster and by the Jacobian of the update as
    configured, all before training.

    Args:
        diagram: The diagram.
        ax: Axes to draw on (default: a new figure).
        found: Largest convergent meta rates found by training, shape ``(n, 2)``: inner rate and meta rate a row.
        title: Title of the axes.

    Returns:
        ``(fig, ax)``.

    Raises:
        ValueError: If a rate is 0, for which log axes have no place, or if there is but one of either.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    plt = _pyplot()
    for name, rates in (("alphas", diagram.alphas), ("betas", diagram.betas)):
        if len(rates) < 2 or min(rates) <= 0:
            raise ValueError(
                f"A phase diagram on log axes needs at least 2 `{name}` above 0 but got {rates.tolist()}: draw a part "
                "of the grid, or train another."
            )
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    figure = ax.figure
    shown = np.ma.masked_where(~diagram.trained, diagram.final)
    start = float(np.nanmax(diagram.unadapted))
    low = float(shown.min()) if shown.count() else start / 10
    norm = plt.matplotlib.colors.LogNorm(max(low, start * 1e-12), start) if low < start else None
    colours = plt.get_cmap("viridis").with_extremes(bad="0.82")
    mesh = ax.pcolormesh(
        _edges(diagram.alphas), _edges(diagram.betas), shown.T, cmap=colours, norm=norm, rasterized=True, zorder=0
    )
    lost = np.argwhere(diagram.diverged)
    if len(lost):
        x, y = diagram.alphas[lost[:, 0]], diagram.betas[lost[:, 1]]
        ax.scatter(x, y, marker="x", s=14, color="0.35", linewidths=0.8, label="diverged", zorder=1)
    top, bottom = _edges(diagram.betas)[-1], _edges(diagram.betas)[0]
    if len(diagram.alpha_c):
        alpha_c = np.nanmin(diagram.at_start("alpha_c")) if np.isfinite(diagram.at_start("alpha_c")).any() else math.inf
        if _edges(diagram.alphas)[0] < alpha_c < _edges(diagram.alphas)[-1]:
            _outlined(ax, [alpha_c] * 2, [bottom, top], "#D55E00", "-.", r"$\alpha_c$, poster")
        for name, colour, style, label in (
            ("beta_c", "#D55E00", "-", r"$\beta_c(\alpha)$, poster"),
            ("exact_beta_c", "black", "--", r"$\beta_c(\alpha)$, exact"),
        ):
            curve = diagram.at_start(name)
            known = np.isfinite(curve) & (curve > 0)
            if known.any():
                _outlined(ax, diagram.alphas[known], curve[known], colour, style, label)
    if found is not None:
        x, y = np.asarray(found, dtype=np.float64).T
        ax.scatter(x, y, s=26, color="white", edgecolors="black", label="found by training", zorder=5)
    ax.set(
        xscale="log",
        yscale="log",
        xlim=_edges(diagram.alphas)[[0, -1]],
        ylim=(bottom, top),
        xlabel=r"inner rate $\alpha$",
        ylabel=r"meta rate $\beta$",
        title=title,
    )
    handles, _ = ax.get_legend_handles_labels()
    if (~diagram.trained & ~diagram.diverged).any() or len(lost):
        handles.insert(0, plt.matplotlib.patches.Patch(facecolor="0.82", label="did not train"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    if shown.count():
        bar = figure.colorbar(mesh, ax=ax, label="training error")
        if norm is not None and start / low < 30:  # too few powers of ten to mark the scale by them alone
            for which in ("major", "minor"):
                getattr(bar.ax.yaxis, f"set_{which}_formatter")(plt.matplotlib.ticker.FormatStrFormatter("%.3g"))
    return figure, ax


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
    plt = _pyplot()
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


def _edges(rates: np.ndarray) -> np.ndarray:
    logs = np.log(np.asarray(rates, dtype=np.float64))
    middles = (logs[1:] + logs[:-1]) / 2
    return np.exp(np.concatenate([[2 * logs[0] - middles[0]], middles, [2 * logs[-1] - middles[-1]]]))


def _outlined(ax: Axes, x: Any, y: Any, colour: str, style: str, label: str) -> None:
    """A line that is seen on every cell: white around it."""
    from matplotlib import patheffects

    around = [patheffects.Stroke(linewidth=4.2, foreground="white"), patheffects.Normal()]
    ax.plot(x, y, color=colour, linestyle=style, linewidth=2.2, zorder=4, label=label, path_effects=around)


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


def _matplotlib() -> Any:
    """Matplotlib without pyplot, whose import may choose a backend."""
    try:
        from matplotlib import axes, cm, collections, colormaps, colors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Drawing needs matplotlib: pip install 'lightning-maml-guard[plot]'.") from error
    return SimpleNamespace(axes=axes, cm=cm, collections=collections, colormaps=colormaps, colors=colors)


def _pyplot() -> Any:
    _matplotlib()
    import matplotlib.pyplot as plt

    return plt
