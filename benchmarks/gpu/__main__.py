"""The parts in turn, within their time, and what is written of them."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import lightning_maml_guard
from benchmarks.common.lightning import quiet
from benchmarks.common.workers import each_done
from benchmarks.gpu import correct, speed
from lightning_maml_guard.utils import lightning_compat

Rows = list[dict[str, Any]]


class Kit:
    """Runs parts while there is time, and writes what they found after each.

    Args:
        out: Folder to write into.
        seconds: Time for all parts.
        device: Where they run.
    """

    def __init__(self, out: Path, seconds: float, device: torch.device) -> None:
        self.out, self.seconds, self.device, self.began = out, seconds, device, time.perf_counter()
        self.found: dict[str, Any] = {}
        self.failed = False

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.perf_counter() - self.began)

    def part(self, name: str, least: float, compute: Callable[[], Rows]) -> str:
        """Run a part if at least so many seconds are left, and say how long it took; a failure is kept with its error."""
        began = time.perf_counter()
        if self.left < least:
            rows: Rows = [{"not measured": f"{self.left:.0f} s left, it takes at least {least:.0f}"}]
        else:
            try:
                rows = compute()
            except Exception as error:  # the other parts are to run all the same; the exit code tells
                rows, self.failed = (
                    [{"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}],
                    True,
                )
        taken = time.perf_counter() - began
        self.found[name] = {"seconds": taken, "rows": rows}
        self.write()
        return f"{name}: {taken:.1f} s, {max(self.left, 0):.0f} s left"

    def write(self) -> None:
        """Write all that was found so far."""
        (self.out / "gpu.json").write_text(json.dumps(self.found, indent=1))
        lines = []
        for name, part in self.found.items():
            lines += [f"## {name} ({part['seconds']:.0f} s)", "", *table(part["rows"]), ""]
        (self.out / "gpu.md").write_text("\n".join(lines))


def table(rows: Rows) -> list[str]:
    """Draw a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(cell(row.get(name, "")) for name in names) + " |" for row in rows]


def cell(value: Any) -> str:
    """Write a value."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def versions(device: torch.device) -> Rows:
    """What ran where."""
    package = sys.modules[lightning_compat.PACKAGE]
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    have = {name: str(find_spec(name) is not None) for name in ("pyhessian", "jax", "triton")}
    own = {"lightning_maml_guard": lightning_maml_guard.__version__, "python": platform.python_version()}
    return [{"device": card, "torch": torch.__version__, lightning_compat.PACKAGE: package.__version__, **own, **have}]


def pictures(kit: Kit, diagram: Any) -> Rows:
    """Draw the meta-steps and the phase diagram."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from lightning_maml_guard import plots

    drawn = []
    rows = [row for name in ("meta-steps", "JAX") for row in kit.found.get(name, {}).get("rows", []) if "ms" in row]
    if rows:
        titles, methods = (
            list(dict.fromkeys(row["row"] for row in rows)),
            list(dict.fromkeys(row["method"] for row in rows)),
        )
        fig, ax = plt.subplots(figsize=(9, 4))
        for index, method in enumerate(methods):
            own = {row["row"]: row["ms"] for row in rows if row["method"] == method}
            at = [titles.index(title) + index / (len(methods) + 1) for title in own]
            ax.bar(at, list(own.values()), 1 / (len(methods) + 1), label=method)
        ax.set(yscale="log", ylabel="ms a meta-step")
        ax.set_xticks(range(len(titles)), titles, rotation=45, ha="right", rotation_mode="anchor")
        ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(methods), frameon=False)
        fig.savefig(kit.out / "meta_step.png", dpi=150, bbox_inches="tight")
        drawn.append({"picture": "meta_step.png"})
    if diagram is not None:
        fig, _ = plots.phase_diagram(diagram)
        fig.savefig(kit.out / "phase.png", dpi=150, bbox_inches="tight")
        drawn.append({"picture": "phase.png"})
    return drawn


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=460.0)
    parser.add_argument("--parts", default="", metavar="PATTERN", help="only parts in whose name it is found")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    kit, small, diagrams = Kit(given.out, given.seconds, device), device.type == "cpu", []

    def grid() -> Rows:
        rows, diagram = speed.grid(device, *((4, 10) if small else (16, 200)))
        diagrams.append(diagram)
        return [rows]

    def jax() -> Rows:
        if find_spec("jax"):
            return speed.jax_rows(device, given.out, min(kit.left - 160, 150))
        return [{"not measured": "JAX is not installed"}]

    def panel(name: str) -> Rows:
        return [speed.panel(name, device, min(kit.left / 2, 60), small=small)]

    parts: list[tuple[str, float, Callable[[], Rows]]] = [
        ("versions", 0, lambda: versions(device)),
        ("meta-gradients, CPU against device", 5, lambda: correct.gradients(device)),
        ("measurements, CPU against device", 20, lambda: correct.measurements(device)),
        ("trainings, CPU against device", 10, lambda: correct.trainings(device)),
        ("meta-steps", 20, lambda: speed.meta_steps(device)),
        ("checks", 20, lambda: speed.checks(device)),
        ("CUDA graphs", 10, lambda: speed.graphs(device)),
        ("16 x 16 phase diagram", 15, grid),
        ("JAX", 200, jax),
        ("torch.compile", 60, lambda: speed.compiled(device)),
        *((f"paper's panel: {name}", 10, partial(panel, name)) for name in ("linear", "sinusoid")),
        ("pictures", 0, lambda: pictures(kit, diagrams[0] if diagrams else None)),
    ]
    jobs = [partial(kit.part, *part) for part in parts if re.search(given.parts, part[0])]
    for line in each_done(jobs, f"{given.seconds:.0f} seconds and what a part needs that has begun by then"):
        print(line, flush=True)
    print((given.out / "gpu.md").read_text())
    off = [row["what"] for part in kit.found.values() for row in part["rows"] if row.get("agrees") is False]
    print("all agree" if not off else f"NOT within {correct.AGREES}: {'; '.join(off)}")
    raise SystemExit(int(kit.failed or bool(off)))


if __name__ == "__main__":
    main()
