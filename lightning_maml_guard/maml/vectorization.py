"""How a module runs over the tasks of a batch: vmapped, in chunks, or one after another."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_maml_guard.maml.choices import remember, remembered, signature
from lightning_maml_guard.maml.contest import Gradients, fastest
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.utils.checks import check_count, shown
from lightning_maml_guard.utils.task_map import Strategy, TaskMap, task_map

ENVIRONMENT = "LMG_VECTORIZE"


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
        seen = None
        asked = told()
        if asked is not None or torch.are_deterministic_algorithms_enabled():
            # Whoever asks for determinism wants no choice that a clock makes.
            self._strategy = "auto" if asked is None or asked == "rule" else asked
        else:
            key = signature(problem, self._label)
            if self.chosen is None or self.chosen[0] != key:
                found = remembered(key)
                if found is None:
                    found, seen = fastest(gradients, problem.tasks)
                    remember(key, found)
                self.chosen = key, found
            self._strategy = self.chosen[1]
        self._map, found = None, self._strategy
        words = {"all": "all tasks at once", "loop": "one task after another"}.get(str(found), f"{found} tasks at once")
        return seen and f"MetaLearningModule runs {words}, the fastest of: {seen}. vectorize={found!r} fixes that."
