"""The batches that a lookahead uses: that of the coming step and those before it, also after a restart."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_maml_guard.utils.batch_copy import BatchCopyError, Trace, changed, copied, equal, trace

_PLAIN = (bool, int, float, str, type(None))


# Steps after which the effect of a batch has shown: by then Adam's momentum holds 3 % of its gradient.
_EFFECT_SHOWS_AFTER = 32


@dataclass(frozen=True)
class Spike:
    """The batches of a step with their indices, its number, and its loss, which was far above those before."""

    batches: tuple[tuple[Any, int], ...]
    step: int
    loss: float


class ReplayBuffer:
    """Holds the last ``size`` batches as their steps were given them; ``restored`` are a checkpoint's, not yet used.

    The first batch is copied. If its step does not change it, the next ones are held by reference until a step changes
    its batch: that one is dropped, and from then on batches are copied before every step. That of a ``skipped`` step is
    dropped as well.
    """

    def __init__(self, size: int) -> None:
        self._batches: deque[tuple[Any, int]] = deque(maxlen=size)
        self._first, self._copies = True, True
        self.spike: Spike | None = None  # the highest since the run was last at its best
        self.skipped = False  # whether Lightning skipped the step because it returned no loss
        # The batch of the step at hand, and what it held before.
        self._given: Any = None
        self._before: Trace | None = None
        # Of a restored run: tensors alone, until a batch shows their structure and device.
        self.restored: list[tuple[list[Any], int]] = []
        self._restored_spike: list[Any] = []

    def __len__(self) -> int:
        return len(self._batches)

    def resize(self, size: int) -> None:
        """Hold ``size`` batches from now on."""
        if size != self._batches.maxlen:
            self._batches = deque(list(self._batches)[:size], maxlen=size)

    def add(self, batch: Any, batch_idx: int) -> None:
        """Take in the batch of the coming step; one that cannot be copied is left out."""
        self._given, self._before = batch, trace(batch)
        try:
            self._batches.appendleft((copied(batch) if self._copies else batch, batch_idx))
        except BatchCopyError:
            self._before = None
        restored, self.restored = self.restored, []
        self._batches.extend(_rebuilt(restored[: (self._batches.maxlen or 0) - 1], batch))
        if self._restored_spike:
            (step, loss, saved), self._restored_spike = self._restored_spike, []
            known = tuple(_rebuilt(saved, batch))
            self.spike = Spike(known, step, loss) if len(known) == len(saved) else None

    def after_step(self) -> None:
        """Drop the batch if the step changed it or was skipped; decide whether to copy the next ones."""
        given, before, self._given, self._before = self._given, self._before, None, None
        if before is None:
            return
        drops, first, self._first = self.skipped, self._first, False
        if self._copies:
            copy = trace(self._batches[0][0]) if first else None
            self._copies = copy is None or changed(before, given) or not equal(before, copy)
        elif changed(before, given):
            self._copies = drops = True
        if drops:
            dropped = self._batches.popleft()
            if self.spike is not None and any(each is dropped for each in self.spike.batches):
                self.spike = None

    @property
    def repeats(self) -> bool:
        """Whether the last two batches are the same."""
        if len(self._batches) < 2:
            return False
        one, other = (trace(batch) for batch, _ in list(self._batches)[:2])
        return one is not None and other is not None and equal(one, other)

    def note_loss(self, loss: float, step: int, accumulated: int, *, spiked: bool, at_best: bool) -> None:
        """Keep the batches of the highest spike until the loss is at its best again, and at least for some steps.

        What a batch does to the parameters through momentum shows only then.
        """
        if at_best and (self.spike is None or step >= self.spike.step + _EFFECT_SHOWS_AFTER):
            self.spike = None
        elif spiked and self._batches and (self.spike is None or not loss <= self.spike.loss):
            self.spike = Spike(tuple(self._batches)[:accumulated], step, loss)

    def latest(self) -> tuple[Any, int]:
        """Return the batch of the latest step, and its index."""
        return self._batches[0]

    def earlier(self) -> list[tuple[Any, int]]:
        """List the batches before the coming one with their indices, the latest first."""
        return list(self._batches)[1:]

    def clear(self) -> None:
        """Drop all batches."""
        self._batches.clear()
        self.spike = None
        self._given = self._before = None
        self.restored, self._restored_spike = [], []

    def state(self) -> list[Any]:
        """Copy the batches to the host: tensors and plain values, so that a checkpoint loads with ``weights_only``.

        A batch that holds anything else is left out.
        """
        if self.restored:
            return [[list(saved), index] for saved, index in self.restored]
        return _on_host(self._batches)

    def spike_state(self) -> list[Any]:
        """Copy step, loss and batches of the spike likewise; nothing without one."""
        if self._restored_spike or self.spike is None:
            return self._restored_spike
        return [self.spike.step, self.spike.loss, _on_host(self.spike.batches)]

    def load(self, state: list[Any], spike: list[Any]) -> None:
        """Restore what :meth:`state` and :meth:`spike_state` returned."""
        self.restored, self._restored_spike = [(list(leaves), index) for leaves, index in state], spike


def _on_host(batches: Iterable[tuple[Any, int]]) -> list[Any]:
    copies = []
    for batch, index in batches:
        leaves = tree_flatten(batch)[0]
        # By exact type: a NumPy number is a float, but none that weights_only loads.
        if all(type(leaf) is Tensor or type(leaf) in _PLAIN for leaf in leaves):
            # A copy, because a view would take all of its storage into the checkpoint.
            copied = [leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            copies.append([copied, index])
    return copies


def _rebuilt(batches: Iterable[tuple[list[Any], int]], like: Any) -> Iterator[tuple[Any, int]]:
    """Put saved tensors together as a batch is; those that are not of its kind are left out."""
    leaves, spec = tree_flatten(like)
    for saved, index in batches:
        if [type(leaf) for leaf in saved] == [type(leaf) for leaf in leaves]:
            moved = [a.to(b.device) if isinstance(a, Tensor) else a for a, b in zip(saved, leaves, strict=True)]
            yield tree_unflatten(moved, spec), index
