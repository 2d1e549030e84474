"""What a rollback restores beside the optimizers: a module, and the averages of its weights that callbacks keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class HoldsTensors(Protocol):
    """A module, or what holds tensors as one does."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train."""

    def buffers(self) -> Iterator[Tensor]:
        """The other tensors."""


class ModuleWithAverages:
    """A module with the averages of its weights that others keep (EMA), which what ruins the weights ruins as well.

    An average is a module that a holder has as an attribute, with parameters of the same shapes.
    """

    # StochasticWeightAveraging counts in a tensor beside its average, None before the first.
    _COUNT = "n_averaged"

    def __init__(self, module: nn.Module, holders: Sequence[Any]) -> None:
        own, shapes = {id(part) for part in module.modules()}, _shapes(module)
        self._module = module
        self._averages: dict[nn.Module, Any] = {
            each: holder
            for holder in holders
            for each in vars(holder).values()
            if isinstance(each, nn.Module) and id(each) not in own and _shapes(each) == shapes
        }

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's parameters."""
        return self._module.parameters()

    def buffers(self) -> Iterator[Tensor]:
        """The module's buffers, and all tensors of the averages."""
        yield from self._module.buffers()
        for each, holder in self._averages.items():
            yield from each.parameters()
            yield from each.buffers()
            count = getattr(holder, self._COUNT, None)
            yield count if isinstance(count, Tensor) else torch.zeros((), dtype=torch.long)


def rollback_state(trainer: Any, module: nn.Module, averages: bool) -> tuple[HoldsTensors, list[Optimizer]]:
    """What a run's snapshots hold: its module, with the averages of callbacks if so, and its optimizers."""
    return ModuleWithAverages(module, trainer.callbacks) if averages else module, trainer.optimizers


def _shapes(module: nn.Module) -> list[Any]:
    return [each.shape for each in module.parameters()]
