"""What is measured of a problem: the gradient fields whose Jacobians are ``H`` and ``J``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_maml_guard.linalg.layout import Layout, Params, real_pairs, unpaired
from lightning_maml_guard.linalg.operators import Field, FieldValue, gradient_of, task_gradient
from lightning_maml_guard.maml.batch_errors import has_nan
from lightning_maml_guard.maml.jacobian import curvature_by_task, is_symmetric, meta_field
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.stability.inner_limit import inner_loop_limit
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem, Problem
from lightning_maml_guard.utils.task_map import TaskMap, as_float32

# What an operator is made of: a gradient field, where to take it, and the layout of one block if there are several.
Target = tuple[Field, Params, Layout | None]


class PlainObjective:
    """Plain training: the Hessian of the loss is the Jacobian of the update."""

    order, alpha, inner_steps, inner_limit, tasks = "", math.nan, 1, math.inf, 1
    rates: Params | None = None
    plain_steps, alpha_note = True, ""

    def __init__(self, problem: PlainProblem) -> None:
        self.live = problem.params
        self.params: Params = real_pairs(as_float32({name: value.detach() for name, value in problem.params.items()}))
        self.mean_loss: Callable[[Params], Tensor] = lambda pairs: problem.loss(unpaired(pairs, problem.params))

    def curvature(self, per_task: bool) -> Target:
        """Make the gradient field whose Jacobian is ``H``: of the mean task loss, or one block per task."""
        return gradient_of(self.mean_loss), self.params, None


class MamlObjective:
    """A MAML problem; ``data`` names the loss whose Hessian is ``H``: support, query or both.

    Of accumulated batches everything is the mean over them.
    """

    def __init__(self, stated: MetaProblem | AccumulatedProblem, data: str, task_map: TaskMap) -> None:
        parts = stated.parts if isinstance(stated, AccumulatedProblem) else (stated,)
        problem = parts[0]
        self.live, self.order, self.alpha = problem.params, problem.order, problem.alpha
        self.params: Params = as_float32({name: value.detach() for name, value in problem.params.items()})
        # The simplified criterion is about one step; K simplified steps act as K*alpha (theory.critical_rates).
        self.inner_steps = problem.inner_steps if problem.order == "simplified" else 1
        self.tasks = stated.tasks
        self.symmetric = is_symmetric(problem)
        inner = inner_loop_limit(problem)
        self.inner_limit, self.rates, self.alpha_note = inner.limit, inner.rates, inner.note
        self.lower_bound = inner.lower_bound
        # Whether the inner loop is the one of Takagi et al., whose beta_c the Hessian's spectrum has at hand.
        self.uniform_steps = problem.uniform and problem.inner_update is None
        self.plain_steps = not problem.per_step and problem.inner_update is None
        self._map = task_map
        self._problems = [in_float32(each) for each in parts]
        self._data = data

    @property
    def has_nan(self) -> bool:
        """Whether the data holds nan."""
        return any(map(has_nan, self._problems))

    def _sets(self, problem: MetaProblem) -> tuple[Any, ...]:
        support, query = problem.support, problem.query
        return {"support": (support,), "query": (query,)}.get(self._data, (support, query))

    def mean_loss(self, params: Params) -> Tensor:
        """Compute the mean over the tasks of the loss whose Hessian is measured."""
        means = [
            self._map(partial(_task_loss, each), params, self._sets(each), in_dims=(None, 0)).mean()
            for each in self._problems
        ]
        return means[0] if len(means) == 1 else torch.stack(means).mean()

    def curvature(self, per_task: bool) -> Target:
        """Make the gradient field whose Jacobian is ``H``: of the mean task loss, or one block per task."""
        targets = [
            task_gradient(
                partial(_task_loss, each),
                self.params,
                self._sets(each),
                per_task=per_task,
                tasks=self._map,
                count=each.tasks,
            )
            for each in self._problems
        ]
        if len(targets) == 1:
            return targets[0]
        fields = [field for field, _, _ in targets]
        if not per_task:
            return _mean_field(fields), self.params, None
        copies = {name: torch.cat([params[name] for _, params, _ in targets]) for name in self.params}
        return _side_by_side(fields, [each.tasks for each in self._problems]), copies, targets[0][2]

    def update(self, factor: float = 1.0) -> Target:
        """Make the gradient field of the configured update, whose Jacobian is ``J``, at scaled inner rates."""
        fields = [meta_field(each.at_factor(factor), self._map) for each in self._problems]
        return fields[0] if len(fields) == 1 else _mean_field(fields), self.params, None

    def curvature_by_task(self, direction: Params) -> Tensor:
        """Measure each task's curvature of the update along a direction, shape ``(tasks,)``."""
        found = [curvature_by_task(each, self.params, direction, self._map) for each in self._problems]
        return found[0] if len(found) == 1 else torch.cat(found)


def in_float32(problem: MetaProblem) -> MetaProblem:
    """Return a problem as it is measured: without a graph, its half-precision tensors in float32."""
    return replace(
        problem,
        params=as_float32({name: value.detach() for name, value in problem.params.items()}),
        support=as_float32(problem.support),
        query=as_float32(problem.query),
        inner_lr=problem.inner_lr if problem.uniform else as_float32(problem.inner_lr),
    )


def _task_loss(problem: MetaProblem, params: Params, sets: tuple[Any, ...]) -> Tensor:
    return sum(problem.loss(params, each) for each in sets) / len(sets)  # type: ignore[return-value]


def _mean_field(fields: Sequence[Field]) -> Field:
    """The mean of several gradient fields."""

    def field(params: Params, differentiable: bool) -> FieldValue:
        found = [each(params, differentiable) for each in fields]
        gradients: dict[str, Tensor | None] = {}
        for name in params:
            known = [gradient for each in found if (gradient := each.gradients[name]) is not None]
            gradients[name] = torch.stack(known).sum(0) / len(found) if known else None
        return FieldValue(torch.stack([each.value for each in found]).mean(), gradients)

    return field


def _side_by_side(fields: Sequence[Field], tasks: Sequence[int]) -> Field:
    """Fields of one block per task, one after another."""

    def field(params: Params, differentiable: bool) -> FieldValue:
        pieces = {name: value.split(list(tasks)) for name, value in params.items()}
        parts = [{name: each[index] for name, each in pieces.items()} for index in range(len(fields))]
        found = [each(part, differentiable) for each, part in zip(fields, parts, strict=True)]
        gradients: dict[str, Tensor | None] = {}
        for name in params:
            known = [each.gradients[name] for each in found]
            filled = [torch.zeros_like(part[name]) if g is None else g for g, part in zip(known, parts, strict=True)]
            gradients[name] = torch.cat(filled)
        return FieldValue(torch.stack([each.value for each in found]).sum(), gradients)

    return field


Objective = PlainObjective | MamlObjective


def objective_of(problem: Problem, data: str, task_map: TaskMap) -> Objective:
    """Make the objective of a problem."""
    return PlainObjective(problem) if isinstance(problem, PlainProblem) else MamlObjective(problem, data, task_map)
