"""Time that the guard adds to a training: ``python -m benchmarks.guarded_training [sinusoid|omniglot|miniimagenet]``.

Checks are timed where they happen. Between checks the guard takes microseconds per step, less than the difference
between two runs of the same training. So one run has the guard among its callbacks in every second block of steps, and
the median step of a block is compared with those of its neighbours. An empty Lightning callback is measured the same
way, for comparison. ``sinusoid`` runs to its end (4000 steps). Whole runs of the image rows would take hours on a CPU.
There, the number of checks in the published 60,000 iterations follows from the guard's own count, and their time from
that of the first check and of later ones (printed as "computed"). ``--whole`` also alternates whole sinusoid runs with
and without the guard, with a second run without it as the control.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from itertools import islice, pairwise
from statistics import mean, median

import torch
from torch.utils.data import DataLoader

from benchmarks.common.lightning import TRAINER, quiet
from benchmarks.common.workers import each_done
from lightning_maml_guard import ConvergenceGuard, MetaLearningModule
from lightning_maml_guard.guard.schedule import Schedule
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.images import MiniImageNet, Omniglot
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import Callback, Trainer

ROWS = {
    "sinusoid": (mlp, lambda: Sinusoid(10, 10), 25, 0.01, 1, 4000),
    "omniglot": (conv4, lambda: Omniglot(n_way=5, k_shot=1, queries=1), 32, 0.4, 1, 40),
    "miniimagenet": (
        lambda: conv4(channels=3, filters=32, image_size=84),
        lambda: MiniImageNet(n_way=5, k_shot=1, queries=15),
        4,
        0.01,
        5,
        32,
    ),
}
BLOCKS = {"sinusoid": 40, "omniglot": 2, "miniimagenet": 2}
PUBLISHED = 60_000


class Clock:
    """Times the guard's checks."""

    def __init__(self, guard: ConvergenceGuard) -> None:
        self.checks: list[float] = []
        for name in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_train_end"):
            setattr(guard, name, self._timed(getattr(guard, name), guard))

    def _timed(self, hook: Callable[..., None], guard: ConvergenceGuard) -> Callable[..., None]:
        def timed(*args) -> None:
            known, began = len(guard.history), time.perf_counter()
            hook(*args)
            if len(guard.history) > known:
                self.checks.append(time.perf_counter() - began)

        return timed


