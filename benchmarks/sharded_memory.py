"""Memory of a check on a model split over processes: ``python -m benchmarks.sharded_memory``.

Measures the curvature of an MLP of ``--layers`` layers of ``--width`` units, split by ``fully_shard`` over 1, 2 and 3
processes on the CPU (gloo). Prints by process what the measurement added to the peak of the resident memory, in vectors
of the whole model's size, beside the share that the formula gives (Krylov vectors and work vectors, divided by the
processes; one layer is gathered at a time), the processor time, and whether all of them found the same numbers.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from benchmarks.common.workers import each_done
from lightning_maml_guard import CurvatureOptions, measure
from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.stability.problems import PlainProblem

# Vectors beside the Krylov basis: the parameters twice (kept and the centre), a point, gradients ahead and behind, the
# product, and a few that Gram-Schmidt and the optimizer's step need.
WORK = 10
SIZES = (1, 2, 3)


def network(layers: int, width: int) -> nn.Sequential:
    """Build the MLP."""
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())))


def measured(rank: int, size: int, folder: str, layers: int, width: int, products: int) -> None:
    """Measure on one process, and leave the result in a file."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{size}", rank=rank, world_size=size)
    model, mesh = network(layers, width), init_device_mesh("cpu", (size,))
    for part in model:
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    data = torch.randn(12, width, generator=torch.Generator().manual_seed(1))[rank::size]

    def loss(params: Params) -> torch.Tensor:
        return torch.func.functional_call(model, params, (data,)).square().mean() * width

    live = dict(model.named_parameters())
    loss(dict(live)).backward()  # what a training step takes is there already
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    report = measure(
        PlainProblem(live, loss),
        beta=0.01,
        curvature=CurvatureOptions(max_iter=products, tol=1e-12),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.save((peak - before, time.process_time() - began, report.lambda_max, report.hvps), f"{folder}/{size}-{rank}")
    dist.barrier()  # without it gloo can wait forever with torch 2.6 (pytorch #154976)
    dist.destroy_process_group()


def split(size: int, layers: int, width: int, products: int) -> list[tuple[int, float, float, int]]:
    """Measure on so many processes, and return what each found."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(measured, (size, folder, layers, width, products), nprocs=size, daemon=True)
        return [torch.load(Path(folder) / f"{size}-{rank}") for rank in range(size)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded_memory", description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--products", type=int, default=30)
    given = parser.parse_args()
    # Freed memory goes back to the system, so that the peak is what was in use at once.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    count = sum(value.numel() for value in network(given.layers, given.width).parameters())
    vector = 4 * count / 1024
    print(
        f"{count / 1e6:.1f}M parameters, a vector of {vector / 1024:.1f} MiB, {given.products} Krylov vectors, float32"
    )
    print("processes  vectors a process: measured (each)      formula  CPU s a process  lambda_max", flush=True)
    jobs = [partial(split, size, given.layers, given.width, given.products) for size in SIZES]
    for size, found in zip(SIZES, each_done(jobs, "a minute"), strict=True):
        each = "  ".join(f"{peak / vector:5.1f}" for peak, *_ in found)
        seconds = max(taken for _, taken, *_ in found)
        tops = {top for *_, top, _ in found}
        formula = (given.products + WORK) / size
        print(
            f"{size:9d}  {each:40s} {formula:7.1f}  {seconds:15.1f}  {', '.join(f'{top:.6g}' for top in sorted(tops))}",
            flush=True,
        )


if __name__ == "__main__":
    main()
