"""The batches a trial goes through: the coming one and those before it, also across a restart."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_PLAIN = (bool, int, float, str, type(None))


class Replay:
    """Holds the last batches by reference.

    Args:
        size: How many.

    Attributes:
        restored: Batches of a restored run that have not been taken up.
    """

    def __init__(self, size: int) -> None:
        self._batches: deque[tuple[Any, int]] = deque(maxlen=size)
        # Of a restored run: tensors alone, until a batch shows how they hang together and on which device.
        self.restored: list[tuple[list[Any], int]] = []

    def add(self, batch: Any, batch_idx: int) -> None:
        """Take in the batch of the coming step.

        Args:
            batch: The batch.
            batch_idx: Its index.
        """
        self._batches.appendleft((batch, batch_idx))
        restored, self.restored = self.restored, []
        if not restored:
            return
        leaves, spec = tree_flatten(batch)
        for saved, index in restored[: (self._batches.maxlen or 0) - 1]:
            known = _rebuilt(saved, leaves, spec)
            if known is not None:
                self._batches.append((known, index))

    def latest(self) -> tuple[Any, int]:
        """Name the batch of the latest step.

        Returns:
            The batch and its index.
        """
        return self._batches[0]

    def earlier(self) -> list[tuple[Any, int]]:
        """List the batches before the coming one, the latest first.

        Returns:
            Batches with their indices.
        """
        return list(self._batches)[1:]

    def clear(self) -> None:
        """Let go of the batches."""
        self._batches.clear()
        self.restored = []

    def state(self) -> list[Any]:
        """Copy the batches to the host.

        Returns:
            Tensors and plain values, so that a checkpoint loads with ``weights_only``; a batch that holds anything else
            is left out.
        """
        if self.restored:
            return [[list(saved), index] for saved, index in self.restored]
        copies = []
        for batch, index in self._batches:
            leaves = tree_flatten(batch)[0]
            # By exact type: a NumPy number is a float, but none that weights_only loads.
            if all(type(leaf) is Tensor or type(leaf) in _PLAIN for leaf in leaves):
                # A copy, because a view would take all of its storage into the checkpoint.
                copied = [leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                copies.append([copied, index])
        return copies

    def load(self, state: list[Any]) -> None:
        """Restore the batches.

        Args:
            state: What :meth:`state` made.
        """
        self.restored = [(list(leaves), index) for leaves, index in state]


def _rebuilt(saved: list[Any], leaves: list[Any], spec: TreeSpec) -> Any:
    """Hang tensors together as a batch is; None if they are not of its kind."""
    if [type(leaf) for leaf in saved] != [type(leaf) for leaf in leaves]:
        return None
    moved = [a.to(b.device) if isinstance(a, Tensor) else a for a, b in zip(saved, leaves, strict=True)]
    return tree_unflatten(moved, spec)
