"""Memory of a check: ``python -m benchmarks.check_memory [--out FILE]``.

``measure`` of an MLP regressor with ``--parameters`` (10M) parameters, in float32 on the CPU, each
row in a fresh process. Printed is the peak of the resident memory above that before the check, in vectors of the
parameters' size. ``tol`` is so small that every run takes ``max_iter`` Hessian-vector products. The self-check of a
first measurement happens once and is left out. The allocator returns freed memory at once (MALLOC_MMAP_THRESHOLD_), so
that the peak is what was in use. The formula is that of ``measure``'s docstring. ``basis="cpu"`` would keep the vectors
in the host's memory beside an accelerator; here both are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD, Adam, Optimizer

from benchmarks.common.workers import each_done
from lightning_maml_guard import CurvatureOptions, MetaLearningModule, MetaProblem, measure
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.stability.hvp import MeasurementCache
from lightning_maml_guard.tasks.regression import Sinusoid

BYTES = {"device": 4, "cpu": 4, "bfloat16": 2}
# (tasks, inner steps, optimizer); from the second on, only the size of the graph is measured
PROBLEMS = [(2, 1, "SGD"), (1, 1, "SGD"), (4, 1, "SGD"), (2, 2, "SGD"), (2, 1, "Adam")]
LENGTHS = (1, 5, 20)


def made(width: int, tasks: int, inner_steps: int, optimizer: str) -> tuple[MetaProblem, Optimizer]:
    """The problem, and an optimizer after one step."""
    torch.manual_seed(0)
    network = mlp(1, (width, width), 1, activation="tanh")
    module = MetaLearningModule(network, inner_lr=1e-3, inner_steps=inner_steps)
    problem = module.meta_problem(Sinusoid(shots=5, queries=5).sample(tasks, torch.Generator().manual_seed(0)))
    made = SGD(module.parameters(), lr=1e-3) if optimizer == "SGD" else Adam(module.parameters(), lr=1e-3)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    made.step()
    made.zero_grad()
    return problem, made


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(width: int, tasks: int, inner_steps: int, optimizer: str, basis: str, max_iter: int) -> dict[str, Any]:
    """Measure one row in this process."""
    torch.set_num_threads(1)
    options = CurvatureOptions(tol=1e-12, max_iter=max_iter, basis=basis)
    cache = MeasurementCache()
    small, small_optimizer = made(8, tasks, inner_steps, optimizer)
    measure(small, optimizer=small_optimizer, cache=cache, curvature=options)  # the first call loads libraries
    problem, live = made(width, tasks, inner_steps, optimizer)
    before, began = peak(), time.perf_counter()
    report = measure(problem, optimizer=live, cache=cache, curvature=options)
    size = sum(value.numel() for value in problem.params.values())
    return {
        "parameters": size,
        "vectors": (peak() - before) / (4 * size),
        "seconds": time.perf_counter() - began,
        "hvps": report.hvps,
        "status": report.status,
        "beta_c": report.beta_c,
        "beta_c_interval": report.beta_c_interval,
    }


def row(width: int, tasks: int, inner_steps: int, optimizer: str, basis: str, length: int) -> dict[str, Any]:
    """A row, from a fresh process."""
    given = dict(
        zip(
            ("tasks", "inner_steps", "optimizer", "basis", "max_iter"),
            (tasks, inner_steps, optimizer, basis, length),
            strict=True,
        )
    )
    command = [sys.executable, "-m", "benchmarks.check_memory", "--row", json.dumps([width, *given.values()])]
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=exact)
    basis_vectors = length * BYTES[basis] / 4
    rest = 3 + 4 * tasks * (inner_steps + 1) + 3 * (optimizer == "Adam") + 2 * (basis == "bfloat16")
    return {
        **given,
        **json.loads(done.stdout.splitlines()[-1]),
        "basis_vectors": basis_vectors,
        "formula": basis_vectors + rest,
    }


def rows(width: int) -> list[dict[str, Any]]:
    """All rows, printed."""
    long = [(*PROBLEMS[0], basis, length) for basis in BYTES for length in LENGTHS[1:]]
    first, *others = [(*problem, "device", 1) for problem in PROBLEMS]
    found = []
    for each in each_done([partial(row, width, *given) for given in (first, *long, *others)], "5 minutes"):
        found.append(each)
        print(
            f"| {each['tasks']} | {each['inner_steps']} | {each['optimizer']} | {each['basis']} | {each['max_iter']} | "
            f"{each['basis_vectors']:.1f} | {each['formula']:.1f} | {each['vectors']:.1f} | "
            f"{each['vectors'] * 4e-9 * each['parameters']:.2f} GB | {each['seconds']:.0f} s |",
            flush=True,
        )
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_memory", description=__doc__)
    parser.add_argument("--parameters", type=float, default=1e7)
    parser.add_argument("--out", type=Path, default=Path("runs/check_memory.json"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(one(*json.loads(given.row))))
        return
    print("| tasks | K | optimizer | basis | max_iter | basis, vectors | formula | measured | | time |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    found = rows(round(given.parameters**0.5))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {platform.system()}, one thread"
    given.out.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
