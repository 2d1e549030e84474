"""Times meta-training steps in turns, and compares the gradients.

``python -m benchmarks.meta_step [rows] [--compile] [--rounds 9] [--out FILE]``. Printed for every method: the median
CPU time of the process and wall time (``--threads``, 1 by default), the median ratio of the CPU times to the
hand-written loop's of the same turn, the relative distance of its meta-gradient from the loop's in float64, and the most
memory that the first steps added, compilation included. A method that fails is listed with its reason. JAX and optax
come with the extra ``jax``.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.common.workers import each_done
from benchmarks.meta_step.methods import BASELINE, OURS, gradient_by, methods
from benchmarks.meta_step.roofline import limit_seconds, measured_peak
from benchmarks.meta_step.rows import ROWS, Row
from lightning_maml_guard.kernels.allocator import hold, release, settle

AGREES = 1e-9


def numerics(row: Row, makes: dict, device: torch.device) -> dict:
    """Relative distance of each meta-gradient from the loop's, in float64, on 4 tasks."""
    small = replace(row, tasks=min(row.tasks, 4))
    support, query = small.data(torch.float64, device)
    torch.manual_seed(0)
    network = small.network().double().to(device)
    for part in network.modules():  # scales of both signs, so that the norm layers are not at a special point
        if isinstance(part, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    reference = gradient_by(makes[BASELINE], small, network, support, query)
    found = {}
    for name, make in makes.items():
        try:
            gap = gradient_by(make, small, network, support, query) - reference
            found[name] = float(gap.norm() / reference.norm())
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found


def timed(row: Row, makes: dict, device: torch.device, rounds: int) -> tuple[dict, dict, dict]:
    """CPU and wall times of one step, by method and turn, and the memory the first steps added (CPU: to the peak)."""
    support, query = row.data(torch.float32, device)
    torch.manual_seed(0)
    network = row.network().to(device)
    steps, memory = {}, {}
    for name, make in makes.items():
        steps[name] = make(row, copy.deepcopy(network), support, query, None)
        before = _peak(device)
        for _ in range(2):
            steps[name]()
        memory[name] = _peak(device) - before
    times: dict = {name: [] for name in steps}
    walls: dict = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            # In a training a step follows another, so the first step of a turn is not timed.
            if name in OURS and device.type == "cpu":
                hold(step)  # as MetaLearningModule does in a fit
            step()
            settle()
            if device.type == "cuda":
                torch.cuda.synchronize()
            began, used = time.perf_counter(), time.process_time()
            for _ in range(row.burst):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            walls[name].append((time.perf_counter() - began) / row.burst)
            # On a GPU the time of the process says nothing about the device's.
            times[name].append(walls[name][-1] if device.type == "cuda" else (time.process_time() - used) / row.burst)
            release(step)
    return times, walls, memory


def measured(
    row: Row, makes: dict, device: torch.device, rounds: int, compared: bool
) -> tuple[Row, dict, dict, dict, dict]:
    """Errors of the gradients (if compared), times and memory of every method on a row."""
    here = {n: m for n, m in makes.items() if "our conv4" not in n or len(row.example) == 3}
    gaps = numerics(row, here, device) if compared else dict.fromkeys(here)
    works = {n: m for n, m in here.items() if not isinstance(gaps[n], str)}
    return row, gaps, *timed(row, works, device, rounds)


def table(row: Row, gaps: dict, times: dict, walls: dict, memory: dict, peak: float, limit: float) -> dict:
    """Print a row's table, and return what it holds."""
    print(f"\n{row.title}\n\n| method | CPU ms | wall ms | x the loop | share of the limit | gradient's error | MiB |")
    print("|---|---|---|---|---|---|---|")
    result = {"limit_ms": 1e3 * limit, "peak_gflops": peak / 1e9, "methods": {}}
    for name, gap in gaps.items():
        if isinstance(gap, str):
            print(f"| {name} | | | fails | | {gap} | |")
            result["methods"][name] = {"fails": gap}
            continue
        ratio = median(base / own for base, own in zip(times[BASELINE], times[name], strict=True))
        milliseconds = 1e3 * median(times[name])
        wrong = "" if gap is None or gap <= AGREES else " (wrong)"
        shown = "" if gap is None else f"{gap:.0e}{wrong}"
        share = limit / (milliseconds / 1e3)
        print(
            f"| {name} | {milliseconds:.3g} | {1e3 * median(walls[name]):.3g} | {ratio:.2f} | {share:.0%} | {shown} | {memory[name]:.0f} |"
        )
        result["methods"][name] = {
            "cpu_ms": milliseconds,
            "wall_ms": 1e3 * median(walls[name]),
            "ratio": ratio,
            "share_of_limit": share,
            "gradient_error": gap,
            "mib": memory[name],
        }
    result["loop_limit_ratio"] = median(times[BASELINE]) / limit
    print(f"limit (see roofline.py): {1e3 * limit:.3g} ms, {result['loop_limit_ratio']:.1f}x the loop", flush=True)
    return result


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Time, compare, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meta_step.run", description=__doc__)
    parser.add_argument("rows", nargs="*", default=[])
    parser.add_argument("--compile", action="store_true", help="also with compile=True (minutes of compiling a row)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="methods whose name holds one of these")
    parser.add_argument("--no-numerics", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/meta_step.json"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    makes = methods(given.compile)
    if given.only:
        makes = {n: m for n, m in makes.items() if n == BASELINE or any(part in n for part in given.only)}
    peak = measured_peak(device)
    machine = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor()} {given.threads} threads"
    )
    print(f"torch {torch.__version__}, {machine}; fastest convolution or product measured: {peak / 1e9:.0f} GFLOP/s")
    results = {}
    jobs = [
        partial(measured, ROWS[key], makes, device, given.rounds, not given.no_numerics) for key in given.rows or ROWS
    ]
    for row, gaps, times, walls, memory in each_done(jobs, "5 minutes a row"):
        results[row.title] = table(row, gaps, times, walls, memory, peak, limit_seconds(row, peak, device))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
