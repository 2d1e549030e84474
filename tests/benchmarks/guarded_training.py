"""What the guard adds to a training, end to end: ``python -m tests.benchmarks.guarded_training [sinusoid|omniglot|miniimagenet]``.

Trainer runs with and without ``ConvergenceGuard()`` take turns. ``sinusoid`` is run to the end (4000 steps) as it is; a
whole run of the image rows would take hours on a CPU, so there a training step and a check are timed in short runs, and
the checks of the published 60,000 iterations follow from the guard's own count (printed as "computed").
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, MetaLearningModule
from lightning_maml_guard._lightning import Trainer
from lightning_maml_guard.guard.budget import PRODUCT, Budget
from lightning_maml_guard.guard.lookout import Lookout
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.images import MiniImageNet, Omniglot
from lightning_maml_guard.tasks.regression import Sinusoid
from tests.helpers import QUIET

ROWS = {
    "sinusoid": (mlp, lambda: Sinusoid(10, 10), 25, 0.01, 1, 4000),
    "omniglot": (conv4, lambda: Omniglot(n_way=5, k_shot=1, queries=1), 32, 0.4, 1, 8),
    "miniimagenet": (
        lambda: conv4(channels=3, filters=32, image_size=84),
        lambda: MiniImageNet(n_way=5, k_shot=1, queries=15),
        4,
        0.01,
        5,
        6,
    ),
}
PUBLISHED = 60_000


class Clock:
    """Adds up what the guard's hooks take."""

    def __init__(self, guard: ConvergenceGuard) -> None:
        self.checks: list[float] = []
        self.seconds = 0.0
        for name in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_train_end"):
            setattr(guard, name, self._timed(getattr(guard, name), guard))

    def _timed(self, hook: Callable[..., None], guard: ConvergenceGuard) -> Callable[..., None]:
        def timed(*args) -> None:
            known, began = len(guard.history), time.perf_counter()
            hook(*args)
            took = time.perf_counter() - began
            self.seconds += took
            if len(guard.history) > known:
                self.checks.append(took)

        return timed


def train(row: tuple, batches: list, steps: int, guard: ConvergenceGuard | None) -> float:
    """Seconds of ``fit``."""
    network, _, _, alpha, inner_steps, _ = row
    torch.manual_seed(0)
    module = MetaLearningModule(network(), inner_lr=alpha, inner_steps=inner_steps)
    trainer = Trainer(
        max_steps=steps,
        **QUIET,
        callbacks=[guard] if guard else [],
    )
    began = time.perf_counter()
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return time.perf_counter() - began


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.guarded_training", description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the sinusoid row (default: 4000)")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    print("| training | step, ms | first check, steps | checks | x without the guard | of it checks, reading |")
    print("|---|---|---|---|---|---|")
    for name in given.rows:
        row = ROWS[name]
        steps = given.steps if given.steps and name == "sinusoid" else row[5]
        family = row[1]()
        family.setup()
        batches = [
            family.sample(row[2], episode_generator(0, "train", index), "train") for index in range(min(steps, 500))
        ]
        train(row, batches, 2, None)  # what a first run pays alone: the trial of the strategies, too
        plain, ratios, first, number, checks, reading, products = [], [], [], [], [], [], 0.0
        for _ in range(given.turns):
            seconds = train(row, batches, steps, None)
            guard = ConvergenceGuard()
            clock = Clock(guard)
            ratios.append(train(row, batches, steps, guard) / seconds)
            plain.append(seconds / steps)
            first.append(clock.checks[0])  # self-check of the second derivatives included
            number.append(len(clock.checks))
            checks.append(sum(clock.checks) / seconds)
            reading.append((clock.seconds - sum(clock.checks)) / seconds)
            products = guard._run.lookout.budget._latest
        step = median(plain)
        if name == "sinusoid":
            told = f"{median(ratios):.3f} ({steps} steps) | {median(checks):.1%}, {median(reading):.2%}"
        else:
            lookout = Lookout(100, Budget(0.02))
            number = [0]
            for index in range(PUBLISHED):
                if lookout.due(index) is not None:
                    lookout.budget.charge(trial_steps=0, products=products / PRODUCT)
                    number[0] += 1
            share = number[0] * median(first) / (PUBLISHED * step)
            told = f"computed for {PUBLISHED} steps | {share:.1%}, {median(reading):.2%}"
        print(f"| {name} | {1e3 * step:.3g} | {median(first) / step:.3g} | {median(number):g} | {told} |", flush=True)


if __name__ == "__main__":
    main()
