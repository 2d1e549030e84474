"""The search for a pair of rates that trains: pairs trained side by side for some steps, on copies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

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
from lightning_maml_guard.stability.problems import Problem
from lightning_maml_guard.tuner.ladder import LadderOptions
from lightning_maml_guard.tuner.rungs import RunGradients, Rungs
from lightning_maml_guard.tuner.trial import LOOK, Trial
from lightning_maml_guard.utils.task_map import as_float32

# Inner rates in units of 1/lambda_max before training, from below its limit of 2 to far beyond: training itself lowers
# the curvature, and in 102 trained columns the best inner rates began at 1.25 to 50.
UNITS = (0.5, 1.25, 3.0, 8.0, 20.0, 50.0)
# Outer rates in units of the one whose first step is as long as the parameters, as powers of 2.
_LOWEST, _HIGHEST = -16, 5
# A loss above this many times that before training ends a rung.
_RATIO = 4.0
# Outer rates at an inner rate that are trained on after the first look, four times apart.
_KEPT_RUNGS = 3


class LadderSearch:
    """Finds a pair of rates that trains, by training.

    Args:
        problems: The training batches' problems, without end.
        held: Problems that are never trained on, to judge on; without any, each batch is judged before its step.
        fresh: Whether every batch is new.
        optimizers: What steps the parameters.
        alphas: Inner rates to try; ``nan`` alone in plain training.
        options: How.
        margin: Share of the largest outer rate that trains above which none is suggested.
        run_gradients: Computes losses and gradients.
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
        run_gradients: RunGradients,
        clip: Clip | None = None,
        hook: ModuleClipping | None = None,
    ) -> None:
        self.problems, self.held, self._fresh = problems, list(held), fresh
        self.alphas, self.options, self.margin = np.array(sorted(alphas)), options, margin
        self._optimizers, self._run_gradients, self._clip, self._hook = optimizers, run_gradients, clip, hook
        self._first = self.held[0] if self.held else next(problems)
        self._params: Params = as_float32({name: value.detach() for name, value in self._first.params.items()})
        self.like = next(iter(self._params.values()))
        self._untrained: dict[int, np.ndarray] = {}
        self.taken, self._race_steps, self._bar = 0, 0, tqdm(disable=True)
        before = self._before(self._first)
        scale = Scale().completed_by([float(loss) for loss in before if math.isfinite(loss)] or [math.nan])
        self.highest = np.array([scale.times(_RATIO, max(loss, before[-1])) for loss in before[:-1]])
        self.betas = self._grid()

    def rungs(self, alphas: Tensor, betas: Tensor) -> Rungs:
        """Put runs at the start."""
        return Rungs(self._first, self._optimizers, alphas, betas, self._run_gradients, self._clip, self._hook)

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
        return self._run_gradients.losses(problem, copies(self._params, len(alphas)), alphas).double().cpu().numpy()

    def _grid(self) -> np.ndarray:
        """Outer rates, each twice the one before, from hardly any movement to beyond the parameters' own length."""
        present = scheduled_rate(self._optimizers)
        lowest = self.like.new_tensor(self.alphas[:1])
        gradients, _ = self._run_gradients.gradients(self._first, copies(self._params, 1), lowest)
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
        inner = len(self.alphas)
        self._largest_known, self._start = np.full(inner, math.nan), np.full(inner, math.nan)
        self._losses = np.full((inner, len(self.betas)), math.nan)
        with tqdm(total=self._most(), desc="rates", unit="step", disable=not self.options.progress) as self._bar:
            found = self._race(self._coarse())
        suggested, raced = np.full(inner, math.nan), np.full(inner, math.nan)
        for column, (loss, beta) in found.items():
            raced[column], suggested[column] = loss, beta
        return RateLadder(
            alphas=self.alphas,
            betas=self.betas,
            losses=self._losses,
            start=self._start,
            largest=self._largest_known,
            suggested=suggested,
            raced=raced,
            steps=self.options.steps,
            race_steps=self._race_steps,
            taken=self.taken,
            looped=self._run_gradients.looped,
            repeated=not self._fresh and not self.held,
        )

    def _most(self) -> int:
        """The steps of all runs together, if none is dropped because its loss diverged."""
        steps, inner = self.options.steps, len(self.alphas)
        first = min(max(steps // 4, LOOK), steps)
        most = inner * (-(-len(self.betas) // 2) * first + _KEPT_RUNGS * (steps - first))
        inner, done, more = _better_half(inner, 2), 0, steps
        while more > 0:
            most += inner * (2 * _KEPT_RUNGS + 1) * more
            inner, done = _better_half(inner), done + more
            more = min(done, self.options.longest - done)
        return most

    def _trial(self, rungs: Mapping[int, Sequence[int]]) -> tuple[Trial, np.ndarray, np.ndarray]:
        """Begin at some outer rates of each inner rate; returns the runs' indices of both rates too."""
        columns, places = np.array([(column, rung) for column in rungs for rung in rungs[column]]).T
        return Trial(self, list(zip(columns.tolist(), self.betas[places].tolist(), strict=True))), columns, places

    def _record(self, trial: Trial, columns: np.ndarray, places: np.ndarray, which: np.ndarray) -> None:
        """Keep the losses at the end of the rungs' steps, for the picture."""
        self._losses[columns[which], places[which]] = trial.end[which]
        self._start[columns] = trial.start

    def _coarse(self) -> dict[int, range]:
        """Try every other outer rate at every inner rate; returns the rungs to race at the better inner rates."""
        steps = self.options.steps
        first = min(max(steps // 4, LOOK), steps)
        rungs = list(range(len(self.betas) - 1, -1, -2))[::-1]
        trial, columns, places = self._trial(dict.fromkeys(range(len(self.alphas)), rungs))
        trial.advance(first, 0 if first < steps else first)
        active, keep = trial.active, np.zeros(len(columns), dtype=bool)
        for column in range(len(self.alphas)):
            own = np.flatnonzero(columns == column)
            stays = int(np.argmin([*active[own], False]))  # all below this one stayed
            keep[own[max(stays - _KEPT_RUNGS, 0) : stays]] = True
        trial.keep(keep)
        trial.advance(steps - first, max(steps // 4, 1))
        self._record(trial, columns, places, keep)
        best, race = dict[int, float](), dict[int, range]()
        for column in range(len(self.alphas)):
            own = keep & (columns == column)
            top = _largest(places, own, trial.trains)
            # Where none trains yet, the one of the lowest loss goes on: some networks learn nothing in so few steps.
            able = np.flatnonzero(own & trial.active & (places <= (len(self.betas) if top is None else top)))
            if not len(able):
                continue
            run = able[trial.end[able].argmin()]
            low, high = int(places[run]), int(places[run]) if top is None else top
            # From below the lowest loss, and below the share of the largest rate, to above that one.
            low = min(low, high + math.floor(math.log2(self.margin))) - 1
            best[column] = float(trial.end[run])
            race[column] = range(max(low, 0), min(high + 1, len(self.betas) - 1) + 1)
        better = sorted(best, key=best.__getitem__)[: _better_half(len(self.alphas), 2)]
        return {column: race[column] for column in better}

    def _race(self, rungs: dict[int, range]) -> dict[int, tuple[float, float]]:
        """Train rungs from the start and on new batches, ever fewer inner rates longer.

        Returns, of the inner rates that went on longest, the lowest loss up to the share of the largest outer rate that
        trains, and where it is.
        """
        self._race_steps, more = 0, self.options.steps
        if not rungs:
            return {}
        trial, columns, places = self._trial(rungs)
        going, asked = set(rungs), np.ones(len(columns), dtype=bool)
        while True:
            trial.advance(more, max(more // 4, 1))
            if not self._race_steps:
                self._record(trial, columns, places, np.ones(len(columns), dtype=bool))
            self._race_steps += more
            found, hopes, largest = dict[int, tuple[float, float]](), dict[int, float](), dict[int, int]()
            for column in going:
                own = trial.active & (columns == column)
                if not own.any():
                    continue
                # Of all that were to go on: one whose loss diverged is a gap.
                rung = _largest(places, asked & (columns == column), trial.trains)
                self._largest_known[column] = math.nan if rung is None else self.betas[rung]
                if rung is None:
                    hopes[column] = float(trial.end[own].min())
                    continue
                largest[column], found[column] = rung, self._lowest(trial, places, own, rung)
            # An inner rate at which nothing trains yet comes after those where something does.
            left = [*sorted(found, key=found.__getitem__), *sorted(hopes, key=hopes.__getitem__)]
            if not left or self._race_steps >= self.options.longest:
                return found
            # Only rungs that are trained on: an inner rate that fell behind keeps the largest rate that was seen.
            going = set(left[: _better_half(len(left))])
            top = [largest.get(column, len(self.betas)) for column in columns.tolist()]
            asked = np.isin(columns, list(going)) & (places <= top)
            trial.keep(asked)
            more = min(self._race_steps, self.options.longest - self._race_steps)

    def _lowest(self, trial: Trial, places: np.ndarray, own: np.ndarray, largest: int) -> tuple[float, float]:
        """The lowest loss of an inner rate's runs up to the share of the largest outer rate, and where it is."""
        cap = self.margin * self.betas[largest]
        able = np.flatnonzero(own & (self.betas[places] <= cap))
        if not len(able):  # the largest fell since: the loss is that nearest above
            return float(trial.end[own][places[own].argmin()]), float(cap)
        run = able[trial.end[able].argmin()]
        return float(trial.end[run]), float(self.betas[places[run]])


def _better_half(count: int, least: int = 1) -> int:
    return min(max(-(-count // 2), least), count)


def _largest(places: np.ndarray, which: np.ndarray, trains: np.ndarray) -> int | None:
    """The largest rung of some runs that trains, below the first that does not; None where none trains."""
    order = np.flatnonzero(which)
    found: int | None = None
    for run in order[np.argsort(places[order])]:
        if trains[run]:
            found = int(places[run])
        elif found is not None:
            break
    return found


def _norm(values: Params) -> float:
    return float(torch.stack([value.detach().float().norm() for value in values.values()]).norm())
