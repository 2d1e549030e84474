"""What the pictures share: colours, words, and matplotlib with a clear error where it is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart; a state has its own row or word as well.
STATE_COLOURS = {"safe": "#009E73", "edge": "#E69F00", "unsafe": "#D55E00", "unresolved": "#999999"}
ALPHA_COLOUR, BETA_COLOUR = "#0072B2", "#CC79A7"
LIMIT_COLOUR = STATE_COLOURS["unsafe"]
PASSED_COLOUR, MARGIN_COLOUR = STATE_COLOURS["safe"], STATE_COLOURS["edge"]
SPECTRUM_COLOUR = AFTER_COLOUR = ALPHA_COLOUR
BEFORE_COLOUR = "#56B4E9"
ROLLED_BACK_COLOUR = "0.5"
EXACT_COLOUR = "black"
MARKER_COLOUR, MARKER_EDGE = "0.6", "black"
UNTRAINED_COLOUR, DIVERGED_COLOUR = "0.82", "0.35"
CURVE_COLOUR = BETA_COLOUR
START_COLOUR, END_COLOUR = MARKER_COLOUR, ALPHA_COLOUR
FOUND_COLOUR = OUTLINE_COLOUR = "white"
STEP_COLOURMAP = ERROR_COLOURMAP = "viridis"

INNER_RATE_AXIS, OUTER_RATE_AXIS = r"inner learning rate $\alpha$", r"outer learning rate $\beta$"
EIGENVALUE_AXIS, DENSITY_AXIS = r"eigenvalue $\lambda$ of the task loss's Hessian", "density of eigenvalues"
WEIGHT_AXIS = "weight (share of a random vector)"
STEP_AXIS, CHECK_STEP_AXIS = "training step", "training step of the check"
ERROR_AXIS = "training error of the runs that trained"
SHARPNESS_AXIS = r"$\alpha\,\lambda_{\max}$"
LOSS_TITLE, LOSS = "Training loss", "loss"
BEFORE_ADAPTATION, AFTER_ADAPTATION = "before adaptation", "after adaptation"
LEARNING_RATE, BEFORE_TRAINING = "plain training", "before training"
LOSS_AXIS = "loss on batches not trained on"

SAFE_REGION, INNER_REGION = "safe region", r"$\alpha < \alpha_c$; $\beta$ is not judged"
BORDER, INNER_LIMIT = r"$\beta_c(\alpha)$", r"$\alpha_c$"
BEYOND_MEASURED = r"simplified criterion beyond the measured $\alpha$"
BORDER_MEASURED = r"$\beta_c$ measured at other $\alpha$"
CONFIGURED_RATES, APPLIED_RATES = "configured rates", "applied rates"
ALPHA_C_SIMPLIFIED = r"$\alpha_c$, simplified"
BETA_C_SIMPLIFIED, BETA_C_EXACT = r"$\beta_c(\alpha)$, simplified", r"$\beta_c(\alpha)$, exact"
UNTRAINED, DIVERGED, FOUND = "did not train", "diverged", "found by training"
LARGEST_BETA, LARGEST_ALPHA = r"largest $\beta$ that trained", r"largest $\alpha$ that trained"
LARGEST_BETA_OF_OTHERS = f"{LARGEST_BETA}, other seeds"
BETA_WITHOUT_ADAPTATION = r"largest $\beta$ before divergence at $\alpha = 0$"
CONTIGUOUS_BETA = r"largest $\beta$ up to which all trained"
BETA_C_THEORY = r"$\beta_c(\alpha)$, theory"
BEST_BETA, START, END = r"best $\beta$ (smallest error)", "before training", "after it, in the best run"
CRITICAL, LOOKAHEAD, DIVERGED_BEYOND = "critical", "lookahead", "beyond the picture"
RITZ_VALUES, SMOOTHED_DENSITY = "Ritz values", "density, smoothed"

REGION_TITLE, ERROR_TITLE = "Safe region of the learning rates", "Training error after meta-training"
STATES_TITLE, RATIOS_TITLE = "State of the run", "Rates over their critical values"
LOOKAHEADS_TITLE = "Lookaheads: log(loss after / start)"
LADDER_TITLE = "Rates tried before training"
SPECTRUM_TITLE = "Eigenvalue spectrum"
NEAR_MINIMUM_TITLE = "Training from near a minimum"
START_AND_END_TITLE = "What training does to the curvature"

# What happened in a run, as marks on its loss: marker and colour.
EVENT_MARKS = {
    "unsafe": ("x", LIMIT_COLOUR),
    "capped": ("v", MARGIN_COLOUR),
    "rolled back": ("<", ROLLED_BACK_COLOUR),
    "stopped": ("s", LIMIT_COLOUR),
}
# Widths in inches of a page and of a phone's screen; a figure narrower than the limit puts its legends below.
WIDE, NARROW, NARROW_BELOW = 8.8, 3.7, 5.0

# Beyond that many checks a line alone is easier to read.
MOST_MARKERS = 60


def import_matplotlib(*submodules: str) -> Any:
    """Import matplotlib with submodules; pyplot, which may choose a backend and opens figures, only if it is named."""
    try:
        import matplotlib

        for name in submodules:
            import_module(f"matplotlib.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Drawing needs matplotlib: pip install 'lightning-maml-guard[plot]'.") from error
    return matplotlib


def axes_or_new(ax: Any) -> Any:
    """Return ``ax``, or the axes of a new figure of pyplot, which notebooks and ``plt.show()`` display."""
    if ax is None:
        _, ax = import_matplotlib("pyplot").pyplot.subplots(figsize=(6.4, 4.8), layout="constrained")
    return ax


def axes_side_by_side(count: int) -> list[Any]:
    """Return two places of a new figure of pyplot: axes, and the second ones, or None where ``count`` is 1."""
    _, axes = import_matplotlib("pyplot").pyplot.subplots(
        1, count, figsize=(6.4 * count, 4.8), layout="constrained", squeeze=False
    )
    return [*axes[0], None][:2]


def new_figure(width: float = 6.4, height: float = 4.8) -> Any:
    """Make a figure without pyplot: a training's user keeps the backend, the settings and the open figures."""
    mpl = import_matplotlib("figure", "backends.backend_agg")
    figure = mpl.figure.Figure(figsize=(width, height), layout="constrained")
    mpl.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def root_figure(ax: Any) -> Any:
    """Return the figure of an axes, not a part of it (``get_figure(root=True)`` since Matplotlib 3.10)."""
    return ax.figure.figure


