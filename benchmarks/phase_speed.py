"""Speed of a vmapped grid of trainings against separate runs: ``python -m benchmarks.phase_speed``.

Trains a 16 x 16 grid of sinusoid runs as one program, and 4 of its 256 points with a Trainer each, in turns. Prints the
time of 256 such runs divided by that of the grid, and how far the final errors of these points differ.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial

import numpy as np
import torch
from torch.optim import SGD
from torch.utils.data import DataLoader

from benchmarks.common.lightning import TRAINER, quiet
from benchmarks.common.workers import each_done
from lightning_maml_guard import MetaLearningModule, phase_diagram
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import Trainer

POINTS = ((1, 2), (12, 4), (4, 9), (9, 6))


def module(alpha: float, beta: float) -> MetaLearningModule:
    torch.manual_seed(0)
    return MetaLearningModule(mlp(), inner_lr=alpha, optimizer=lambda params: SGD(params, lr=beta))


def run(alpha: float, beta: float, batches: list, judged) -> tuple[float, float]:
    """Seconds of one Trainer run, and its final error."""
    one = module(alpha, beta)
    trainer = Trainer(max_epochs=1, **TRAINER)
    began = time.perf_counter()
    trainer.fit(one, DataLoader(batches, batch_size=None))
    seconds = time.perf_counter() - began
    return seconds, float(meta_gradient(one.meta_problem(judged)).losses.mean())


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.phase_speed", description=__doc__)
    parser.add_argument("--tasks", type=int, default=4, help="tasks per meta-batch (Finn et al.: 25)")
    parser.add_argument("--shots", type=int, default=5, help="support and query points per task (Finn et al.: 10)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2, help="turns of grid and 4 runs")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    quiet()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    family = Sinusoid(given.shots, given.shots)
    batches = [family.sample(given.tasks, episode_generator(0, "train", step)) for step in range(given.steps)]
    alphas, betas = np.logspace(-3, -1, 16), np.logspace(-4, -1, 16)
    start = module(0.01, 0.01)
    problems = [start.meta_problem(batch) for batch in batches]
    grids, singles, gaps = [], [], []
    run(alphas[0], betas[0], batches[:3], batches[0])  # the first run loads libraries

    def whole() -> tuple[float, np.ndarray]:
        began = time.perf_counter()
        found = phase_diagram(lambda step: problems[step], alphas, betas, given.steps, measure_every=0, progress=False)
        return time.perf_counter() - began, found.final

    own = [partial(run, float(alphas[column]), float(betas[row]), batches, batches[0]) for column, row in POINTS]
    done = each_done([whole, *own] * given.rounds, "half a minute, some minutes with --tasks 25 --shots 10")
    for seconds, final in done:
        grids.append(seconds)
        for (column, row), (seconds, error) in zip(POINTS, done, strict=False):
            singles.append(seconds)
            gaps.append(abs(final[column, row] / error - 1))
    grid, single = float(np.median(grids)), float(np.median(singles))
    print(
        f"sinusoid, 1-40-40-1, {given.tasks} tasks of {given.shots} + {given.shots} points, {given.steps} steps, float32, "
        f"{given.threads} thread(s)\n"
        f"grid of 256 runs: {grid:.2f} s   one Trainer run: {single:.3f} s   256 of them: {256 * single:.1f} s\n"
        f"ratio {256 * single / grid:.1f}   largest relative difference of a final error {max(gaps):.1e}"
    )


if __name__ == "__main__":
    main()
