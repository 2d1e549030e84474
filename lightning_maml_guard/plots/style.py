"""What the pictures share: colours, words, and matplotlib with a clear error where it is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart; a state has its own row or word as well.
STATE_COLOURS = {"safe": "#009E73", "edge": "#E69F00", "unsafe": "#D55E00", "unresolved": "#999999"}
ALPHA_COLOUR, BETA_COLOUR = "#0072B2", "#CC79A7"
LIMIT_COLOUR = STATE_COLOURS["unsafe"]
PASSED_COLOUR, MARGIN_COLOUR = STATE_COLOURS["safe"], STATE_COLOURS["edge"]
SPECTRUM_COLOUR = ALPHA_COLOUR
EXACT_COLOUR = "black"
MARKER_COLOUR, MARKER_EDGE = "0.6", "black"
UNTRAINED_COLOUR, DIVERGED_COLOUR = "0.82", "0.35"
FOUND_COLOUR = OUTLINE_COLOUR = "white"
STEP_COLOURMAP = ERROR_COLOURMAP = "viridis"

INNER_RATE_AXIS, OUTER_RATE_AXIS = r"inner learning rate $\alpha$", r"outer learning rate $\beta$"
EIGENVALUE_AXIS, DENSITY_AXIS = r"eigenvalue $\lambda$ of the task loss's Hessian", "density of eigenvalues"
WEIGHT_AXIS = "weight (share of a random vector)"
STEP_AXIS, CHECK_STEP_AXIS = "training step", "training step of the check"
ERROR_AXIS = "training error"
LEARNING_RATE, BEFORE_TRAINING = "plain training", "before training"
LOSS_AXIS = "loss on batches not trained on"

SAFE_REGION, SGD_SAFE_REGION = "safe region", "plain SGD's safe region"
BEYOND_MEASURED = r"simplified curve beyond the measured $\alpha$"
CONFIGURED_RATES, APPLIED_RATES = "configured rates", "applied rates"
ALPHA_C_SIMPLIFIED = r"$\alpha_c$, simplified"
BETA_C_SIMPLIFIED, BETA_C_EXACT = r"$\beta_c(\alpha)$, simplified", r"$\beta_c(\alpha)$, exact"
UNTRAINED, DIVERGED, FOUND = "did not train", "diverged", "found by training"
CRITICAL, LOOKAHEAD, DIVERGED_BEYOND = "critical", "lookahead", "diverged, beyond the picture"
RITZ_VALUES, SMOOTHED_DENSITY = "Ritz values", "density, smoothed"

REGION_TITLE, ERROR_TITLE = "Safe region of the learning rates", "Training error after meta-training"
STATES_TITLE, RATIOS_TITLE = "State of the run", "Rates over their critical values"
LOOKAHEADS_TITLE = "Severity of the lookaheads: log(loss after / loss at the start)"
LADDER_TITLE = "Rates tried before training"
SPECTRUM_TITLE = "Eigenvalue spectrum"

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


def legend_below(figure: Any, handles: Any = None) -> None:
    """Put a legend of all labels, or of the handles, below the axes."""
    chosen = {} if handles is None else {"handles": handles}
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False, **chosen)


def legend_beside(ax: Any) -> None:
    """Put a legend to the right of the axes."""
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
