"""Tensors split over processes (DTensor, as fully_shard makes them): the piece that lies here, and the way back."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_split(value: Any) -> bool:
    """Return True if a tensor is a DTensor: a piece of it lies here."""
    # Before torch's module of them is imported there are none, and the import takes time.
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(value, known.DTensor)


def any_split(values: Iterable[Any]) -> bool:
    """Return True if some tensor is split."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and any(isinstance(value, known.DTensor) for value in values)


def local(value: Tensor) -> Tensor:
    """Return the piece of a tensor that lies here, without a graph, in the same memory; of a whole one, itself."""
    return value.detach().to_local() if is_split(value) else value  # type: ignore[attr-defined]


def split_like(piece: Tensor, like: Tensor) -> Tensor:
    """Make a split tensor of a piece where ``like`` is one; else return the piece."""
    if not is_split(like) or is_split(piece):
        return piece
    return type(like.detach()).from_local(  # type: ignore[attr-defined]
        piece,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def sharded_parts(module: nn.Module) -> list[Any]:
    """List the parts of a module that ``fully_shard`` split, which gather their parameters to be called."""
    known = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if known is None else [part for part in module.modules() if isinstance(part, known)]


def reshard(module: nn.Module) -> None:
    """Have a module hold its pieces: a forward pass without a backward pass leaves gathered parameters behind."""
    for part in sharded_parts(module):
        part.reshard()


def all_reduced(value: Tensor, op: Any = None) -> Tensor:
    """Combine what each process found in its piece; the sum unless another operation is given."""
    total = value.detach().clone()
    dist.all_reduce(total, dist.ReduceOp.SUM if op is None else op)
    return total


def norm(values: Sequence[Tensor]) -> Tensor:
    """Compute the norm of several tensors together, split ones over all processes."""
    split = [value for value in values if is_split(value)]
    whole = [value for value in values if not is_split(value)]
    squares = [torch.linalg.vector_norm(local(value)) ** 2 / _replicas(value) for value in split]
    total = all_reduced(torch.stack(squares).sum())
    return (total + sum(torch.linalg.vector_norm(value) ** 2 for value in whole)).sqrt()


def _replicas(value: Any) -> int:
    """On how many processes each piece of a split tensor lies."""
    sizes = [value.device_mesh.size(axis) for axis, each in enumerate(value.placements) if each.is_replicate()]
    return math.prod(sizes)


def finite(module: nn.Module) -> bool:
    """Return True if every parameter is finite, on every process that holds a piece of one."""
    reshard(module)
    parameters = list(module.parameters())
    here = all(bool(torch.isfinite(local(each)).all()) for each in parameters)
    if not any_split(parameters):
        return here
    flag = torch.tensor(int(here), device=parameters[0].device)
    return bool(all_reduced(flag, dist.ReduceOp.MIN))
