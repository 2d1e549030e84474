"""The batches a lookahead goes through: the coming one and those before it, also across a restart."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_PLAIN = (bool, int, float, str, type(None))


class ReplayBuffer:
    """Holds the last ``size`` batches by reference; ``restored`` are those of a checkpoint, not taken up yet."""

    def __init__(self, size: int) -> None:
        self._batches: deque[tuple[Any, int]] = deque(maxlen=size)
        # Of a restored run: tensors alone, until a batch shows their structure and device.
        self.restored: list[tuple[list[Any], int]] = []

    def __len__(self) -> int:
        return len(self._batches)

    def hold(self, size: int) -> None:
        """Hold so many batches from now on."""
        if size != self._batches.maxlen:
            self._batches = deque(list(self._batches)[:size], maxlen=size)

    def add(self, batch: Any, batch_idx: int) -> None:
        """Take in the batch of the coming step."""
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
        """Return the batch of the latest step, and its index."""
        return self._batches[0]

    def earlier(self) -> list[tuple[Any, int]]:
        """List the batches before the coming one with their indices, the latest first."""
        return list(self._batches)[1:]

    def clear(self) -> None:
        """Drop all batches."""
        self._batches.clear()
        self.restored = []

    def state(self) -> list[Any]:
        """Copy the batches to the host: tensors and plain values, so that a checkpoint loads with ``weights_only``.

        A batch that holds anything else is left out.
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
        """Restore what :meth:`state` returned."""
        self.restored = [(list(leaves), index) for leaves, index in state]


def _rebuilt(saved: list[Any], leaves: list[Any], spec: TreeSpec) -> Any:
    """Put tensors together as a batch is; None if they are not of its kind."""
    if [type(leaf) for leaf in saved] != [type(leaf) for leaf in leaves]:
        return None
    moved = [a.to(b.device) if isinstance(a, Tensor) else a for a, b in zip(saved, leaves, strict=True)]
    return tree_unflatten(moved, spec)
