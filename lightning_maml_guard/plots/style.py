"""What every picture shares: matplotlib with a clear error where it is missing, colours, and figures without pyplot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

# Okabe and Ito's colours, which the colour-blind tell apart; a state has its own row or word as well.
STATE_COLOURS = {"safe": "#009E73", "edge": "#E69F00", "unsafe": "#D55E00", "unresolved": "#999999"}
ALPHA_COLOUR, BETA_COLOUR = "#0072B2", "#CC79A7"
# Beyond that many checks a line alone is easier to read.
DOTS = 60


def matplotlib_parts() -> Any:
    """Matplotlib without pyplot, whose import may choose a backend."""
    try:
        from matplotlib import axes, cm, collections, colormaps, colors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Drawing needs matplotlib: pip install 'lightning-maml-guard[plot]'.") from error
    return SimpleNamespace(axes=axes, cm=cm, collections=collections, colormaps=colormaps, colors=colors)


def pyplot() -> Any:
    matplotlib_parts()
    import matplotlib.pyplot as plt

    return plt


def new_figure(width: float = 6.4, height: float = 4.8) -> Any:
    """Make a figure that no window and no pyplot knows of.

    Args:
        width: Width in inches.
        height: Height in inches.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Drawing needs matplotlib: pip install 'lightning-maml-guard[plot]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
