"""The running range of what a training step leaves at hand, and when a step falls out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

# The start is the median of this many first losses: one odd batch does not move it.
FIRST = 8
_MEMORY = 0.9


@dataclass
class RunningRange:
    """Follows the loss and the gradient norm of each step.

    Attributes:
        loss_spike: Factor on the running loss that counts as a spike.
        norm_spike: Factor on the running gradient norm that counts as a spike.
        first: The first losses.
        loss: Running mean of the loss.
        norm: Running mean of the gradient norm.
    """

    loss_spike: float = 2.0
    norm_spike: float = 4.0
    first: tuple[float, ...] = ()
    loss: float = math.nan
    norm: float = math.nan

    @property
    def start(self) -> float:
        """Loss that training started from; ``nan`` before the first step."""
        return median(self.first) if self.first else math.nan

    def leaves(self, loss: float, norm: float = math.nan) -> bool:
        """Take a step in, and say whether it left the range of those before.

        Args:
            loss: The step's loss.
            norm: Its gradient norm; ``nan`` if not known.

        Returns:
            Whether one of the two spiked or is not finite.
        """
        # A run that leaves within its first steps must not take its start along.
        if (
            math.isfinite(loss)
            and len(self.first) < FIRST
            and (not self.first or loss <= self.loss_spike * self.first[0])
        ):
            self.first = (*self.first, loss)
        left = not math.isfinite(loss) or loss > self.loss_spike * self.loss or norm > self.norm_spike * self.norm
        if math.isfinite(loss):
            self.loss = loss if math.isnan(self.loss) else _MEMORY * self.loss + (1 - _MEMORY) * loss
        if math.isfinite(norm):
            self.norm = norm if math.isnan(self.norm) else _MEMORY * self.norm + (1 - _MEMORY) * norm
        return left

    def lost(self, loss: float, alarm: float) -> bool:
        """Say whether a loss is lost.

        Args:
            loss: The loss.
            alarm: Factor on the loss at the start from which on it is.

        Returns:
            Whether it is that high or not finite.
        """
        return not math.isfinite(loss) or loss > alarm * self.start

    def state(self) -> dict[str, Any]:
        """Collect the state as primitives.

        Returns:
            What :meth:`load` takes.
        """
        return {"first": list(self.first), "loss": self.loss, "norm": self.norm}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state.

        Args:
            state: What :meth:`state` collected.
        """
        self.first = tuple(state.get("first", ()))
        self.loss, self.norm = state.get("loss", math.nan), state.get("norm", math.nan)
