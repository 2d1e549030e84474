"""Runs that differ in their learning rates, trained side by side on batches as they come, with torch's own optimizers.

:func:`~lightning_maml_guard.phase_diagram` trains a grid whose problems are known beforehand; here runs are dropped on
the way, and the optimizer, its groups, weight decay and clipping are those of a Lightning run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.linalg.operators import value_and_gradient
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.optim.clipping import ModuleClipping
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.shadow import Clip, ShadowOptimizer
from lightning_maml_guard.phase.gradients import (
    grid_gradient,
    grid_loss,
    runs_at_once,
    scaled_rates,
    vectorized,
)
from lightning_maml_guard.stability.objective import in_float32, objective_of
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem, Problem, at_alpha
from lightning_maml_guard.utils.checks import first_line
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.task_map import TaskMap, as_float32
from lightning_maml_guard.utils.warnings import GuardWarning

# The copies step at this rate, and each run takes its own share of the movement: a power of two, so that nothing is
# rounded, and large, so that small movements are not lost in the parameters.
_FULL = 2.0**20


class RunGradients:
    """Losses and gradients of many runs on one batch: vmapped over the runs, or one run after another.

    Attributes:
        looped: Whether the runs go one after another; from the first batch on that cannot be vmapped.
    """

    def __init__(self, tasks: TaskMap | None = None) -> None:
        self.looped = False
        self._tasks, self._size = tasks or TaskMap(), 0

    def gradients(self, problem: Problem, params: Params, alphas: Tensor) -> tuple[Params, Tensor]:
        """Return the gradient of every run and its loss, shape ``(runs,)``; ``params`` have a leading dimension."""
        return self._over(problem, params, alphas, _vmapped_gradient, self._gradient)

    def losses(self, problem: Problem, params: Params, alphas: Tensor) -> Tensor:
        """Return the loss of every run, shape ``(runs,)``."""
        found = self._over(problem, params, alphas, _vmapped_loss, lambda *given: ({}, self._gradient(*given)[1]))
        return found[1]

    def _over(
        self, problem: Problem, params: Params, alphas: Tensor, together: Any, alone: Any
    ) -> tuple[Params, Tensor]:
        if self.looped:
            return self._one_by_one(problem, params, alphas, alone)
        try:
            return self._vmapped(problem, params, alphas, together)
        except Exception as error:
            found = self._one_by_one(problem, params, alphas, alone)  # raises what is wrong with the loss itself
            self.looped = True
            warnings.warn(
                "The rungs of a ladder of rates cannot be vectorised, so they train one after another (slower, same "
                f"result). torch.func.vmap said: {first_line(error)}",
                GuardWarning,
                stacklevel=2,
            )
            return found

    @staticmethod
    def _one_by_one(problem: Problem, params: Params, alphas: Tensor, alone: Any) -> tuple[Params, Tensor]:
        return _joined([alone(problem, *_part(params, alphas, [run])) for run in range(len(alphas))])

    def _vmapped(self, problem: Problem, params: Params, alphas: Tensor, together: Any) -> tuple[Params, Tensor]:
        parts = problem.parts if isinstance(problem, AccumulatedProblem) else (problem,)
        if not self._size:
            first = parts[0]
            self._size = runs_at_once(first) if isinstance(first, MetaProblem) else len(alphas)
        found = []
        for runs in torch.arange(len(alphas)).split(self._size):
            each = [together(part, *_part(params, alphas, runs)) for part in parts]
            found.append(each[0] if len(each) == 1 else _mean(each))
        return _joined(found)

    def _gradient(self, problem: Problem, params: Params, alphas: Tensor) -> tuple[Params, Tensor]:
        """The gradient and the loss of one run."""
        at = {name: value[0] for name, value in params.items()}
        stated = problem if isinstance(problem, PlainProblem) else at_alpha(problem, float(alphas[0]))
        objective = objective_of(stated, "support", self._tasks)
        with double_backward():
            loss, gradient = value_and_gradient(objective.update().field, at)
        return {name: value.unsqueeze(0) for name, value in gradient.items()}, loss.detach().reshape(1)


def _part(params: Params, alphas: Tensor, runs: Any) -> tuple[Params, Tensor]:
    return {name: value[runs] for name, value in params.items()}, alphas[runs]


def _joined(parts: Sequence[tuple[Params, Tensor]]) -> tuple[Params, Tensor]:
    if len(parts) == 1:
        return parts[0]
    gradients, losses = zip(*parts, strict=True)
    return {name: torch.cat([each[name] for each in gradients]) for name in gradients[0]}, torch.cat(losses)


def _mean(parts: Sequence[tuple[Params, Tensor]]) -> tuple[Params, Tensor]:
    gradients, losses = zip(*parts, strict=True)
    mean = {name: torch.stack([each[name] for each in gradients]).mean(0) for name in gradients[0]}
    return mean, torch.stack(losses).mean(0)


def _vmapped_gradient(problem: MetaProblem | PlainProblem, params: Params, alphas: Tensor) -> tuple[Params, Tensor]:
    if isinstance(problem, MetaProblem):
        gradients, losses = grid_gradient(in_float32(problem), params, alphas, scaled_rates)
    else:
        with vectorized():
            gradients, losses = torch.func.vmap(torch.func.grad_and_value(problem.loss), randomness="different")(params)
    return {name: value.detach() for name, value in gradients.items()}, losses.detach()


def _vmapped_loss(problem: MetaProblem | PlainProblem, params: Params, alphas: Tensor) -> tuple[Params, Tensor]:
    if isinstance(problem, MetaProblem):
        return {}, grid_loss(in_float32(problem), params, alphas, scaled_rates).detach()
    with vectorized(), torch.no_grad():
        return {}, torch.func.vmap(problem.loss, randomness="different")(params)


class Rungs:
    """Runs from the same start, each at rates of its own.

    Args:
        problem: Any batch's problem; its parameters are the start.
        optimizers: What steps the parameters; their rates keep their proportions.
        alphas: Inner rate of each run, shape ``(runs,)``; ``nan`` in plain training.
        betas: Outer rate of each run, the largest over the parameter groups, shape ``(runs,)``.
        run_gradients: Computes losses and gradients.
        clip: Clips a list of parameters' gradients in place.
        hook: Clips as the module does.
    """

    def __init__(
        self,
        problem: Problem,
        optimizers: Sequence[Optimizer],
        alphas: Tensor,
        betas: Tensor,
        run_gradients: RunGradients,
        clip: Clip | None = None,
        hook: ModuleClipping | None = None,
    ) -> None:
        self.alphas, self.betas = alphas, betas
        self.index = torch.arange(len(alphas), device=alphas.device)  # of the runs that are still trained
        self._live = problem.params
        self._run_gradients, self._clip, self._hook = run_gradients, clip, hook
        self._shadow = ShadowOptimizer(optimizers, self._live, _FULL / scheduled_rate(optimizers), len(alphas))

    def __len__(self) -> int:
        return len(self.alphas)

    @property
    def params(self) -> Params:
        """The parameters of the runs, in float32 where they are narrower."""
        return as_float32(self._shadow.params)

    def step(self, problem: Problem) -> Tensor:
        """Train one step; returns the losses before it, shape ``(runs,)``."""
        gradients, losses = self._run_gradients.gradients(problem, self.params, self.alphas)
        gradients = self._clipped(gradients)
        before = {name: value.clone() for name, value in self._shadow.params.items()}
        self._shadow.step(gradients)
        share = self.betas / _FULL
        for name, value in self._shadow.params.items():
            moved = share.to(value.dtype).reshape(-1, *[1] * (value.dim() - 1)) * (value - before[name])
            value.copy_(before[name] + moved)
        return losses

    def losses(self, problem: Problem) -> Tensor:
        """Evaluate every run on a batch, shape ``(runs,)``."""
        return self._run_gradients.losses(problem, self.params, self.alphas)

    def keep(self, which: Tensor) -> None:
        """Go on with some of the runs, given as a mask."""
        if bool(which.all()):
            return
        chosen = which.nonzero().flatten()
        self._shadow.keep(chosen)
        self.index, self.alphas, self.betas = self.index[chosen], self.alphas[chosen], self.betas[chosen]

    def _clipped(self, gradients: Params) -> Params:
        """Clip each run by itself."""
        if self._clip is None and self._hook is None:
            return gradients
        clipped = {name: value.clone() for name, value in gradients.items()}
        for run in range(len(self)):
            for copy, names in self._shadow.owned():
                pairs = []
                for name in names:
                    replica = nn.Parameter(self._shadow.params[name][run].clone())
                    replica.grad = clipped[name][run]
                    pairs.append((replica, self._live[name]))
                if self._clip is not None:
                    self._clip([replica for replica, _ in pairs])
                if self._hook is not None:
                    self._hook(copy, pairs)
                for name, (replica, _) in zip(names, pairs, strict=True):
                    if replica.grad is not None:
                        clipped[name][run] = replica.grad
        return clipped
