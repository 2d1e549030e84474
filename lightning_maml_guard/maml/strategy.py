"""How to run over the tasks of a batch: vmapped, in chunks, or one after another; found by trying."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from lightning_maml_guard._checks import check_count, shown
from lightning_maml_guard._folders import user_cache
from lightning_maml_guard._randomness import preserved_randomness
from lightning_maml_guard._vectorize import TaskMap
from lightning_maml_guard.maml.problem import MetaProblem

# "all": vmapped at once; "loop": one after another; a number: vmapped so many at once.
Strategy = str | int

ENVIRONMENT = "LMG_VECTORIZE"
_CHUNKS = (2, 4, 8, 16, 32)
# The whole trial's, after which nothing new is begun; one candidate's, after which it is not repeated.
_SECONDS, _ENOUGH, _REPEATS = 15.0, 1.0, 3
# In float32 a rectified or pooled network's gradient jumps where a kink lies within rounding.
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 5e-2}

Gradients = Callable[[TaskMap], dict[str, Tensor]]


def check_strategy(vectorize: Any, task_chunk_size: int | None) -> Strategy:
    """Refuse what names no strategy.

    Args:
        vectorize: ``"auto"``, ``"loop"``, ``"all"`` or a number of tasks.
        task_chunk_size: Tasks vmapped at once; None where nothing was said.

    Returns:
        The strategy, ``"auto"`` among them.

    Raises:
        ValueError: If it is none of these, or if the two arguments contradict each other.
    """
    if not isinstance(vectorize, str):
        check_count("vectorize", vectorize)
    elif vectorize not in {"auto", "loop", "all"}:
        raise ValueError(
            f"Expected argument `vectorize` to be 'auto', 'loop', 'all' or a number of tasks but got "
            f"{shown(vectorize)}. 'auto' tries them at the start of training and keeps the fastest."
        )
    if task_chunk_size is None:
        return vectorize
    check_count("task_chunk_size", task_chunk_size)
    if vectorize not in {"auto", task_chunk_size}:
        raise ValueError(
            f"Expected one of `vectorize` and `task_chunk_size` but got {vectorize!r} and {task_chunk_size!r}, which "
            "say different things. Leave one out."
        )
    return task_chunk_size


def task_map(strategy: Strategy, strict: bool = False) -> TaskMap:
    """Make the map of a strategy.

    Args:
        strategy: ``"loop"``, ``"all"`` or a number of tasks.
        strict: Raise where vmap fails, instead of looping.

    Returns:
        The map.
    """
    return TaskMap(None if isinstance(strategy, str) else strategy, looped=strategy == "loop", strict=strict)


def rule(network: nn.Module, device: torch.device) -> Strategy:
    """Guess the strategy: convolutions on a CPU are slow with a filter a task, all else gains from fewer calls.

    Args:
        network: The network.
        device: Where it runs.

    Returns:
        ``"loop"`` or ``"all"``.
    """
    convolves = any(isinstance(part, _ConvNd) for part in network.modules())
    return "loop" if convolves and device.type == "cpu" else "all"


def told() -> Strategy | None:
    """Read what the environment asks for: ``LMG_VECTORIZE`` decides where ``vectorize="auto"`` would try.

    Returns:
        The strategy; ``"rule"`` for the guess; None where nothing is said.

    Raises:
        ValueError: If it names no strategy.
    """
    value = os.environ.get(ENVIRONMENT, "")
    if value.isdecimal() and int(value) > 0:
        return int(value)
    if value not in {"", "rule", "loop", "all"}:
        raise ValueError(
            f"Expected the environment variable {ENVIRONMENT} to be 'rule', 'loop', 'all' or a number of tasks but got "
            f"{value!r}. Correct or unset it."
        )
    return value or None


def signature(problem: MetaProblem, label: str) -> str:
    """Name what the choice depends on: machine, torch, shapes, and how MAML is configured.

    Args:
        problem: The problem.
        label: Names the network and the code around it.

    Returns:
        A short hexadecimal number.
    """
    tensors = [*problem.params.values(), *tree_leaves(problem.support), *tree_leaves(problem.query)]
    device = tensors[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    facts = [torch.__version__, str(device.type), name, torch.get_num_threads(), label, problem.order]
    facts += [problem.inner_steps, problem.uniform, [[str(each.dtype), *each.shape] for each in tensors]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def remembered(key: str) -> Strategy | None:
    """Look a choice up that was made on this machine before.

    Args:
        key: The signature.

    Returns:
        The strategy; None if there is none.
    """
    try:
        found = json.loads(_file().read_text()).get(key)
    except (OSError, RuntimeError, ValueError, AttributeError):  # no file or no home, or damaged: decided anew
        return None
    if isinstance(found, str):
        return found if found in {"loop", "all"} else None
    return found if type(found) is int and found > 0 else None


def remember(key: str, strategy: Strategy) -> None:
    """Write a choice down, so that the next run with this signature is the same to the last bit.

    Args:
        key: The signature.
        strategy: The choice.
    """
    try:
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        handle, temporary = tempfile.mkstemp(suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({**(known if isinstance(known, dict) else {}), key: strategy}, file, indent=0)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)  # gone, unless something failed
    except (OSError, RuntimeError):  # nowhere to write: the next run tries again
        return


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


def _file() -> Path:
    return user_cache() / "vectorize.json"


class Vectorization:
    """The strategy of one module, and how it came about.

    Args:
        strategy: ``"auto"``, ``"loop"``, ``"all"`` or a number of tasks.
        network: The network.
        label: Names network and module in the cache.
    """

    def __init__(self, strategy: Strategy, network: nn.Module, label: str) -> None:
        self.asked, self._label = strategy, label
        self._open = strategy == "auto"
        self._network = [network]  # in a list: not a second registration of the module
        # The signature a choice was made for, and the choice.
        self.chosen: tuple[str, Strategy] | None = None
        self._strategy = strategy
        self._map: TaskMap | None = None

    @property
    def tasks(self) -> TaskMap:
        """How to run over the tasks, as far as is known."""
        if self._map is None:
            strategy = self._strategy
            if strategy == "auto":
                strategy = rule(self._network[0], next(self._network[0].parameters()).device)
            self._map = task_map(strategy)
        return self._map

    def reopen(self) -> None:
        """Decide at the next batch: a fit begins, maybe on another device or with other batches."""
        self._open = self.asked == "auto"

    def decide(self, problem: MetaProblem, gradients: Gradients) -> str | None:
        """Decide, if that is still to be done.

        Args:
            problem: The problem of the first batch.
            gradients: Computes its mean meta-gradient by a map.

        Returns:
            What to tell the user; None where nothing was decided.
        """
        if not self._open:
            return None
        self._open = False
        asked = told()
        key = signature(problem, self._label)
        found: Strategy
        seen: str | None
        if asked is not None or torch.are_deterministic_algorithms_enabled():
            # Whoever asks for determinism wants no choice that a clock makes.
            found, seen = ("auto" if asked is None or asked == "rule" else asked), None
        elif self.chosen is not None and self.chosen[0] == key:
            found, seen = self.chosen[1], None
        else:
            known, seen = remembered(key), None
            if known is None:
                known, seen = fastest(gradients, problem.tasks)
                remember(key, known)
            found, self.chosen = known, (key, known)
        self._strategy, self._map = found, None
        words = {"all": "all tasks at once", "loop": "one task after another"}.get(str(found), f"{found} tasks at once")
        return seen and f"MetaLearningModule runs {words}, the fastest of: {seen}. vectorize={found!r} fixes that."
