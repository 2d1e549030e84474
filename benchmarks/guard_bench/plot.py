"""The figures of GuardBench in one picture: detection ahead of divergence, and outcomes by remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw detection by lead, and outcomes by remedy.

    Args:
        result: What ``figures`` found.
        path: Where to write the picture.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    others = iter(("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "0.4"))
    markers = "oosD^vPX"
    for marker, (name, leads) in zip(markers, result["detection"].items(), strict=True):
        guard = name.startswith("guard")
        left.plot(
            list(leads),
            [each[0] for each in leads.values()],
            marker=marker,
            label=name,
            linewidth=2.5 if guard else 1.2,
            linestyle="--" if name.endswith("defaults") else "-",
            color="#0072B2" if guard else next(others),
        )
    left.axhline(0.5, color="0.7", linestyle=":", linewidth=1)
    left.set(xlabel="steps before the loss exceeds 5x its start", ylabel="AUROC", xticks=list(leads), ylim=(0, 1.02))
    left.legend(fontsize=7, loc="lower left")
    arms = list(result["rescue"])
    shares = [100 * result["rescue"][arm]["healthy"] for arm in arms]
    bars = right.barh(arms, shares, color=["#0072B2" if arm.startswith("guard") else "0.6" for arm in arms])
    ratios = [result["rescue"][arm]["median ratio"] for arm in arms]
    labels = [f"final loss x{ratio:.3g}" if ratio < 1e4 else "diverged" for ratio in ratios]
    right.bar_label(bars, labels, padding=3, fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="diverging runs that end healthy, %", xlim=(0, 125), xticks=range(0, 101, 20))
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
