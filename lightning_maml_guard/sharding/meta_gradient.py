"""MAML on sharded parameters: every process holds its pieces of ``theta`` and of the adapted parameters.

All processes go through the same tasks together: the loss of a task is the mean of the losses of the processes, each on
what it holds of the task's data (all of it, or its share of the examples). Second derivatives are finite differences of
gradients: with ``theta_{k+1} = theta_k - A g_k``, exact MAML's meta-gradient is ``v_0`` of ``v_K = g_Q`` and
``v_k = v_{k+1} - H(theta_k) A v_{k+1}``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.linalg.operators import Field, FieldValue
from lightning_maml_guard.sharding.own_backward import OwnBackward
from lightning_maml_guard.sharding.space import Split
from lightning_maml_guard.utils.random_state import preserved_randomness, seed_generators
from lightning_maml_guard.utils.shards import any_split
from lightning_maml_guard.utils.task_map import each_task

# (params, one task's data) -> scalar
TaskLoss = Callable[[Params, Any], Tensor]


class InnerStep(NamedTuple):
    """One inner step: where it began, the support loss there, its gradient if it is used again, rates and seed."""

    point: Params
    loss: Tensor
    gradient: Params
    rates: Params
    seed: int


class TaskGradient(NamedTuple):
    """One task's meta-gradient by pieces, its query loss after adaptation, and the adapted parameters."""

    gradient: Params
    loss: Tensor
    adapted: Params


