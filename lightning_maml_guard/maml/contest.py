"""Which strategy is the fastest on one batch, found by trying."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_maml_guard.utils.random_state import preserved_randomness
from lightning_maml_guard.utils.task_map import Strategy, TaskMap, task_map

_CHUNKS = (2, 4, 8, 16, 32)
# The whole trial's, after which nothing new is begun; one candidate's, after which it is not repeated.
_SECONDS, _ENOUGH, _REPEATS = 15.0, 1.0, 3
# In float32 a rectified or pooled network's gradient jumps where a kink lies within rounding.
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 5e-2}

Gradients = Callable[[TaskMap], dict[str, Tensor]]


def fastest(gradients: Gradients, tasks: int, clock: Callable[[], float] = time.perf_counter) -> tuple[Strategy, str]:
    """Try the strategies on one batch, and keep the fastest whose gradient is the loop's.

    The random states are put back. A candidate is run once to warm up and up to three times more, within a second;
    what has not begun after fifteen is left out.

    Args:
        gradients: Computes the batch's mean meta-gradient by a map.
        tasks: Tasks in the batch.
        clock: Tells seconds.

    Returns:
        The strategy, and what was seen, in words.
    """
    with preserved_randomness():
        return _Trial(gradients, clock).choose(tasks)


class _Trial:
    def __init__(self, gradients: Gradients, clock: Callable[[], float]) -> None:
        self._gradients, self._clock = gradients, clock
        self._began = clock()
        self._reference: dict[str, Tensor] | None = None
        self.seconds: dict[Strategy, float] = {}
        self.notes: dict[Strategy, str] = {}

    def choose(self, tasks: int) -> tuple[Strategy, str]:
        self._try("loop")
        if tasks > 1:
            self._try("all")
        # From the middle on towards the better end: times fall and rise once over the sizes.
        chunks = [size for size in _CHUNKS if size < tasks]
        middle = [size for size in chunks if size == min(chunks, key=lambda each: abs(each - 8))]
        for size in middle:
            self._try(size)
        for side in (
            [size for size in chunks if middle and size > middle[0]],
            [size for size in reversed(chunks) if middle and size < middle[0]],
        ):
            last = self.seconds.get(middle[0], math.inf) if middle else math.inf
            for size in side:
                self._try(size)
                found = self.seconds.get(size, math.inf)
                if found > last:
                    break
                last = found
        best = self._best()
        seen = [f"{name} {1e3 * value:.3g} ms" for name, value in self.seconds.items()]
        return best, ", ".join(seen + [f"{name} {note}" for name, note in self.notes.items()])

    def _best(self) -> Strategy:
        return min(self.seconds, key=lambda each: self.seconds[each])

    def _try(self, strategy: Strategy) -> None:
        if self.seconds and self._clock() - self._began > _SECONDS:
            self.notes[strategy] = "not tried"
            return
        try:
            first, found = self._run(strategy, 0)
            times = []
            if strategy == "loop":
                # Seeded otherwise: what dropout makes of it cannot be compared between strategies.
                again, other = self._run(strategy, 1)
                times, self._reference = [again], found if _close(found, other) else None
            elif self._reference is not None and not _close(found, self._reference):
                self.notes[strategy] = "gives another gradient"
                return
            # At least once more: what a first run loads and allocates says nothing about the second.
            while len(times) < _REPEATS and first + sum(times) < _ENOUGH and not self._hopeless(times):
                times.append(self._run(strategy, 0)[0])
        except Exception as error:
            if strategy == "loop":
                raise  # the user's own
            # Not every function can be vmapped, and not every batch fits at once.
            self.notes[strategy] = f"fails ({type(error).__name__})"
            return
        self.seconds[strategy] = min(times or [first])  # the first one warms up

    def _hopeless(self, times: list[float]) -> bool:
        return bool(self.seconds and times) and min(times) > 3 * min(self.seconds.values())

    def _run(self, strategy: Strategy, seed: int) -> tuple[float, dict[str, Tensor]]:
        torch.manual_seed(seed)
        began = self._clock()
        found = self._gradients(task_map(strategy, strict=True))
        # A queued computation is not done: reading a number waits for it.
        float(sum(each.reshape(-1)[:1].sum() for each in found.values()))
        return self._clock() - began, found


def _close(found: dict[str, Tensor], reference: dict[str, Tensor]) -> bool:
    gap = math.sqrt(sum(float((found[name] - each).double().square().sum()) for name, each in reference.items()))
    size = math.sqrt(sum(float(each.double().square().sum()) for each in reference.values()))
    dtype = next(iter(reference.values())).dtype
    return not math.isfinite(size) or gap <= _AGREEMENT.get(dtype, 0.2) * size
