"""Pairs of rates in training, side by side on copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_maml_guard.tuner.search import LadderSearch

# Steps between two looks for losses that diverged.
LOOK = 5


class Trial:
    """Pairs of an inner rate's index and an outer rate in training, all from the start."""

    def __init__(self, search: LadderSearch, pairs: Sequence[tuple[int, float]]) -> None:
        self._search = search
        self.columns = np.array([column for column, _ in pairs])
        betas = search.like.new_tensor([beta for _, beta in pairs])
        self._rungs = search.rungs(search.like.new_tensor(search.alphas[self.columns]), betas)
        self._latest = np.full((LOOK, len(pairs)), -math.inf)
        self.end = np.full(len(pairs), math.inf)
        self.start = np.full(len(pairs), math.nan)

    @property
    def active(self) -> np.ndarray:
        """Whether each run is still trained, shape ``(runs,)``."""
        return np.isin(np.arange(len(self.columns)), self._rungs.index.cpu().numpy())

    @property
    def trains(self) -> np.ndarray:
        """Whether each run stayed and ended no higher than before training."""
        return self.active & (self.end <= self.start)

    def advance(self, steps: int, judged: int = 0) -> None:
        """Train some steps; the loss over the last ``judged`` of them becomes ``end``, beside that before training."""
        search = self._search
        ends, starts = [], []
        for step in range(steps):
            if not len(self._rungs):
                break
            problem = next(search.problems)
            judging = step >= steps - judged
            held = search.held[step % len(search.held)] if search.held else None
            if judging and held is not None:
                ends.append(self._spread(self._rungs.losses(held)))
            losses = self._spread(self._rungs.step(problem))
            if judging:
                starts.append(search.untrained(held or problem)[self.columns])
                # A batch that is new is judged before it is trained on.
                ends += [losses] if held is None else []
            self._latest[step % LOOK] = losses
            search.count(len(self._rungs))
            if (step + 1) % LOOK == 0:
                self._drop()
        if starts:
            self.start, mean = np.mean(starts, 0), np.mean(ends, 0)
            self.end = np.where(self.active & np.isfinite(mean), mean, math.inf)

    def keep(self, which: np.ndarray) -> None:
        """Go on with some of the runs, by a mask over all."""
        index = self._rungs.index
        self._rungs.keep(torch.from_numpy(which).to(index.device)[index])

    def _drop(self) -> None:
        """End the runs whose loss diverged: most of the latest ones are not finite or too high."""
        left = ~(self._latest <= self._search.highest[self.columns])
        self.keep(2 * left.sum(0) <= LOOK)

    def _spread(self, losses: Tensor) -> np.ndarray:
        found = np.full(len(self.columns), math.nan)
        found[self._rungs.index.cpu().numpy()] = losses.double().cpu().numpy()
        return found
