"""RateLadder: what pairs of rates came to, each trained for some steps on copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RateLadder:
    """What the rungs of a ladder came to.

    Attributes:
        alphas: Inner rates, ascending, shape ``(A,)``; ``nan`` in plain training.
        betas: Outer rates, ascending, each twice the one before, shape ``(B,)``.
        losses: Mean loss over the last quarter of a rung's steps, on batches that no rung had trained on, shape ``(A,
            B)``; ``inf`` where the loss diverged, ``nan`` where a rung was not trained to its end.
        start: Loss of such batches before training, the lower one of with and without adaptation, shape ``(A,)``.
        largest: Largest outer rate that trains, with all below it; ``nan`` where none does, or where the inner rate had
            fallen behind before that was known; shape ``(A,)``.
        suggested: Outer rate up to ``margin * largest`` at which the loss is lowest after the longest training; ``nan``
            where there was none; shape ``(A,)``.
        raced: That loss, shape ``(A,)``.
        steps: Steps of a rung.
        race_steps: Steps of that longest training.
        taken: Steps of all rungs together.
        looped: Whether the rungs trained one after another.
        repeated: Whether the batches that losses are taken on had to be the training batches.
    """

    alphas: np.ndarray
    betas: np.ndarray
    losses: np.ndarray
    start: np.ndarray
    largest: np.ndarray
    suggested: np.ndarray
    raced: np.ndarray
    steps: int
    race_steps: int
    taken: int
    looped: bool
    repeated: bool

    @property
    def best(self) -> int | None:
        """Index of the inner rate whose pair ended lowest; None where no pair trains."""
        return None if np.isnan(self.raced).all() else int(np.nanargmin(self.raced))
