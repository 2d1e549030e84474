"""Figures as a piece of HTML."""

from __future__ import annotations

import io
import re
from typing import Any

from lightning_maml_guard.plots.style import import_matplotlib


def svg(figure: Any) -> str:
    """Draw a figure as an ``<svg>`` element that takes its ink and its paper from the page around it.

    Args:
        figure: The figure.

    Returns:
        The element: what is black becomes ``currentColor``, what is white the page's ``--paper``, and colours that are
        too dark for a dark page have a lighter one there.
    """
    mpl = import_matplotlib("colors")
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # A user's own style may draw white on black, so the colours of ink and paper are read from it.
    style: Any = mpl.rcParams
    to_hex = mpl.colors.to_hex
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    paper = to_hex(style["axes.facecolor"])
    inks = {to_hex(style[name]) for name in names if style[name] != "auto"}
    for ink in {"#000000", *inks} - {paper}:
        drawn = drawn.replace(f": {ink}", ": currentColor")
    drawn = drawn.replace(f": {paper}", ": var(--paper)")
    # A browser that does not know light-dark() keeps the declaration before it.
    drawn = re.sub(r"(stroke|fill): (#[0-9a-f]{6})", lambda found: _on_light_and_dark(*found.groups()), drawn)
    return drawn.replace("<svg ", '<svg fill="currentColor" ', 1)


def _on_light_and_dark(attribute: str, colour: str) -> str:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    lighter = channels
    while sum(w * c**2.2 for w, c in zip((0.2126, 0.7152, 0.0722), lighter, strict=True)) < 0.25:
        lighter = [c + 0.1 * (1 - c) for c in lighter]
    if lighter is channels:
        return f"{attribute}: {colour}"
    light = "".join(f"{round(255 * c):02x}" for c in lighter)
    return f"{attribute}: {colour}; {attribute}: light-dark({colour}, #{light})"
