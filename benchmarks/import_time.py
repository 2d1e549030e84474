"""Time that importing the package adds to importing torch: ``python -m benchmarks.import_time``.

Every import runs in a fresh process, and the imports take turns. Each process imports torch first and times only what
follows: the difference between the total times of two processes would be smaller than the scatter of torch's import.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from statistics import median

from benchmarks.common.workers import each_done

IMPORTS = {
    "torch": "import torch",
    "the package": "import lightning_maml_guard",
    "the mathematics": (
        "from lightning_maml_guard import MetaProblem, critical_rates, measure, phase_diagram, stability_limit"
    ),
    "Lightning alone": "import pytorch_lightning",
    "guard, module, data module": "from lightning_maml_guard import ConvergenceGuard, MetaLearningModule, TaskDataModule",
}
CLOCKED = "import time; {before}; began = time.perf_counter(); {code}; print(time.perf_counter() - began)"


def seconds(code: str) -> float:
    """Seconds of an import in a fresh process, after torch's own."""
    before = "pass" if code == IMPORTS["torch"] else IMPORTS["torch"]
    clocked = CLOCKED.format(before=before, code=code)
    return float(subprocess.run([sys.executable, "-c", clocked], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.import_time", description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    given = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    names = list(IMPORTS) * (given.turns + 1)
    found = each_done([partial(seconds, IMPORTS[name]) for name in names], "4 minutes with 15 turns")
    for name, took in zip(names, found, strict=True):
        taken[name].append(took)
    for name, (_, *times) in taken.items():  # the first turn reads files that the later ones find in memory
        print(f"{name}: {median(times):.4f} s (from {min(times):.4f} to {max(times):.4f})")


if __name__ == "__main__":
    main()
