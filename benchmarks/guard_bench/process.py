"""The work of one process: a column with every remedy and under every guard."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.guard_bench.columns import Column
from benchmarks.guard_bench.guarded import ARMS, run_column
from benchmarks.guard_bench.remedies import train_column
from benchmarks.guard_bench.score import Run


def both(column: Column, options: dict[str, Any]) -> tuple[Column, list[Run], float]:
    """Train a column with every remedy and under every guard, in one process."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    remedies = train_column(column)
    guarded = run_column(column, tuple(ARMS), **options)
    runs = [
        Run(column, beta, {k: v[i] for k, v in remedies.items()}, {k: v[i] for k, v in guarded.items()})
        for i, beta in enumerate(column.betas)
    ]
    return column, runs, time.perf_counter() - began