def is_narrow(ax: Any) -> bool:
    """Return True if the figure of an axes is for a phone's screen."""
    return bool(root_figure(ax).get_figwidth() < NARROW_BELOW)


def plain_ticks(axis: Any, low: float, high: float) -> None:
    """Write the ticks of a log axis that spans few powers of ten as plain numbers."""
    ticker = import_matplotlib("ticker").ticker
    if low > 0 and high / low < 300:
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%.3g"))
        axis.set_minor_formatter(ticker.NullFormatter())


def legend_below(figure: Any, handles: Any = None, columns: int = 3) -> None:
    """Put a legend of all labels, or of the handles, below the axes."""
    chosen = {} if handles is None else {"handles": handles}
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small", frameon=False, **chosen)


def legend_under(ax: Any, columns: int = 3) -> None:
    """Put a legend below the axes and their label, where it covers nothing."""
    transforms, figure = import_matplotlib("transforms").transforms, root_figure(ax)
    down = transforms.ScaledTranslation(0, -0.5, figure.dpi_scale_trans)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "bbox_transform": ax.transAxes + down}
    ax.legend(fontsize="small", frameon=False, ncols=2 if is_narrow(ax) else columns, columnspacing=1.2, **place)


def legend_beside(ax: Any, *, label_below: bool = False) -> None:
    """Put a legend to the right of the axes; on a narrow figure below them, and below a label of theirs."""
    options: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    if is_narrow(ax):
        transforms, figure = import_matplotlib("transforms").transforms, root_figure(ax)
        down = transforms.ScaledTranslation(-0.45, -0.52 if label_below else -0.04, figure.dpi_scale_trans)
        options = {"loc": "upper left", "bbox_to_anchor": (0.0, 0.0), "ncols": 2, "borderaxespad": 0.2}
        options |= {"bbox_transform": ax.transAxes + down, "columnspacing": 0.8, "handlelength": 1.4}
    ax.legend(fontsize="small", frameon=False, **options)
