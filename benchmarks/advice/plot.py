"""The picture: what the first advice is worth by cause, and what the peers' is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.advice.score import GUARD, PEERS


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the shares by cause, and the runs that train the second time by remedy.

    Args:
        result: What ``figures`` found.
        path: Where to write the picture.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    causes = result["by cause"]
    kinds = (
        ("right", "cause named", "#56B4E9"),
        ("ahead", "in time", "#009E73"),
        (GUARD, "trains as advised", "#0072B2"),
    )
    for at, (key, label, color) in enumerate(kinds):
        places = [index + 0.27 * (at - 1) for index in range(len(causes))]
        left.bar(places, [100 * each.get(key, 0.0) for each in causes.values()], 0.25, label=label, color=color)
    left.axhline(90, color="0.7", linestyle=":", linewidth=1)
    names = [f"{cause}\n({each['runs']})" for cause, each in causes.items()]
    left.set(ylabel="broken runs, %", ylim=(0, 118), xticks=range(len(causes)), xticklabels=names)
    left.legend(fontsize=7, loc="upper center", ncols=3)
    arms = [arm for arm in (GUARD, *PEERS) if arm in result["all"]]
    shares = [100 * result["all"][arm] for arm in arms]
    bars = right.barh(arms, shares, color=["#0072B2" if arm == GUARD else "0.6" for arm in arms])
    right.bar_label(bars, [f"{share:.0f} %" for share in shares], padding=3, fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="broken runs that train when started again, %", xlim=(0, 115), xticks=range(0, 101, 20))
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
