"""The search for a pair of rates that trains: pairs trained side by side for some steps, on copies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.optim.clipping import ModuleClipping
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.shadow import Clip, ShadowOptimizer
from lightning_maml_guard.phase.gradients import copies
from lightning_maml_guard.phase.ladder import RateLadder
from lightning_maml_guard.phase.rungs import Rungs, Slopes
from lightning_maml_guard.stability.problems import Problem
from lightning_maml_guard.tuner.ladder import LadderOptions
from lightning_maml_guard.utils.task_map import as_float32

# Inner rates in units of 1/lambda_max before training, from below its limit of 2 to far beyond: training itself lowers
# the curvature, and in 102 trained columns the best inner rates began at 1.25 to 50.
UNITS = (0.5, 1.25, 3.0, 8.0, 20.0, 50.0)
# Meta rates in units of the one whose first step is as long as the parameters, as powers of 2.
_LOWEST, _HIGHEST = -16, 5
# A loss above this many times that before training ends a rung.
_RATIO = 4.0
# Steps between two looks for such losses.
_LOOK = 5


class Trial:
    """Pairs of an inner rate's index and a meta rate in training, all from the start."""

    def __init__(self, search: LadderSearch, pairs: Sequence[tuple[int, float]]) -> None:
        self._search = search
        self.columns = np.array([column for column, _ in pairs])
        betas = search.like.new_tensor([beta for _, beta in pairs])
        self._rungs = search.rungs(search.like.new_tensor(search.alphas[self.columns]), betas)
        self._latest = np.full((_LOOK, len(pairs)), -math.inf)
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
            self._latest[step % _LOOK] = losses
            search.count(len(self._rungs))
            if (step + 1) % _LOOK == 0:
                self._drop()
        if starts:
            self.start = np.mean(starts, 0)
            mean = np.mean(ends, 0)
            self.end = np.where(self.active & np.isfinite(mean), mean, math.inf)

    def keep(self, which: np.ndarray) -> None:
        """Go on with some of the runs, by a mask over all."""
        index = self._rungs.index
        self._rungs.keep(torch.from_numpy(which).to(index.device)[index])

    def _drop(self) -> None:
        """End the runs whose loss left: most of the latest ones are not finite or too high."""
        left = ~(self._latest <= self._search.highest[self.columns])
        self.keep(2 * left.sum(0) <= _LOOK)

    def _spread(self, losses: Tensor) -> np.ndarray:
        found = np.full(len(self.columns), math.nan)
        found[self._rungs.index.cpu().numpy()] = losses.double().cpu().numpy()
        return found


