"""How a module runs over the tasks of a batch: vmapped, in chunks, or one after another."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from lightning_maml_guard.kernels.batched_stack import BatchedStack
from lightning_maml_guard.kernels.shared_weights import StackLosses
from lightning_maml_guard.maml.evaluation import loss_of_each
from lightning_maml_guard.maml.inner_loop import Params
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.utils.checks import check_count, shown
from lightning_maml_guard.utils.random_state import preserved_randomness
from lightning_maml_guard.utils.task_map import Strategy, TaskMap, is_listed, task_map
from lightning_maml_guard.utils.warnings import GuardWarning

ENVIRONMENT = "LMG_VECTORIZE"
Loss = Callable[[Tensor, Tensor], Tensor]


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


# Bytes that the forward passes of the tasks run at once may keep for their backward on a CPU. More is no faster: of 64
# tasks of a conv4, 8 at once take a fifth of the memory of all and, in a fit, a tenth more time; outside a fit less.
_KEPT_AT_ONCE = 2**26
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

    def __init__(self, asked: Strategy, network: nn.Module, batched: bool) -> None:
        self._asked = asked
        self._stack = BatchedStack(network) if batched else None
        self._agrees: bool | None = None  # the stack with the general path; None: not compared yet
        self._network = [network]  # in a list: not a second registration of the module
        self._chosen: Strategy | None = None
        self._is_sized = False  # whether the first batch was looked at
        self._loops_by_rule = False
        self._map = TaskMap()

    @property
    def tasks(self) -> TaskMap:
        """The map over the tasks; it remembers that vmap failed."""
        if self._chosen is None:
            self.choose(next(self._network[0].parameters()).device)
        return self._map

    def choose(self, device: torch.device) -> None:
        """Choose for a device: at first use, and again when a fit begins, maybe on another one."""
        given = from_environment() if self._asked == "auto" else self._asked
        strategy = given or rule(self._network[0], device)
        if strategy != self._chosen:
            self._chosen, self._map = strategy, task_map(strategy)
            self._is_sized = given is not None or device.type != "cpu"
            self._loops_by_rule = given is None and strategy == "loop"

    def task_losses(self, network: nn.Module, loss: Loss, batch: Any) -> Callable[[Params, Any], Tensor] | None:
        """Return the losses of several tasks at once where that needs no vmap: of a stack of plain layers."""
        stack = self._stack
        if stack is None or self._agrees is False or network is not self._network[0]:
            return None
        if self.tasks.looped and not self._loops_by_rule:
            return None
        if not all(map(_is_of_examples, batch)) or not stack.is_applicable:
            return None
        return StackLosses(stack, partial(loss_of_each, loss))

    def sized(self, problem: MetaProblem) -> MetaProblem:
        """Return the problem with as many tasks at once as fit the memory; looked at once, on the first batch.

        Only where all tasks would be run at once by the rule, on a CPU, or where they share their weights.
        """
        looped = self.tasks.looped
        if self._is_sized or is_listed(problem.support) or is_listed(problem.query):
            return problem
        if looped and not problem.shares_weights:
            return problem
        self._is_sized = True
        try:
            with preserved_randomness():
                kept = sum(_kept(problem, data) for data in (problem.support, problem.query))
        except Exception:  # of the batch: who computes with it next raises the same, with the words for it
            return problem
        at_once = max(1, int(_KEPT_AT_ONCE // max(kept, 1)))
        if at_once >= problem.tasks:
            return problem
        self._map = TaskMap(at_once, looped=looped)
        return replace(problem, task_chunk_size=at_once)

    def compared(self, problem: MetaProblem) -> MetaProblem:
        """Return the problem, without its ``task_losses`` if these are not what its ``task_loss`` says.

        They are compared once, on the first batch that both can compute.
        """
        if problem.task_losses is None or self._agrees or (problem.looped and not problem.shares_weights):
            return problem
        general = replace(problem, task_losses=None)
        try:
            with preserved_randomness():
                self._agrees = _agree(problem, general)
        except Exception:  # of the batch: who computes with it next raises the same, with the words for it
            if problem.looped:  # where tasks run side by side, the map over them remembers what it cannot do
                self._agrees = False
            return general
        if self._agrees is False:
            warnings.warn(
                "Running the tasks of a batch by batched matrix products gives another meta-gradient than running the "
                "network on each, so they are vmapped. Pass batched=False, and nothing is compared.",
                GuardWarning,
                stacklevel=3,
            )
        return problem if self._agrees else general


def _kept(problem: MetaProblem, data: Any) -> int:
    """Bytes that the loss of the first task keeps for its backward, beside the parameters and the data."""
    first = tree_map(lambda leaf: leaf[0], data)
    given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((problem.params, data))}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    params = {name: value.detach().requires_grad_() for name, value in problem.params.items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        problem.task_loss(params, first)
    return sum(size for address, size in storages.items() if address not in given)


def _is_of_examples(data: Any) -> bool:
    """Whether these are the tasks' ``(x, y)``, each ``x`` of at least two dimensions."""
    if is_listed(data) or not isinstance(data, (tuple, list)) or len(data) != 2:
        return False
    x, y = data
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() > 2 and x.is_floating_point()


def _agree(problem: MetaProblem, general: MetaProblem) -> bool | None:
    """Compare two ways to compute one meta-gradient; None where it is not finite."""
    tasks = TaskMap(looped=problem.looped, strict=True)
    found, expected = (meta_gradient(each, tasks=tasks) for each in (problem, general))
    pairs = [(found.losses, expected.losses), *((found.gradients[n], g) for n, g in expected.gradients.items())]
    squares = [[each.double().square().sum() for each in (own - other, other)] for own, other in pairs]
    distance, size = torch.stack([torch.stack(each) for each in squares]).sum(0).sqrt().tolist()  # one transfer
    if not math.isfinite(size):
        return None
    device = expected.losses.device.type
    mixed = torch.is_autocast_enabled(device)
    precision = torch.get_autocast_dtype(device) if mixed else expected.losses.dtype
    return bool(distance <= 10 * torch.finfo(precision).eps ** 0.5 * size)
