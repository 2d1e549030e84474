"""The truth: a full grid of inner and meta rates, each pair trained to the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.suggest.problems import Problems
from lightning_maml_guard.phase.gradients import copies
from lightning_maml_guard.tuner.rungs import RunGradients, Rungs

COLUMNS = 4
# Meta rates of the grid, in units of the optimizer's usual one.
EXPONENTS = {"sgd": (-2, 4), "momentum": (-2, 4), "adam": (-1, 4)}  # powers of 4
TRAINED_SHARE = 0.9
_LOST = 10.0


@dataclass(frozen=True)
class Grid:
    """A trained grid.

    Attributes:
        alphas: Inner rates, shape ``(A,)``.
        betas: Meta rates, shape ``(B,)``.
        final: Loss after training on tasks that no run trained on, shape ``(A, B)``; ``inf`` where a run blew up.
        start: The same before training, the lower one of with and without adaptation, shape ``(A,)``.
        largest: Largest meta rate that trained (to 0.9 of the start), with all below it that learn; shape ``(A,)``.
    """

    alphas: np.ndarray
    betas: np.ndarray
    final: np.ndarray
    start: np.ndarray
    largest: np.ndarray

    @property
    def best(self) -> float:
        """Loss of the best pair."""
        return float(self.final.min())


def trained(problems: Problems, pairs: Sequence[tuple[float, float]], steps: int, begin: int = 0) -> np.ndarray:
    """Train pairs of rates side by side from a batch on; returns their final losses, ``inf`` where one blew up."""
    judged = problems.judged()
    like = next(iter(judged.params.values())).detach()
    alphas, betas = (like.new_tensor(each) for each in zip(*pairs, strict=True))
    torch.manual_seed(problems.seed)
    runs, stream = Rungs(judged, [problems.optimizer()], alphas, betas, RunGradients()), problems.stream(begin)
    final = np.full(len(pairs), math.inf)
    for step in range(steps):
        losses = runs.step(next(stream))
        if step % 10 == 9:
            runs.keep(torch.isfinite(losses))
        if not len(runs):
            return final
    found = runs.losses(judged).double().cpu().numpy()
    final[runs.index.cpu().numpy()] = np.where(np.isfinite(found), found, math.inf)
    return final


def start_losses(problems: Problems, alphas: Sequence[float]) -> np.ndarray:
    """Evaluate before training, the lower one of with and without adaptation."""
    judged = problems.judged()
    params = {name: value.detach() for name, value in judged.params.items()}
    at = next(iter(params.values())).new_tensor([*alphas, 1e-9])
    found = RunGradients().losses(judged, copies(params, len(at)), at).double().cpu().numpy()
    return np.fmin(found[:-1], found[-1])


def grid(problems: Problems, steps: int, usual: float, begin: int = 0) -> Grid:
    """Train every pair: meta rates in powers of 4, and then the one between the largest that trains and the next."""
    setting = problems.setting
    alphas = [math.nan] if setting.network is None else np.logspace(*setting.columns, COLUMNS).tolist()
    low, high = EXPONENTS[setting.optimizer]
    betas = usual * 4.0 ** np.arange(low, high + 1)
    start = start_losses(problems, alphas)
    pairs = [(alpha, beta) for alpha in alphas for beta in betas]
    coarse = trained(problems, pairs, steps, begin).reshape(len(alphas), len(betas))
    good = coarse <= TRAINED_SHARE * start[:, None]
    top = [_largest(row) for row in good]
    halfway = [(alpha, 2 * betas[max(t, 0)]) for alpha, t in zip(alphas, top, strict=True)]
    between = trained(problems, halfway, steps, begin)
    all_betas = usual * 2.0 ** np.arange(2 * low, 2 * high + 2)
    final = np.full((len(alphas), len(all_betas)), math.inf)
    final[:, ::2] = coarse
    largest = []
    for row, t in enumerate(top):
        final[row, 2 * max(t, 0) + 1] = between[row]
        best = betas[t] * (2 if between[row] <= TRAINED_SHARE * start[row] else 1) if t >= 0 else math.nan
        largest.append(best)
    return Grid(np.array(alphas), all_betas, final, start, np.array(largest))


def _largest(good: np.ndarray) -> int:
    """The largest that trained before the first gap; -1 where none did."""
    found = np.flatnonzero(good)
    if not len(found):
        return -1
    first = int(found[0])
    gap = np.flatnonzero(~good[first:])
    return first + int(gap[0]) - 1 if len(gap) else len(good) - 1
