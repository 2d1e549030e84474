"""What importing the package adds to importing torch: ``python -m tests.benchmarks.import_time``.

Fresh processes take turns: torch alone, and torch with one of the imports. Printed are the medians over the turns of
the differences within a turn.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

IMPORTS = {
    "the package": "import lightning_maml_guard",
    "the mathematics": (
        "from lightning_maml_guard import MetaProblem, critical_rates, measure, phase_diagram, stability_limit"
    ),
    "Lightning alone": "import pytorch_lightning",
    "guard, module, data module": "from lightning_maml_guard import ConvergenceGuard, MetaLearningModule, TaskDataModule",
}


def seconds(code: str) -> float:
    """Seconds of a fresh process that runs this."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.import_time", description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    given = parser.parse_args()
    alone: list[float] = []
    added: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(given.turns + 1):
        torch = seconds("import torch")
        differences = {name: seconds(f"import torch; {code}") - torch for name, code in IMPORTS.items()}
        if turn:  # the first one reads files that the later ones find in memory
            alone.append(torch)
            for name, difference in differences.items():
                added[name].append(difference)
    print(f"import torch: {median(alone):.2f} s ({given.turns} turns)")
    for name, differences in added.items():
        print(f"{name}: {median(differences):+.3f} s (from {min(differences):+.3f} to {max(differences):+.3f})")


if __name__ == "__main__":
    main()