@dataclass(frozen=True)
class ShardedMaml:
    """A MAML problem on sharded parameters.

    Attributes:
        own: Evaluates gradients.
        loss: The loss of one task.
        rates: The inner rates of each step, by piece; the last one stands for further steps.
        inner_steps: Number of inner steps.
        order: ``"exact"``, ``"first"`` or ``"simplified"``.
    """

    own: OwnBackward
    loss: TaskLoss
    rates: tuple[Params, ...]
    inner_steps: int
    order: str

    @classmethod
    def of(cls, problem: Any) -> ShardedMaml:
        """Read a MetaProblem whose parameters are split. Raises a NotImplementedError for an inner optimizer."""
        if problem.inner_update is not None:
            raise NotImplementedError(
                "An `inner_update` is not supported on sharded parameters. Leave it out: the inner loop is then "
                "gradient descent."
            )
        own = OwnBackward(problem.params, problem.task_loss)
        steps = problem.rate_by_step()
        each = steps if isinstance(steps, tuple) else (steps,)
        rates = tuple({name: _rate(own, name, rate) for name in problem.params} for rate in each)
        return cls(own, problem.loss, rates, problem.inner_steps, problem.order)

    @property
    def error(self) -> float:
        """Relative error of the meta-gradient, beside rounding: that of the differences in it."""
        kind = next(iter(self.own.live.values())).dtype
        return 0.0 if self.order == "first" else torch.finfo(kind).eps ** (2 / 3)

    def value(self, data: Any, at: Params) -> Tensor:
        """Compute the loss of one task's set at a point."""
        return self.own.value(partial(self._loss, data), at)

    def adapt(self, theta: Params, support: Any, steps: int | None = None) -> tuple[list[InnerStep], Params]:
        """Run the inner loop of one task; returns its steps and the adapted parameters."""
        found: list[InnerStep] = []
        for index in range(self.inner_steps if steps is None else steps):
            rates, seed = self.rates[min(index, len(self.rates) - 1)], int(torch.randint(2**31, ()))
            loss, gradient = self._gradient(support, theta, seed)
            kept = gradient if self.order == "simplified" and not index else {}
            found.append(InnerStep(theta, loss, kept, rates, seed))
            theta = {name: value - rates[name] * gradient[name] for name, value in theta.items()}
        return found, theta

    def of_task(self, theta: Params, support: Any, query: Any) -> TaskGradient:
        """Compute the meta-gradient of one task."""
        steps, adapted = self.adapt(theta, support)
        seed = int(torch.randint(2**31, ()))
        if self.order == "simplified":
            loss = self.value(query, adapted)
            moves = {name: torch.zeros_like(value) for name, value in theta.items()}
            for index in range(self.inner_steps):
                rates = self.rates[min(index, len(self.rates) - 1)]
                moves = {name: moves[name] + rates[name] * steps[0].gradient[name] for name in moves}
            _, slope = self._gradient(query, theta, seed)
            curved = self._product(query, theta, moves, seed)
            return TaskGradient({name: slope[name] - curved[name] for name in theta}, loss, adapted)
        loss, slope = self._gradient(query, adapted, seed)
        for step in reversed(steps if self.order == "exact" else ()):
            along = {name: step.rates[name] * value for name, value in slope.items()}
            curved = self._product(support, step.point, along, step.seed)
            slope = {name: value - curved[name] for name, value in slope.items()}
        return TaskGradient(slope, loss, adapted)

    def field(self, support: Any, query: Any) -> Field:
        """Make the gradient field of the meta-update, the mean over the tasks; its value is the mean query loss."""
        tasks = list(zip(each_task(support), each_task(query), strict=True))

        def field(params: Params, differentiable: bool) -> FieldValue:
            assert not differentiable, "a sharded module has no double backward"
            total: Params = {name: torch.zeros_like(value) for name, value in params.items()}
            losses = []
            point = {name: value.detach() for name, value in params.items()}
            for each in tasks:
                found = self.of_task(point, *each)
                losses.append(found.loss)
                for name, value in total.items():
                    value += found.gradient[name] / len(tasks)
            return FieldValue(torch.stack(losses).mean(), dict(total))

        return field

    def curvature(self, sets: Sequence[Any], *, per_task: bool) -> Field:
        """Make the gradient field of the mean task loss over some sets or, ``per_task``, of every task's side by side.

        The params of the latter have a leading task dimension.
        """
        tasks = [tuple(each) for each in zip(*map(each_task, sets), strict=True)]

        def of_task(task: tuple[Any, ...], at: Params) -> tuple[Tensor, Params]:
            found = [self.own.gradient(partial(self._loss, data), at) for data in task]
            losses, gradients = zip(*found, strict=True)
            return sum(losses) / len(task), {n: sum(each[n] for each in gradients) / len(task) for n in at}

        def field(params: Params, differentiable: bool) -> FieldValue:
            assert not differentiable, "a sharded module has no double backward"
            total: Tensor | None = None
            summed: dict[str, Tensor] = {}
            rows: list[Params] = []
            for index, task in enumerate(tasks):
                at = {name: (value[index] if per_task else value).detach() for name, value in params.items()}
                loss, gradient = of_task(task, at)
                total = loss if total is None else total + loss
                if per_task:
                    rows.append(gradient)
                else:
                    summed = {n: value + summed[n] if summed else value for n, value in gradient.items()}
            assert total is not None
            if per_task:
                return FieldValue(total, {name: torch.stack([row[name] for row in rows]) for name in params})
            return FieldValue(total / len(tasks), {name: value / len(tasks) for name, value in summed.items()})

        return field

    def curvature_by_task(self, theta: Params, direction: Params, support: Any, query: Any) -> Tensor:
        """Measure each task's curvature of the meta-update along a direction, ``u . J_task u``, shape ``(tasks,)``."""
        own, found = self.own, []
        kind = next(iter(theta.values())).dtype
        reach = max(self.error, torch.finfo(kind).eps) ** (1 / 3) * (1 + self._norm(theta)) / self._norm(direction)
        for each in zip(each_task(support), each_task(query), strict=True):
            ends = []
            for side in (reach, -reach):
                with preserved_randomness():
                    seed_generators()
                    moved = {name: value + side * direction[name] for name, value in theta.items()}
                    ends.append(own.dot(direction, self.of_task(moved, *each).gradient))
            found.append((ends[0] - ends[1]) / (2 * reach))
        return torch.stack(found)

    def _loss(self, data: Any, params: Params) -> Tensor:
        return self.loss(params, data)

    def _gradient(self, data: Any, at: Params, seed: int) -> tuple[Tensor, Params]:
        with preserved_randomness():
            torch.manual_seed(seed)
            return self.own.gradient(partial(self._loss, data), at)

    def _product(self, data: Any, at: Params, vector: Params, seed: int) -> Params:
        """Multiply the Hessian of a set's loss with a vector, by a central difference of gradients."""
        length = self._norm(vector)
        kind = next(iter(at.values())).dtype
        reach = torch.finfo(kind).eps ** (1 / 3) * (1 + self._norm(at)) / length.clamp(min=torch.finfo(kind).tiny)
        ahead, behind = (
            self._gradient(data, {n: value + side * reach * vector[n] for n, value in at.items()}, seed)[1]
            for side in (1.0, -1.0)
        )
        return {name: (ahead[name] - behind[name]) / (2 * reach) for name in at}

    def _norm(self, vector: Params) -> Tensor:
        return self.own.dot(vector, vector).sqrt()


def check_in_pieces(theta: Params, compiled: Any, learned_rates: Any, inner_update: Any) -> None:
    """Raise a ValueError for parameters, or options of a module, that sharded MAML does not take."""
    if not any_split(theta.values()):
        return
    Split(theta)
    given = {"compile": compiled, "learn_inner_lr": learned_rates, "inner_update": inner_update}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"Argument `{name}` is not supported where fully_shard splits the network: the meta-gradient is then "
                "computed by the network's own backward. Leave it out, or train with strategy='ddp'."
            )


def _rate(own: OwnBackward, name: str, rate: Any) -> Any:
    """A parameter's rate as its piece is moved: a number, or its piece; 0 where it is not adapted."""
    if isinstance(rate, dict):
        rate = rate.get(name, 0.0)
    if not isinstance(rate, Tensor) or not rate.dim():
        return float(rate)
    return own.space.piece(name, rate.expand(own.live[name].shape))
