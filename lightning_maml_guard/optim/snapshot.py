"""A copy of parameters, buffers and optimizer state, to roll back to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Snapshot:
    """A copy of a module's parameters and buffers and of its optimizers' state; schedules are not part of it.

    It is kept on ``device``; None keeps every tensor where it is.
    """

    def __init__(
        self, module: nn.Module, optimizers: Sequence[Optimizer], step: int, device: torch.device | str | None = None
    ) -> None:
        self.step = step
        self._tensors = [_kept(tensor, device) for tensor in _tensors(module)]
        self._states = [
            [{key: _kept(value, device) for key, value in optimizer.state.get(p, {}).items()} for p in _held(optimizer)]
            for optimizer in optimizers
        ]
        # Adam counts its steps on the host whatever its parameters' device is.
        self._homes = {
            (parameter, key): value.device
            for optimizer in optimizers
            for parameter in _held(optimizer)
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def state(self) -> dict[str, Any]:
        """Return the copy for a checkpoint: tensors, and whatever else the optimizers keep."""
        return {"step": self.step, "tensors": list(self._tensors), "states": self._states}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Snapshot:
        """Make a snapshot from what :meth:`state` returned."""
        snapshot = object.__new__(cls)
        snapshot.step, snapshot._tensors, snapshot._states = state["step"], state["tensors"], state["states"]
        snapshot._homes = {}
        return snapshot

    @contextmanager
    def visited(
        self, module: nn.Module, optimizers: Sequence[Optimizer], device: torch.device | str | None = None
    ) -> Iterator[None]:
        """Put the copies back, and undo that at the end; until then what is there is kept on ``device``."""
        now = Snapshot(module, optimizers, self.step, device)
        try:
            self.restore(module, optimizers)
            yield
        finally:
            now.restore(module, optimizers)

    @torch.no_grad()
    def restore(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Put the copies back, in place where a tensor is still there.

        Raises a ValueError, and puts nothing back, if module or optimizers hold other tensors than when it was made.
        """
        held = [[value.shape for value in _tensors(module)], *[len(_held(optimizer)) for optimizer in optimizers]]
        if held != [[value.shape for value in self._tensors], *[len(states) for states in self._states]]:
            raise ValueError(f"the module or its optimizers hold other tensors than at step {self.step}")
        for tensor, saved in zip(_tensors(module), self._tensors, strict=True):
            tensor.copy_(saved)
        for optimizer, states in zip(optimizers, self._states, strict=True):
            for parameter, saved in zip(_held(optimizer), states, strict=True):
                if not saved:
                    optimizer.state.pop(parameter, None)
                    continue
                live = optimizer.state[parameter]
                for key in set(live) - set(saved):
                    del live[key]
                for key, value in saved.items():
                    if isinstance(value, Tensor) and isinstance(live.get(key), Tensor):
                        live[key].copy_(value)
                    elif isinstance(value, Tensor):
                        live[key] = value.to(self._homes.get((parameter, key), parameter.device), copy=True)
                    else:
                        live[key] = copy.copy(value)


def finite(module: nn.Module) -> bool:
    """Return True if every parameter is finite."""
    return all(bool(torch.isfinite(each).all()) for each in module.parameters())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _kept(value: Any, device: torch.device | str | None) -> Any:
    if not isinstance(value, Tensor):
        return copy.copy(value)
    return value.detach().to(value.device if device is None else device, copy=True)
