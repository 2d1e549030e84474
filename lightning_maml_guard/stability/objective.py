"""What is measured of a problem: the gradient fields whose Jacobians are ``H`` and ``J``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_maml_guard.kernels.shared_weights import StackLosses
from lightning_maml_guard.linalg.layout import WHOLE, Layout, Params, Space, real_pairs, unpaired
from lightning_maml_guard.linalg.operators import Field, FieldValue, gradient_of, gradients_by_task
from lightning_maml_guard.maml.batch_errors import has_nan
from lightning_maml_guard.maml.inner_loop import InnerRate
from lightning_maml_guard.maml.jacobian import curvature_by_task, is_symmetric, meta_field, query_losses
from lightning_maml_guard.maml.meta_gradient import meta_gradient_at
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.sharding.meta_gradient import ShardedMaml
from lightning_maml_guard.sharding.own_backward import OwnBackward
from lightning_maml_guard.stability.inner_limit import inner_loop_limit
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem, Problem
from lightning_maml_guard.utils.shards import any_split
from lightning_maml_guard.utils.task_map import TaskMap, as_float32


class Target(NamedTuple):
    """What an operator is made of.

    Attributes:
        field: A gradient field.
        params: Where to take it.
        block: The layout of one block if there are several.
        space: Where the vectors' entries lie.
        error: Relative error of the field, beside rounding.
    """

    field: Field
    params: Params
    block: Layout | None = None
    space: Space = WHOLE
    error: float = 0.0


class PlainObjective:
    """Plain training: the Hessian of the loss is the Jacobian of the update."""

    order, alpha, inner_steps, inner_limit, tasks = "", math.nan, 1, math.inf, 1
    rates: Params | None = None
    plain_steps, alpha_note = True, ""

    def __init__(self, problem: PlainProblem) -> None:
        self.live = problem.params
        self.params: Params
        self.mean_loss: Callable[[Params], Tensor]
        self.space: Space = WHOLE
        self._field: Field | None = None
        if any_split(problem.params.values()):
            own = OwnBackward(problem.params, problem.loss)
            self.params, self.space, self._field = own.point(), own.space, own.field(problem.loss)
            self.mean_loss = partial(own.value, problem.loss)
            return
        self.params = real_pairs(as_float32({name: value.detach() for name, value in problem.params.items()}))
        self.mean_loss = lambda pairs: problem.loss(unpaired(pairs, problem.params))

    def loss(self, params: Params, factor: float = 1.0) -> Tensor:
        """Compute the loss; there are no inner rates to scale."""
        if self._field is not None:
            return self._field(params, False).value
        # With a graph: the loss may hold gradients of its own.
        return self.mean_loss({name: value.detach().requires_grad_() for name, value in params.items()}).detach()

    def curvature(self, per_task: bool) -> Target:
        """Make the gradient field whose Jacobian is ``H``: of the mean task loss, or one block per task."""
        return Target(self._field or gradient_of(self.mean_loss), self.params, space=self.space)

    def update(self, factor: float = 1.0) -> Target:
        """Make the gradient field of the update, that of the loss: there are no inner rates to scale."""
        return self.curvature(False)


class MamlObjective:
    """A MAML problem; ``data`` names the loss whose Hessian is ``H``: support, query or both.

    Of accumulated batches everything is the mean over them.
    """

    def __init__(self, stated: MetaProblem | AccumulatedProblem, data: str, task_map: TaskMap) -> None:
        parts = stated.parts if isinstance(stated, AccumulatedProblem) else (stated,)
        problem = parts[0]
        self.live, self.order, self.alpha = problem.params, problem.order, problem.alpha
        self._sharded: list[ShardedMaml] = []
        if any_split(problem.params.values()):
            self._sharded = [ShardedMaml.of(each) for each in parts]
        own = self._sharded[0].own if self._sharded else None
        self.space: Space = WHOLE if own is None else own.space
        self.params: Params = in_float32(problem).params if own is None else own.point()
        # The simplified criterion is about one step; K simplified steps act as K*alpha (theory.critical_rates).
        self.inner_steps = problem.inner_steps if problem.order == "simplified" else 1
        self.tasks = stated.tasks
        self.symmetric = is_symmetric(problem)
        inner = inner_loop_limit(problem)
        self.inner_limit, self.rates, self.alpha_note = inner.limit, inner.rates, inner.note
        if own is not None and inner.rates is not None:
            self.rates = {name: own.space.piece(name, rate) for name, rate in inner.rates.items()}
        self.lower_bound = inner.lower_bound
        # Whether the inner loop is that of Takagi et al., whose beta_c follows from the Hessian's spectrum.
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
        if self._sharded:
            return self.curvature(False).field(params, False).value
        means = [self._mean_of(each)(params) for each in self._problems]
        return means[0] if len(means) == 1 else torch.stack(means).mean()

    def curvature(self, per_task: bool) -> Target:
        """Make the gradient field whose Jacobian is ``H``: of the mean task loss, or one block per task."""
        if self._sharded:
            return self._sharded_curvature(per_task)
        if not per_task:
            fields = [gradient_of(self._mean_of(each)) for each in self._problems]
            return Target(fields[0] if len(fields) == 1 else _mean_field(fields), self.params)
        targets = [
            gradients_by_task(partial(_task_loss, each), self.params, self._sets(each), self._map, each.tasks)
            for each in self._problems
        ]
        if len(targets) == 1:
            return Target(*targets[0])
        fields = [field for field, _, _ in targets]
        copies = {name: torch.cat([params[name] for _, params, _ in targets]) for name in self.params}
        return Target(_side_by_side(fields, [each.tasks for each in self._problems]), copies, targets[0][2])

    def _mean_of(self, problem: MetaProblem) -> Callable[[Params], Tensor]:
        """The mean loss of a batch's tasks as a function of the parameters they share."""
        sets, stack = self._sets(problem), problem.task_losses
        if isinstance(stack, StackLosses) and (problem.shares_weights or not problem.looped):
            return lambda params: torch.stack([stack.at(params, each) for each in sets]).mean()
        return lambda params: self._map(partial(_task_loss, problem), params, sets, in_dims=(None, 0)).mean()

    def _sharded_curvature(self, per_task: bool) -> Target:
        pairs = zip(self._sharded, self._problems, strict=True)
        fields = [maml.curvature(self._sets(each), per_task=per_task) for maml, each in pairs]
        if not per_task:
            return Target(fields[0] if len(fields) == 1 else _mean_field(fields), self.params, space=self.space)
        block = Layout(self.params, self.space)
        copies = {name: value.expand(self.tasks, *value.shape) for name, value in self.params.items()}
        counts = [each.tasks for each in self._problems]
        field = fields[0] if len(fields) == 1 else _side_by_side(fields, counts)
        return Target(field, copies, block, self.space)

    def loss(self, params: Params, factor: float = 1.0) -> Tensor:
        """Compute the mean query loss after adaptation at scaled inner rates, without its gradient."""
        if self._sharded:
            return self.update(factor).field(params, False).value
        return torch.stack([query_losses(each, params, factor, self._map).mean() for each in self._problems]).mean()

    def update(self, factor: float = 1.0) -> Target:
        """Make the gradient field of the configured update, whose Jacobian is ``J``, at scaled inner rates."""
        if self._sharded:
            scaled = [ShardedMaml.of(each.at_factor(factor)) for each in self._problems]
            fields = [maml.field(each.support, each.query) for maml, each in zip(scaled, self._problems, strict=True)]
            error = scaled[0].error
        else:
            fields, error = [meta_field(each.at_factor(factor), self._map) for each in self._problems], 0.0
        field = fields[0] if len(fields) == 1 else _mean_field(fields)
        return Target(field, self.params, space=self.space, error=error)

    def update_and_rates(self, params: Params, rates: InnerRate) -> tuple[Tensor, Params, tuple[Params, ...]]:
        """Compute the query loss, the configured update's gradient and that of the inner rates, of each step's."""
        with torch.no_grad():
            found = [meta_gradient_at(each, params, rates, self._map, learn_rates=True) for each in self._problems]
        steps = [
            each.rate_gradients if isinstance(each.rate_gradients, tuple) else (each.rate_gradients,) for each in found
        ]
        values = torch.stack([each.losses.mean() for each in found]).mean()
        return values, _mean([each.gradients for each in found]), tuple(map(_mean, zip(*steps, strict=True)))

    def curvature_by_task(self, direction: Params) -> Tensor:
        """Measure each task's curvature of the update along a direction, shape ``(tasks,)``."""
        pairs = zip(self._sharded, self._problems, strict=False)
        found = [maml.curvature_by_task(self.params, direction, each.support, each.query) for maml, each in pairs] or [
            curvature_by_task(each, self.params, direction, self._map) for each in self._problems
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


def in_float32(problem: MetaProblem) -> MetaProblem:
    """Return a problem as it is measured: without a graph, its half-precision tensors in float32.

    Sharded parameters stay the live ones, in which their module computes.
    """
    params = problem.params
    if not any_split(params.values()):
        params = as_float32({name: value.detach() for name, value in params.items()})
    return replace(
        problem,
        params=params,
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


def _mean(found: Sequence[Any]) -> Params:
    return {name: torch.stack([each[name] for each in found]).mean(0) for name in found[0]}


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
