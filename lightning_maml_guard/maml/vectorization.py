"""How a module runs over the tasks of a batch: vmapped, in chunks, or one after another."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_maml_guard.utils.checks import check_count, shown
from lightning_maml_guard.utils.task_map import Strategy, TaskMap, task_map

ENVIRONMENT = "LMG_VECTORIZE"


def check_strategy(vectorize: Any, task_chunk_size: int | None) -> Strategy:
    """Return the strategy the two arguments name, ``"auto"`` among them; raise if they name none or contradict."""
    if not isinstance(vectorize, str):
        check_count("vectorize", vectorize)
    elif vectorize not in {"auto", "loop", "all"}:
        raise ValueError(
            f"Expected argument `vectorize` to be 'auto', 'loop', 'all' or a number of tasks but got "
            f"{shown(vectorize)}. 'auto' chooses by the network and the device."
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


# Entries of a layer's weights from which a CPU runs over the tasks one after another: a task's own weights then fill
# the core's cache. Measured on networks on either side of it, this was within 10 % of the fastest strategy.
_LARGE_LAYER = 200_000


def rule(network: nn.Module, device: torch.device) -> Strategy:
    """Return ``"loop"`` for a network with a large layer on a CPU, else ``"all"``."""
    sizes = [value.numel() for value in network.parameters() if value.requires_grad and not is_lazy(value)]
    return "loop" if device.type == "cpu" and max(sizes, default=0) >= _LARGE_LAYER else "all"


def from_environment() -> Strategy | None:
    """Return what ``LMG_VECTORIZE`` sets in place of ``vectorize="auto"``; None for the rule."""
    value = os.environ.get(ENVIRONMENT, "")
    if value.isdecimal() and int(value) > 0:
        return int(value)
    if value not in {"", "rule", "loop", "all"}:
        raise ValueError(
            f"Expected the environment variable {ENVIRONMENT} to be 'rule', 'loop', 'all' or a number of tasks but got "
            f"{value!r}. Correct or unset it."
        )
    return value if value in {"loop", "all"} else None


class Vectorization:
    """How one module runs over the tasks of a batch."""

    def __init__(self, asked: Strategy, network: nn.Module) -> None:
        self._asked = asked
        self._network = [network]  # in a list: not a second registration of the module
        self._chosen: Strategy | None = None
        self._map = TaskMap()

    @property
    def tasks(self) -> TaskMap:
        """The map over the tasks; it remembers that vmap failed."""
        if self._chosen is None:
            self.choose(next(self._network[0].parameters()).device)
        return self._map

    def choose(self, device: torch.device) -> None:
        """Choose for a device: at first use, and again when a fit begins, maybe on another one."""
        strategy = self._asked
        if strategy == "auto":
            strategy = from_environment() or rule(self._network[0], device)
        if strategy != self._chosen:
            self._chosen, self._map = strategy, task_map(strategy)
