"""Copies of parameters, buffers and optimizer state, to roll back to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_maml_guard.optim.rollback_state import HoldsTensors
from lightning_maml_guard.utils.shards import local, split_like

# Copies that are kept: at most so many, and no more than two where that takes more bytes.
_MOST, _BYTES = 5, 2**28
# Steps between two copies: a share of the steps so far, at least some, and more where copies are that large.
_SHARE, _LEAST, _LEAST_LARGE = 0.02, 4, 32


class Snapshot:
    """A copy of a module's parameters and buffers and of its optimizers' state; schedules are not part of it.

    It is kept on ``device``; None keeps every tensor where it is. ``progress``: the steps that led there, which are
    fewer than ``step`` after a rollback. ``alpha``: the inner rate applied there; ``nan`` where it is not known.
    """

    def __init__(
        self, module: HoldsTensors, optimizers: Sequence[Optimizer], step: int, device: torch.device | str | None = None
    ) -> None:
        self.step = self.progress = step
        self.alpha = math.nan
        optimizers = _with_wrapped(optimizers)
        self._tensors = [_kept(tensor, device) for tensor in _tensors(module, optimizers)]
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
        held = {"tensors": list(self._tensors), "states": self._states}
        return {"step": self.step, "progress": self.progress, "alpha": self.alpha, **held}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Snapshot:
        """Make a snapshot from what :meth:`state` returned."""
        snapshot = object.__new__(cls)
        snapshot.step, snapshot._tensors, snapshot._states = state["step"], state["tensors"], state["states"]
        snapshot.progress, snapshot._homes = state.get("progress", snapshot.step), {}
        snapshot.alpha = state.get("alpha", math.nan)
        return snapshot

    @cached_property
    def bytes(self) -> int:
        """Memory that the copy takes."""
        saved = [value for states in self._states for each in states for value in each.values()]
        return sum(each.nbytes for each in (*self._tensors, *saved) if isinstance(each, Tensor))

    @torch.no_grad()
    def renew(self, module: HoldsTensors, optimizers: Sequence[Optimizer], step: int) -> bool:
        """Copy the present state over this one; False, and nothing is done, where it does not fit into the old."""
        optimizers = _with_wrapped(optimizers)
        live = [[optimizer.state.get(p, {}) for p in _held(optimizer)] for optimizer in optimizers]
        into, values, others = list(self._tensors), [local(each) for each in _tensors(module, optimizers)], []
        if [len(saved) for saved in self._states] != [len(now) for now in live] or len(into) != len(values):
            return False
        for old, new in zip(chain.from_iterable(self._states), chain.from_iterable(live), strict=True):
            if old.keys() != new.keys():
                return False
            for key, value in new.items():
                if isinstance(value, Tensor) and isinstance(old[key], Tensor):
                    into.append(old[key])
                    values.append(local(value))
                elif isinstance(value, Tensor) or isinstance(old[key], Tensor):
                    return False
                else:
                    others.append((old, key, value))
        if any(old.shape != new.shape or old.dtype != new.dtype for old, new in zip(into, values, strict=True)):
            return False
        for saved, key, value in others:
            saved[key] = copy.copy(value)
        if into:
            torch._foreach_copy_(into, values)
        self.step = step
        return True

    def fits(self, module: HoldsTensors, optimizers: Sequence[Optimizer]) -> bool:
        """Whether module and optimizers hold as many tensors, of these shapes, as when it was made."""
        optimizers = _with_wrapped(optimizers)
        shapes = [local(value).shape for value in _tensors(module, optimizers)]
        counts = [len(_held(each)) for each in optimizers]
        return shapes == [value.shape for value in self._tensors] and counts == [len(each) for each in self._states]

    @contextmanager
    def visited(
        self, module: HoldsTensors, optimizers: Sequence[Optimizer], device: torch.device | str | None = None
    ) -> Iterator[None]:
        """Put the copies back, and undo that at the end; until then what is there is kept on ``device``."""
        now = Snapshot(module, optimizers, self.step, device)
        try:
            self.restore(module, optimizers)
            yield
        finally:
            now.restore(module, optimizers)

    @torch.no_grad()
    def restore(self, module: HoldsTensors, optimizers: Sequence[Optimizer]) -> None:
        """Put the copies back, in place where a tensor is still there.

        Raises a ValueError, and puts nothing back, if module or optimizers hold other tensors than when it was made.
        """
        if not self.fits(module, optimizers):
            raise ValueError(f"the module or its optimizers hold other tensors than at step {self.step}")
        optimizers = _with_wrapped(optimizers)
        for tensor, saved in zip(_tensors(module, optimizers), self._tensors, strict=True):
            local(tensor).copy_(saved)
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
                        local(live[key]).copy_(value)
                    elif isinstance(value, Tensor):
                        home = self._homes.get((parameter, key), parameter.device)
                        # Whatever has the shape of a split parameter's piece is split as it is.
                        like = parameter if value.shape == local(parameter).shape else value
                        live[key] = split_like(value.to(home, copy=True), like)
                    else:
                        live[key] = copy.copy(value)


class SnapshotRing:
    """A few snapshots of a run, the oldest first, their ages about geometric.

    The oldest stays: the state before training is never that of a network which has lost what it learned.
    """

    def __init__(self, kept: Sequence[Snapshot] = ()) -> None:
        self.kept = list(kept)

    @property
    def latest(self) -> Snapshot | None:
        """The youngest one; None without any."""
        return self.kept[-1] if self.kept else None

    def latest_before(self, step: int) -> Snapshot | None:
        """The youngest one that was made before a step was taken; None without any."""
        return next((each for each in reversed(self.kept) if each.step <= step), None)

    @property
    def oldest(self) -> Snapshot | None:
        """The oldest one; None without any."""
        return self.kept[0] if self.kept else None

    def latest_that(
        self, passes: Callable[[], bool], visited: Callable[[Snapshot], AbstractContextManager[None]]
    ) -> Snapshot | None:
        """The youngest one at which a test passes, else the oldest; None without any."""
        for snapshot in reversed(self.kept):
            with visited(snapshot):
                if passes():
                    return snapshot
        return self.oldest

    def is_due(self, step: int) -> bool:
        """Whether the youngest one is so old that another is to be kept."""
        return bool(self.kept) and step - self.kept[-1].step >= self._interval(step)

    def keep(
        self,
        module: HoldsTensors,
        optimizers: Sequence[Optimizer],
        step: int,
        device: torch.device | str | None = None,
        *,
        wasted: int = 0,
        alpha: float = math.nan,
    ) -> None:
        """Keep the present state; where that makes too many, in the memory of one that is needed least.

        ``wasted``: the steps that rollbacks threw away; ``alpha``: the inner rate applied now.
        """
        size = 2 if self._large else _MOST
        again = [each for each in self.kept if each.step == step]
        while again or len(self.kept) >= size:
            spare = again.pop() if again else self._spare(step)
            self.kept.remove(spare)
            if len(self.kept) < size and spare.renew(module, optimizers, step):
                break
        else:
            spare = Snapshot(module, optimizers, step, device)
        spare.progress, spare.alpha = step - wasted, alpha
        self.kept.append(spare)

    @property
    def _large(self) -> bool:
        return bool(self.kept) and self.kept[-1].bytes * _MOST > _BYTES

    def _interval(self, step: int) -> int:
        return max(_LEAST_LARGE if self._large else _LEAST, int(_SHARE * step))

    def _spare(self, step: int) -> Snapshot:
        """The one without which the ages are nearest to geometric; of two, the younger one."""
        least = self._interval(step)
        ages = [max(step - each.step, least) for each in self.kept] + [least]
        return min(self.kept[1:], key=lambda each: _gap(ages, self.kept.index(each)), default=self.kept[0])

    def drop_unlike(self, module: HoldsTensors, optimizers: Sequence[Optimizer]) -> None:
        """Forget those that cannot be gone back to, as of before parameters were added to an optimizer."""
        self.kept = [each for each in self.kept if each.fits(module, optimizers)]

    def drop_after(self, step: int) -> None:
        """Forget those of later steps."""
        self.kept = [each for each in self.kept if each.step <= step]

    def drop_from(self, step: int) -> None:
        """Forget those of a step and later ones, but for the oldest of all."""
        self.kept = [*self.kept[:1], *[each for each in self.kept[1:] if each.step < step]]

    def state(self) -> list[dict[str, Any]]:
        """Return the copies for a checkpoint."""
        return [each.state() for each in self.kept]


def _gap(ages: Sequence[int], index: int) -> float:
    return ages[index - 1] / ages[index + 1]


def _tensors(module: HoldsTensors, optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """The tensors of a module, and what optimizers hold beside their parameters and states."""
    states = [each for optimizer in optimizers for each in (optimizer.state, optimizer.param_groups)]
    apart = {id(each) for each in (*module.parameters(), *states)}
    held = (each for optimizer in optimizers for name, each in vars(optimizer).items() if name != "defaults")
    return [*module.parameters(), *module.buffers(), *(each for value in held for each in _within(value, apart))]


def _within(value: Any, apart: set[int]) -> Iterator[Tensor]:
    if id(value) in apart:
        return
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _within(each, apart)


def _with_wrapped(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """List optimizers and those that they hold, as one that wraps another does."""
    found: list[Optimizer] = []
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop(0)
        if all(optimizer is not each for each in found):
            found.append(optimizer)
            waiting += [each for each in vars(optimizer).values() if isinstance(each, Optimizer)]
    return found


def _held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _kept(value: Any, device: torch.device | str | None) -> Any:
    if not isinstance(value, Tensor):
        return copy.copy(value)
    return local(value).detach().to(value.device if device is None else device, copy=True)
