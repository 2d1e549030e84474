"""What several processes must agree on: means over ranks, and that a failure on one of them is everyone's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """A single process: every mean is the value itself."""

    size = 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over the ranks.

        Args:
            tensor: This rank's; the same shape on every rank.

        Returns:
            The mean, bitwise the same on every rank.
        """
        return tensor

    def gather(self, value: T) -> list[T]:
        """Collect what every rank has.

        Args:
            value: This rank's; anything that can be pickled, tensors on the host.

        Returns:
            One value a rank.
        """
        return [value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make a failure of one rank inside the block a failure of all of them.

        Yields:
            Nothing. Raises a SharedError on every rank if the block failed on one.
        """
        yield


class SharedError(Exception):
    """Something failed on one of the ranks, so all of them leave it."""


class ProcessGroup(Ranks):
    """The ranks of the default process group.

    Inside :meth:`together` all ranks walk through the same collectives. Each is preceded by a flag, so that a rank
    that has failed in between meets the others there instead of leaving them waiting.

    Args:
        device: Where the process group's tensors live.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.size = dist.get_world_size()
        self._device = device

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over the ranks.

        Args:
            tensor: This rank's; the same shape on every rank.

        Returns:
            The mean, bitwise the same on every rank.
        """
        self._meet()
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def gather(self, value: T) -> list[T]:
        """Collect what every rank has.

        Args:
            value: This rank's; anything that can be pickled, tensors on the host.

        Returns:
            One value a rank.
        """
        self._meet()
        return self._collect(value)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make a failure of one rank inside the block a failure of all of them.

        Yields:
            Nothing.

        Raises:
            SharedError: On every rank, if the block failed on one; it names the rank and the cause.
        """
        try:
            yield
        except SharedError:
            raise
        except Exception as error:
            self._meet(f"{type(error).__name__}: {error}")
        else:
            self._meet()

    def _meet(self, failure: str | None = None) -> None:
        flag = torch.tensor(int(failure is not None), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if int(flag):
            told = self._collect(failure)
            raise SharedError("; ".join(f"on rank {rank}: {each}" for rank, each in enumerate(told) if each))

    def _collect(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found
