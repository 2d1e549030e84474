"""Whether optimizers step together, along one gradient, or take turns as those of a GAN do."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer


class Turns:
    """Follows the backward passes and steps of a batch.

    Attributes:
        watched: The optimizers it is about; a single one never takes turns.
        found: Whether they took turns in some batch.
    """

    def __init__(self) -> None:
        self.watched: list[Optimizer] = []
        self.found = False
        self.begin()

    def begin(self) -> None:
        """Begin a batch."""
        self._stepped: list[Optimizer] = []
        self._backward_since = self._apart = False

    def backward(self) -> None:
        """Note a backward pass."""
        self._backward_since = bool(self._stepped)

    def step(self, optimizer: Optimizer) -> None:
        """Note a step."""
        if len(self.watched) < 2 or not any(optimizer is each for each in self.watched):
            return
        others = any(each is not optimizer for each in self._stepped)
        self._apart = self._apart or (others and self._backward_since)
        self._stepped.append(optimizer)

    def taken(self) -> bool:
        """End a batch; return True the first time the optimizers took turns in it."""
        some = 0 < len({id(each) for each in self._stepped}) < len(self.watched)
        found, self.found = self.found, self.found or self._apart or some
        return self.found and not found

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """Follow these optimizers."""
        self.watched = list(optimizers)
