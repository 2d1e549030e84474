"""Lower bound of a step's time (roofline): its convolution or matrix FLOPs at the measured peak, plus memory traffic."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from benchmarks.meta_step.rows import Row


def measured_peak(device: torch.device) -> float:
    """FLOP/s of the fastest of a few convolutions and a matrix product, the best of many runs."""
    x = torch.randn(5, 64, 14, 14, device=device).contiguous(memory_format=torch.channels_last)
    more, w, a = x.repeat(16, 1, 1, 1), torch.randn(64, 64, 3, 3, device=device), torch.randn(1024, 1024, device=device)
    conv = 2 * 196 * 576 * 64
    return max(
        _rate(lambda: F.conv2d(x, w, padding=1), 5 * conv, device),
        _rate(lambda: F.conv2d(more, w, padding=1), 80 * conv, device),
        _rate(lambda: a @ a, 2 * 1024**3, device),
    )


def _rate(work, flops: float, device: torch.device) -> float:
    best = float("inf")
    for _ in range(40):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return flops / best


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy that does not fit the caches."""
    a = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return _rate(lambda: b.copy_(a), 2.0 * a.numel(), device)


def step_flops(row: Row) -> float:
    """FLOPs of one exact meta-training step; see :func:`limit_seconds`."""
    way = max(row.way, 1)
    support, query = row.tasks * way * row.shots, row.tasks * way * row.queries
    return row.flops * (9 * row.inner_steps * support + 3 * query)


def limit_seconds(row: Row, peak: float, device: torch.device) -> float:
    """The limit of one exact meta-training step.

    A forward pass costs ``F`` FLOPs an example, its gradient ``2F``. An inner step is a forward pass and a gradient
    (``3F``) and, to be differentiated, its double backward and the backward through the forward pass (``6F``); the
    query is ``3F``. Traffic: every pass reads and writes a block's input and output once, nothing else.
    """
    way = max(row.way, 1)
    support, query = row.tasks * way * row.shots, row.tasks * way * row.queries
    traffic = 0.0
    if len(row.example) == 3:
        channels, size, _ = row.example
        filters = row.network().features[0].out_channels
        for _ in range(4):
            traffic += 4 * (channels * size**2 + filters * size**2 + filters * (size // 2) ** 2)
            channels, size = filters, size // 2
    else:
        traffic = 4 * 40 * 4.0
    passes = 4 * row.inner_steps * support + 2 * query
    return step_flops(row) / peak + passes * traffic / bandwidth(device)