class Alternation(Callback):
    """Times the steps of a run that has another callback in every second block."""

    def __init__(self, other: Callback, block: int) -> None:
        self.other, self.block = other, block
        self.starts: list[float] = []

    def on_train_batch_start(self, *args) -> None:
        self.starts.append(time.perf_counter())

    def on_train_batch_end(self, trainer, *args) -> None:
        trainer.callbacks = [self] if len(self.starts) // self.block % 2 else [self, self.other]

    def on_train_end(self, trainer, *args) -> None:
        trainer.callbacks = [self, self.other]

    def _took(self) -> list[float]:
        return [after - before for before, after in pairwise(self.starts)]

    def ratio(self) -> float:
        """Time of a step with the callback over that of one without it, median over the blocks."""
        took = self._took()
        blocks = [median(took[at : at + self.block]) for at in range(0, len(took) - self.block + 1, self.block)]
        return median(blocks[at] / mean((blocks[at - 1], blocks[at + 1])) for at in range(2, len(blocks) - 1, 2))

    def step(self) -> float:
        """Median seconds of a step without the callback."""
        return median(seconds for at, seconds in enumerate(self._took()) if at // self.block % 2)


def train(row: tuple, batches: list, steps: int, callbacks: list[Callback]) -> float:
    """Seconds of ``fit``."""
    network, _, _, alpha, inner_steps, _ = row
    torch.manual_seed(0)
    module = MetaLearningModule(network(), inner_lr=alpha, inner_steps=inner_steps)
    trainer = Trainer(max_steps=steps, callbacks=callbacks, **TRAINER)
    began = time.perf_counter()
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return time.perf_counter() - began


def whole_runs(row: tuple, batches: list, steps: int, turns: int) -> tuple[float, float]:
    """Median ratios of the times of whole runs: with the guard, and without it a second time."""
    arms: list[Callable[[], list[Callback]]] = [list, list, lambda: [ConvergenceGuard()]]
    taken: list[list[float]] = [[], [], []]
    for turn in range(turns):
        for arm in ((turn + place) % 3 for place in range(3)):
            taken[arm].append(train(row, batches, steps, arms[arm]()))
    plain, again, guarded = taken
    return (
        median(one / other for one, other in zip(guarded, plain, strict=True)),
        median(one / other for one, other in zip(again, plain, strict=True)),
    )


def published_checks(first: float, later: float) -> int:
    """Number of checks in the published iterations, if each costs what these two cost."""
    schedule, number = Schedule(100, 0.02), 0
    for index in range(PUBLISHED):
        if schedule.due(index) is not None:
            schedule.charge(lookahead_gradients=0, measured=later if number else first)
            schedule.state.unjudged = number == 0  # Adam's rate, before its first step
            number += 1
    return number


@cache
def batches_of(name: str, steps: int) -> list:
    """The batches of a row."""
    _, made, tasks, *_ = row = ROWS[name]
    family = made()
    family.setup()
    batches = [family.sample(tasks, episode_generator(0, "train", index), "train") for index in range(min(steps, 500))]
    train(row, batches, 2, [])  # the first run loads libraries and tries the vectorization strategies
    return batches


def turn(name: str, steps: int) -> tuple[float, ...]:
    """Time a run: its step, the first check, a later one, the number and share of checks, and between them."""
    row, batches = ROWS[name], batches_of(name, steps)
    guard = ConvergenceGuard()
    clock, alternation = Clock(guard), Alternation(guard, BLOCKS[name])
    train(row, batches, steps, [alternation, guard])
    plain, first = alternation.step(), clock.checks[0]  # includes the self-check of the second derivatives
    often = Clock(each := ConvergenceGuard(every_n_steps=1, action="log"))
    train(row, batches, 3, [each])
    later = median(often.checks[1:])
    empty = Alternation(Callback(), BLOCKS[name])
    train(row, batches, steps, [empty, empty.other])
    if name == "sinusoid":
        number, taken, all_steps = len(clock.checks), sum(clock.checks), steps
    else:
        number = published_checks(guard._run.state.schedule.latest, each._run.state.schedule.latest)
        taken, all_steps = first + (number - 1) * later, PUBLISHED
    return plain, first, later, number, taken / (all_steps * plain), alternation.ratio() - 1, empty.ratio() - 1


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guarded_training", description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the sinusoid row (default: 4000)")
    parser.add_argument("--whole", action="store_true", help="compare whole sinusoid runs as well")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet()
    torch.set_num_threads(2)
    print(
        "| training | step, ms | first check, steps | later check, steps | checks, of the run | between checks, of a step "
        "| an empty Callback, of a step | steps |"
    )
    print("|---|---|---|---|---|---|---|---|")
    sizes = {name: given.steps if given.steps and name == "sinusoid" else ROWS[name][5] for name in given.rows}
    jobs = [partial(turn, name, steps) for name, steps in sizes.items() for _ in range(given.turns)]
    done = each_done(jobs, "15 minutes with all rows")
    for name, steps in sizes.items():
        turns = list(islice(done, given.turns))
        plain, first, later, number, shares, between, limit = zip(*turns, strict=True)
        told = f"{steps}" if name == "sinusoid" else f"computed for {PUBLISHED}"
        print(
            f"| {name} | {1e3 * median(plain):.3g} | {median(first) / median(plain):.3g} | "
            f"{median(later) / median(plain):.3g} | {median(number):g}: {median(shares):.2%} | {median(between):.2%} ({min(between):.2%} to {max(between):.2%}) | {median(limit):.2%} | "
            f"{told} |",
            flush=True,
        )
        if given.whole and name == "sinusoid":
            guarded, control = whole_runs(ROWS[name], batches_of(name, steps), steps, given.turns)
            print(f"whole runs, guarded {guarded:.3f}, without the guard a second time {control:.3f}", flush=True)


if __name__ == "__main__":
    main()