class LadderSearch:
    """Finds a pair of rates that trains, by training.

    Args:
        problems: The training batches' problems, without end.
        held: Problems that are never trained on, to judge on; without any, each batch is judged before its step.
        fresh: Whether every batch is new.
        optimizers: What steps the parameters.
        alphas: Inner rates to try; ``nan`` alone in plain training.
        options: How.
        margin: Share of the largest meta rate that trains.
        slopes: Computes losses and gradients.
        clip: Clips a list of parameters' gradients in place.
        hook: Clips as the module does.
    """

    def __init__(
        self,
        problems: Iterator[Problem],
        held: Sequence[Problem],
        fresh: bool,
        optimizers: Sequence[Optimizer],
        alphas: Sequence[float],
        options: LadderOptions,
        margin: float,
        slopes: Slopes,
        clip: Clip | None = None,
        hook: ModuleClipping | None = None,
    ) -> None:
        self.problems, self.held, self._fresh = problems, list(held), fresh
        self.alphas, self.options, self.margin = np.array(sorted(alphas)), options, margin
        self._optimizers, self._slopes, self._clip, self._hook = optimizers, slopes, clip, hook
        self._first = self.held[0] if self.held else next(problems)
        self._params: Params = as_float32({name: value.detach() for name, value in self._first.params.items()})
        self.like = next(iter(self._params.values()))
        self._untrained: dict[int, np.ndarray] = {}
        self.taken, self._bar = 0, tqdm(disable=True)
        before = self._before(self._first)
        scale = Scale().over([float(loss) for loss in before if math.isfinite(loss)] or [math.nan])
        self.highest = np.array([scale.times(_RATIO, max(loss, before[-1])) for loss in before[:-1]])
        self.betas = self._grid()

    def rungs(self, alphas: Tensor, betas: Tensor) -> Rungs:
        """Put runs at the start."""
        return Rungs(self._first, self._optimizers, alphas, betas, self._slopes, self._clip, self._hook)

    def untrained(self, problem: Problem) -> np.ndarray:
        """The loss of a batch before training at each inner rate, the lower one of with and without adaptation."""
        if id(problem) in self._untrained:
            return self._untrained[id(problem)]
        before = self._before(problem)
        found = np.fmin(before[:-1], before[-1])
        if not self._fresh:  # the same few batches come again and again
            self._untrained[id(problem)] = found
        return found

    def count(self, steps: int) -> None:
        """Count the steps of all runs together."""
        self.taken += steps
        self._bar.update(steps)

    def _before(self, problem: Problem) -> np.ndarray:
        """The losses before training at each inner rate, and then hardly adapted."""
        alphas = self.like.new_tensor([*self.alphas, 1e-6 * self.alphas[0]])
        return self._slopes.losses(problem, copies(self._params, len(alphas)), alphas).double().cpu().numpy()

    def _grid(self) -> np.ndarray:
        """Meta rates, each twice the one before, from hardly any movement to beyond the parameters' own length."""
        present = scheduled_rate(self._optimizers)
        gradients, _ = self._slopes.gradients(
            self._first, copies(self._params, 1), self.like.new_tensor(self.alphas[:1])
        )
        shadow = ShadowOptimizer(self._optimizers, self._first.params, 1 / present)
        shadow.step({name: value[0] for name, value in gradients.items()})
        moved = {name: shadow.params[name].float() - value.float() for name, value in self._first.params.items()}
        length, move = _norm(self._params), _norm(moved)
        scale = (length or 1.0) / move if 0 < move < math.inf else 1.0
        # The configured rate is one of them.
        middle = round(math.log2(scale / present))
        return present * 2.0 ** np.arange(middle + _LOWEST, middle + _HIGHEST + 1)

    def find(self) -> RateLadder:
        """Climb the ladder."""
        steps, columns = self.options.steps, range(len(self.alphas))
        judged = max(steps // 4, 1)
        losses = np.full((len(self.alphas), len(self.betas)), math.nan)
        start = np.full(len(self.alphas), math.nan)
        with tqdm(desc="rates", unit="step", disable=not self.options.progress) as self._bar:
            top = self._coarse(steps, judged, losses, start)
            # The better half of the inner rates, by their best rungs, goes on.
            best = np.nanmin(np.where(np.isnan(losses), math.inf, losses), 1)
            able = sorted((c for c in columns if top[c] >= 0), key=lambda c: best[c])
            able = able[: max((len(self.alphas) + 1) // 2, 2)]
            largest = self._fine({column: top[column] for column in able}, steps, judged)
            raced, race_steps = self._race(largest, steps)
        rates = np.array([self.betas[largest[c]] if c in largest else math.nan for c in columns])
        ends = np.array([raced.get(c, math.nan) for c in columns])
        return RateLadder(
            alphas=self.alphas,
            betas=self.betas,
            losses=losses,
            start=start,
            largest=rates,
            raced=ends,
            steps=steps,
            race_steps=race_steps,
            taken=self.taken,
            looped=self._slopes.looped,
            repeated=not self._fresh and not self.held,
        )

    def _coarse(self, steps: int, judged: int, losses: np.ndarray, start: np.ndarray) -> list[int]:
        """Try every other meta rate at every inner rate; returns the largest that trains, -1 where none does."""
        rungs = list(range(len(self.betas) - 1, -1, -2))[::-1]
        pairs = [(column, rung) for column in range(len(self.alphas)) for rung in rungs]
        columns, places = np.array(pairs).T
        trial = Trial(self, [(column, self.betas[rung]) for column, rung in pairs])
        trial.advance(max(steps // 4, _LOOK))
        active = trial.active
        keep = np.zeros(len(pairs), dtype=bool)
        for column in range(len(self.alphas)):
            own = np.flatnonzero(columns == column)
            stays = int(np.argmin([*active[own], False]))  # all below this one stayed
            keep[own[max(stays - 3, 0) : stays]] = True
        trial.keep(keep)
        trial.advance(steps - max(steps // 4, _LOOK), judged)
        losses[columns[keep], places[keep]] = trial.end[keep]
        start[:] = [trial.start[columns == column][0] for column in range(len(self.alphas))]
        return [
            max((int(place) for place in places[keep & trial.trains & (columns == column)]), default=-1)
            for column in range(len(self.alphas))
        ]

    def _fine(self, top: dict[int, int], steps: int, judged: int) -> dict[int, int]:
        """Try the meta rates around the largest ones on further streams; the smallest of what trains there counts."""
        found = {column: min(place + 1, len(self.betas) - 1) for column, place in top.items()}
        for _ in range(max(self.options.streams - 1, 1)):
            pairs = [
                (c, k) for c, place in top.items() for k in range(place - 2, place + 2) if 0 <= k < len(self.betas)
            ]
            trial = Trial(self, [(column, self.betas[rung]) for column, rung in pairs])
            trial.advance(steps, judged)
            for column in top:
                own = [
                    rung for (c, rung), trains in zip(pairs, trial.trains, strict=True) if c == column and not trains
                ]
                tried = [rung for c, rung in pairs if c == column]
                found[column] = max(min(found[column], min(own, default=tried[-1] + 1) - 1), 0)
        return found

    def _race(self, largest: dict[int, int], steps: int) -> tuple[dict[int, float], int]:
        """Train each inner rate's pair, twice as long with half of them until one is left."""
        columns = list(largest)
        if not columns:
            return {}, 0
        trial = Trial(self, [(column, self.margin * self.betas[largest[column]]) for column in columns])
        taken, more = 0, steps
        while True:
            trial.advance(more, max(more // 4, 1))
            taken += more
            left = int(trial.active.sum())
            found = {c: float(e) for c, e, a in zip(columns, trial.end, trial.active, strict=True) if a}
            if left <= 2 or taken >= 4 * steps:
                return found, taken
            order = np.argsort(trial.end)
            which = np.zeros(len(columns), dtype=bool)
            which[order[: -(-left // 2)]] = True
            trial.keep(which & trial.active)
            more = taken


def _norm(values: Params) -> float:
    return float(torch.stack([value.detach().float().norm() for value in values.values()]).norm())
