"""The experiments of Takagi et al.: ``python -m benchmarks.paper_panels [--full]``.

Runs the panels of ``phase-diagram`` one after another and prints one row of docs/paper.md for each. With ``--full``, the
published sizes, for a GPU. Pictures and JSON go to ``--out``; run again, it continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.workers import begin
from lightning_maml_guard.cli.phase_diagram import main as phase_diagram

PANELS = (
    "linear",
    "sinusoid --seeds 3",
    "omniglot --seeds 3",
    "miniimagenet --seeds 3",
    "omniglot --resampled --seeds 3",
    "miniimagenet --resampled --seeds 3",
)
FULL = ("linear --full", "sinusoid --full --seeds 3", "omniglot --full --seeds 3", "miniimagenet --full --seeds 3")
HEADER = """| panel | data | peak gain in decades, by seed | at `alpha` | gain at the largest `alpha` that trained | \
median `alpha * lambda_max`, start and end | median best `beta` over `exact_beta_c`, start and end | minutes |
|---|---|---|---|---|---|---|---|"""


def row(words: str, found: dict[str, Any]) -> str:
    """The Markdown row of a panel, from what ``phase-diagram`` returns."""
    seeds, curve = found["seeds"], found["curve"]
    positive = curve["alpha"] > 0

    def both(start: np.ndarray, end: np.ndarray) -> str:
        known = positive & np.isfinite(end)
        return ", ".join(f"{np.median(each[known]):.2g}" if known.any() else "-" for each in (start, end))

    moved = [curve[f"alpha * lambda_max at the {when}"] for when in ("start", "end")]
    shares = [curve["best beta"] / curve[f"exact beta_c at the {when}"] for when in ("start", "end")]
    cells = [
        f"`{words}`",
        f"{found['data']}, {found['steps']} steps, K = {found['inner_steps']}",
        _each((each["peak_gain"] for each in seeds), "+.2f"),
        _each((each["peak_alpha"] for each in seeds), ".2g"),
        _each(
            (each["gain_at_largest_alpha"] for each in seeds),
            "+.2f",
        )
        + f" at {_each((each['largest_alpha'] for each in seeds), '.2g')}",
        both(*moved),
        both(*shares),
        f"{found['minutes']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _each(values: Iterable[float], form: str) -> str:
    return ", ".join("-" if math.isnan(value) else format(value, form) for value in values)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper_panels", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the published sizes")
    parser.add_argument("--threads", default="2", help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("runs/phase_diagram"), help="folder")
    given = parser.parse_args()
    begin("an hour (many with --full)")
    rows = []
    for words in FULL if given.full else PANELS:
        found = phase_diagram([*words.split(), "--threads", given.threads, "--out", str(given.out)])
        rows.append(row(words, found))
    phase_diagram(["near-minimum", "--threads", given.threads, "--out", str(given.out)])
    print("\n".join(["", HEADER, *rows]))


if __name__ == "__main__":
    main()
