"""What is measured of a problem: the gradient fields whose Jacobians are ``H`` and ``J``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_maml_guard.linalg.layout import Layout, Params, real_pairs, unpaired
from lightning_maml_guard.linalg.operators import Field, gradient_of, task_gradient
from lightning_maml_guard.maml.jacobian import curvature_by_task, is_symmetric, meta_field
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.stability.inner_limit import inner_loop_limit
from lightning_maml_guard.stability.problems import PlainProblem, Problem
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
    """A MAML problem; ``data`` names the loss whose Hessian is ``H``: support, query or both."""

    def __init__(self, problem: MetaProblem, data: str, task_map: TaskMap) -> None:
        self.live, self.order, self.alpha = problem.params, problem.order, problem.alpha
        self.params: Params = as_float32({name: value.detach() for name, value in problem.params.items()})
        # The simplified criterion is about one step; K simplified steps act as K*alpha (theory.critical_rates).
        self.inner_steps = problem.inner_steps if problem.order == "simplified" else 1
        self.tasks = problem.tasks
        self.symmetric = is_symmetric(problem)
        inner = inner_loop_limit(problem)
        self.inner_limit, self.rates, self.alpha_note = inner.limit, inner.rates, inner.note
        self.lower_bound = inner.lower_bound
        # Whether the inner loop is the one of Takagi et al., whose beta_c the Hessian's spectrum has at hand.
        self.uniform_steps = problem.uniform and problem.inner_update is None
        self.plain_steps = not problem.per_step and problem.inner_update is None
        self._map = task_map
        self._problem = replace(
            problem,
            support=as_float32(problem.support),
            query=as_float32(problem.query),
            inner_lr=problem.inner_lr if problem.uniform else as_float32(problem.inner_lr),
        )
        support, query = self._problem.support, self._problem.query
        self._sets = {"support": (support,), "query": (query,)}.get(data, (support, query))

    def _task_loss(self, params: Params, sets: tuple[Any, ...]) -> Tensor:
        return sum(self._problem.loss(params, each) for each in sets) / len(sets)  # type: ignore[return-value]

    def mean_loss(self, params: Params) -> Tensor:
        """Compute the mean over the tasks of the loss whose Hessian is measured."""
        return self._map(self._task_loss, params, self._sets, in_dims=(None, 0)).mean()

    def curvature(self, per_task: bool) -> Target:
        """Make the gradient field whose Jacobian is ``H``: of the mean task loss, or one block per task."""
        return task_gradient(
            self._task_loss, self.params, self._sets, per_task=per_task, tasks=self._map, count=self.tasks
        )

    def update(self, factor: float = 1.0) -> Target:
        """Make the gradient field of the configured update, whose Jacobian is ``J``, at scaled inner rates."""
        return meta_field(self._problem.at_factor(factor), self._map), self.params, None

    def curvature_by_task(self, direction: Params) -> Tensor:
        """Measure each task's curvature of the update along a direction, shape ``(tasks,)``."""
        return curvature_by_task(self._problem, self.params, direction, self._map)


Objective = PlainObjective | MamlObjective


def objective_of(problem: Problem, data: str, task_map: TaskMap) -> Objective:
    """Make the objective of a problem."""
    return PlainObjective(problem) if isinstance(problem, PlainProblem) else MamlObjective(problem, data, task_map)
