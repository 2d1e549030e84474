"""What several processes must agree on: means over ranks, and the failure of one rank as the failure of all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """A single process: every mean is the value itself.

    ``size`` counts those that measure batches of their own, ``processes`` those that train together.
    """

    size = 1
    processes = 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over the ranks; the result is bitwise the same on every rank."""
        return tensor

    def gather(self, value: T) -> list[T]:
        """Collect one value per rank: anything that can be pickled, tensors on the host."""
        return [value]

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Raise a SharedError on every rank if the block fails on one."""
        yield


class SharedError(Exception):
    """Raised on all ranks if one of them failed."""


class ProcessGroup(Ranks):
    """The ranks of the default process group, whose tensors live on ``device``.

    Inside :meth:`fail_together` all ranks go through the same collectives. Before each the ranks exchange a flag, so
    that the others learn of a rank that has failed instead of waiting for it.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.size = self.processes = dist.get_world_size()
        self._device = device

    def mean(self, tensor: Tensor) -> Tensor:
        self._exchange_failures()
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def gather(self, value: T) -> list[T]:
        self._exchange_failures()
        return self._collect(value)

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Raise a SharedError on every rank if the block fails on one; it names the rank and the cause."""
        try:
            yield
        except SharedError:
            raise
        except Exception as error:
            self._exchange_failures(f"{type(error).__name__}: {error}")
        else:
            self._exchange_failures()

    def _exchange_failures(self, failure: str | None = None) -> None:
        """Wait for the other ranks; raise a SharedError on all if one of them has failed."""
        flag = torch.tensor(int(failure is not None), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if int(flag):
            told = self._collect(failure)
            raise SharedError("; ".join(f"on rank {rank}: {each}" for rank, each in enumerate(told) if each))

    def _collect(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.processes
        dist.all_gather_object(found, value)
        return found


class ShardedRanks(ProcessGroup):
    """The ranks that hold one model in pieces and go through its batches together: they measure as one process does.

    A loss and a gradient are those of all ranks by the module's own backward. What only one rank can know (its data)
    counts as rank 0 knows it, so that all decide alike. If a rank fails inside the module's own collectives, the job
    ends, as it does in training.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.size = 1

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, value: T) -> list[T]:
        self._exchange_failures()
        told: list[Any] = [value]
        dist.broadcast_object_list(told)
        return told
