"""Which units of a network are dead: their ReLU is 0 on all of a batch, so no gradient reaches what feeds them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lightning_maml_guard.utils.functorch import inside_transform

_RELU_LIKE = frozenset(
    {
        *(F.relu, F.relu6, F.threshold),
        *(torch.relu, torch.relu_, torch.threshold, torch.threshold_),
        *(Tensor.relu, Tensor.relu_),
    }
)


class DeadUnits(NamedTuple):
    """How many units are dead.

    Attributes:
        dead: Units that are 0 on all data.
        units: All units.
        blocked: Whether all units of some activation are dead.
    """

    dead: int
    units: int
    blocked: bool

    @property
    def most(self) -> bool:
        """Whether at least half of the units are dead, or all of one activation."""
        return self.units > 0 and (self.blocked or 2 * self.dead >= self.units)


class ReluUnits(TorchFunctionMode):
    """Notes, while it is on, which units of ReLU-like activations were ever above 0, of modules and of plain calls.

    A unit is a channel of an image, else every entry but for the first dimension, the examples'. An activation is the
    n-th one that a module's call computes; outside of modules, the n-th of an evaluation (:meth:`restart`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[tuple[Any, ...], Tensor] = {}
        # The modules being called, the innermost last, each with the number of activations its call has computed.
        self._calls: list[list[int]] = [[0, 0]]
        self._hooks = ExitStack()

    def restart(self) -> None:
        """Begin another evaluation of the same network."""
        self._calls = [[0, 0]]

    def count(self) -> DeadUnits:
        """Count the units that were 0 throughout."""
        alive = list(self._alive.values())
        dead = sum(int((~each).sum()) for each in alive)
        return DeadUnits(dead, sum(each.numel() for each in alive), any(not bool(each.any()) for each in alive))

    def __enter__(self) -> ReluUnits:
        entering = register_module_forward_pre_hook(lambda module, _: self._calls.append([id(module), 0]))
        self._hooks.callback(entering.remove)
        leaving = register_module_forward_hook(lambda *_: self._leave_call(), always_call=True)
        self._hooks.callback(leaving.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        rectifies = func in _RELU_LIKE or (func is F.hardtanh and _hardtanh_minimum(*args[1:], **kwargs) == 0)
        # Inside a transform of torch.func values cannot be read.
        if rectifies and isinstance(result, Tensor) and result.dim() > 1 and not inside_transform():
            self._note(result.detach() > 0)
        return result

    def _note(self, positive: Tensor) -> None:
        call = self._calls[-1]
        examples = (0, *range(2, positive.dim())) if positive.dim() > 3 else (0,)
        alive = positive.any(examples[0]) if len(examples) == 1 else positive.sum(examples) > 0
        place = (*call, alive.shape)
        call[1] += 1
        self._alive[place] = self._alive[place] | alive if place in self._alive else alive

    def _leave_call(self) -> None:
        if len(self._calls) > 1:
            self._calls.pop()


def _hardtanh_minimum(min_val: float = -1.0, *_: Any, **__: Any) -> float:
    return min_val
