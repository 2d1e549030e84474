"""What importing the package takes beyond torch: ``python -m tests.benchmarks.import_time``.

Fresh processes take turns with ``import torch`` alone; printed is the median difference of a turn.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

IMPORTS = {
    "the package": "import torch, lightning_maml_guard",
    "the mathematics": "import torch; from lightning_maml_guard import critical_rates, measure, stability_limit",
    "everything": "import torch; from lightning_maml_guard import *",
}


def seconds(code: str) -> float:
    """Seconds of a fresh process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.import_time", description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in IMPORTS}
    alone = []
    for _ in range(given.turns):
        alone.append(seconds("import torch"))
        for name, code in IMPORTS.items():
            found[name].append(seconds(code) - alone[-1])
    print(f"import torch: {median(alone):.2f} s")
    for name, differences in found.items():
        print(f"{name}: {median(differences):+.3f} s")


if __name__ == "__main__":
    main()
