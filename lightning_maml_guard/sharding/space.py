"""The space of vectors whose entries are split over processes as a model's parameters are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_maml_guard.linalg.layout import Params, Space
from lightning_maml_guard.utils.shards import all_reduced, is_split

# Start vectors are drawn in blocks of so many entries: a multiple of 16, in which torch draws normal numbers.
_BLOCK = 1 << 20


class Split(Space):
    """Vectors split as ``live`` is, the parameters of a module that ``fully_shard`` split.

    Raises a ValueError unless all of them are split alike, over all processes, each along one dimension.
    """

    def __init__(self, live: Params) -> None:
        self._places = {name: _Place(name, value) for name, value in live.items()}
        self.rows: int = sum(value.numel() for value in live.values())
        copies = {place.copies for place in self._places.values()}
        if len(copies) != 1:
            raise ValueError(
                f"Expected every parameter to be split alike but got {sorted(copies)} copies of their pieces. Call "
                "fully_shard with one mesh on every part of the model."
            )
        self._copies = copies.pop()

    def total(self, partial: Tensor) -> Tensor:
        return all_reduced(partial) / self._copies

    def largest(self, partial: Tensor) -> Tensor:
        return all_reduced(partial, dist.ReduceOp.MAX)

    def norm(self, vector: Tensor) -> Tensor:
        return self.total(torch.linalg.vector_norm(vector, dim=-1, keepdim=True) ** 2).sqrt()

    def start(self, shape: Sequence[int], like: Tensor, seed: int = 0) -> Tensor:
        blocks = torch.Size(shape[:-1]).numel()
        stream = _NormalNumbers(blocks * self.rows, seed)
        drawn = [
            torch.cat([place.piece(stream.take(place.shape.numel()).view(place.shape)).flatten() for place in self])
            for _ in range(blocks)
        ]
        return torch.stack(drawn).reshape(*shape[:-1], -1).to(like.device, like.dtype)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._places.values())

    def piece(self, name: str, whole: Tensor) -> Tensor:
        """Cut this process's piece of a tensor of a parameter's shape, maybe with more leading dimensions."""
        return self._places[name].piece(whole)


class _Place:
    """Which piece of a parameter lies here, and how many processes hold it."""

    def __init__(self, name: str, value: Tensor) -> None:
        from torch.distributed.tensor import Replicate, Shard

        if not is_split(value):
            raise ValueError(
                f"Expected every parameter to be split but {name!r} lies on every process as a whole. Call fully_shard "
                "on the whole network, in configure_model, after its parts."
            )
        mesh, placements = value.device_mesh, value.placements  # type: ignore[attr-defined]
        cuts = [(axis, each) for axis, each in enumerate(placements) if type(each) is Shard]
        others = [each for each in placements if type(each) not in (Shard, Replicate)]
        if len(cuts) != 1 or others or mesh.size() != dist.get_world_size():
            raise ValueError(
                f"Expected {name!r} to be split along one dimension, over all {dist.get_world_size()} processes, but "
                f"got {tuple(placements)} over {mesh.size()}. Use fully_shard alone: tensor parallelism is not "
                "supported."
            )
        ((axis, cut),) = cuts
        self.shape, self._dim = value.shape, cut.dim
        parts = mesh.size(axis)
        self.copies = mesh.size() // parts
        length = self.shape[cut.dim]
        step = -(-length // parts)
        self._begin = min(mesh.get_coordinate()[axis] * step, length)
        self._length = min(step, length - self._begin)

    def piece(self, whole: Tensor) -> Tensor:
        return whole.narrow(self._dim - len(self.shape), self._begin, self._length)


class _NormalNumbers:
    """The numbers of one ``torch.randn(count)`` in float64, some at a time: without the memory of them all."""

    def __init__(self, count: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._left = count
        self._drawn: Tensor = torch.empty(0, dtype=torch.float64)

    def take(self, count: int) -> Tensor:
        while len(self._drawn) < count:
            # torch draws the last 16 numbers anew where their count is no multiple of 16.
            size = _BLOCK if self._left >= _BLOCK + 16 else self._left
            self._left -= size
            self._drawn = torch.cat([self._drawn, torch.randn(size, generator=self._generator, dtype=torch.float64)])
        taken, self._drawn = self._drawn.split([count, len(self._drawn) - count])
        return taken
