"""Profile of a meta-training step: ``python -m benchmarks.meta_step.profile [row] [strategy]``.

Prints the share of convolution and matrix kernels in the time of our step, by torch's profiler, and their FLOP rate
against the fastest rate measured on this machine.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.meta_step.methods import ours
from benchmarks.meta_step.roofline import measured_peak, step_flops
from benchmarks.meta_step.rows import ROWS

KERNELS = ("conv", "::mm", "::bmm", "::addmm", "::baddbmm")


def main() -> None:
    """Profile one step, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meta_step.profile", description=__doc__)
    parser.add_argument("row", nargs="?", default="miniimagenet", choices=ROWS)
    parser.add_argument("strategy", nargs="?", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = ROWS[given.row]
    torch.manual_seed(0)
    support, query = row.data(torch.float32, device)
    strategy = int(given.strategy) if given.strategy.isdigit() else given.strategy
    step = ours(strategy)(row, row.network().to(device), support, query, None)
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        step()
    on_device = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, on_device) / 1e6 for event in found.key_averages()}
    total = sum(times.values())
    kernels = sum(value for name, value in times.items() if any(part in name for part in KERNELS))
    peak, flops = measured_peak(device), step_flops(row)
    print(f"{row.title}: {1e3 * total:.0f} ms, {kernels / total:.0%} in convolution and matrix kernels")
    print(f"{flops / 1e9:.1f} GFLOP at {flops / kernels / 1e9:.0f} GFLOP/s in them; fastest measured {peak / 1e9:.0f}")
    for name, value in sorted(times.items(), key=lambda each: -each[1])[:15]:
        print(f"  {value / total:6.1%}  {name}")


if __name__ == "__main__":
    main()
