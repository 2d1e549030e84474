"""What adaptation does to a problem's tasks: the losses before and after it, and whether it harms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_maml_guard.maml.inner_loop import InnerRate, InnerUpdate, Params, TaskLoss, adapt
from lightning_maml_guard.maml.inner_updates import beside
from lightning_maml_guard.maml.meta_gradient import SideBySide
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.sharding.meta_gradient import ShardedMaml
from lightning_maml_guard.stability.objective import in_float32
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem, Problem
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.random_state import preserved_randomness, seed_generators
from lightning_maml_guard.utils.shards import any_split
from lightning_maml_guard.utils.task_map import TaskMap, each_task, task_count

# In training steps: the upper end of what `python -m benchmarks.hvp_cost` measures, which is that of first-order MAML
# (exact MAML: half as much).
COST = 1.5
# Adaptation is harmful if it raises the mean query loss by at least these shares (of losses below 0: shares of their
# spread over the tasks). The first: if the rise exceeds the noise over the tasks. The second: in any case, if the
# support loss rises, too. The second plus the third divided by the number of tasks: even if the support loss falls.
_CLEAR_RISE, _GROSS_RISE, _GROSS_PER_TASK = 0.25, 1.0, 8.0
# A mean rise of up to 3 + 6 / (tasks - 1) standard errors is noise; the error of fewer than 3 tasks says nothing.
_NOISE_ERRORS, _FEW_TASKS_ERRORS, _LEAST_TASKS = 3.0, 6.0, 3


@dataclass(frozen=True)
class Adaptation:
    """The losses of a batch's tasks before and after adaptation.

    Attributes:
        query: Query losses before and after it, shape ``(tasks, 2)``; float64 on the CPU.
        support: The support losses, which the inner loop descends, before it and after each step, shape ``(tasks, K +
            1)``.
        parts: Number of tasks of each accumulated batch, one after another; the mean is over the batches' means.
    """

    query: Tensor
    support: Tensor
    parts: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Adaptation]) -> Adaptation:
        """Join the adaptations of several batches, or of the processes that train together."""
        return cls(
            torch.cat([each.query for each in parts]),
            torch.cat([each.support for each in parts]),
            tuple(count for each in parts for count in each.parts),
        )

    @property
    def query_losses(self) -> list[float]:
        """Mean query loss before and after adaptation."""
        return (self._weights @ self.query).tolist()

    @property
    def support_losses(self) -> list[float]:
        """Mean support loss before adaptation and after each inner step."""
        return (self._weights @ self.support).tolist()

    @property
    def before(self) -> float:
        """Mean query loss before adaptation."""
        return self.query_losses[0]

    @property
    def after(self) -> float:
        """Mean query loss after adaptation."""
        return self.query_losses[1]

    @property
    def gain(self) -> float:
        """``log(before / after)``; of losses at or below 0 ``(before - after) / spread over the tasks``.

        ``-inf`` where only the loss after adaptation is not finite, ``nan`` where the one before is not.
        """
        before, after = self.before, self.after
        if not math.isfinite(before):
            return math.nan
        if not math.isfinite(after):
            return -math.inf
        if before > 0 and after > 0 and _no_negative(self.query):
            return math.log(before / after)
        return (before - after) / self._spread(self.query)

    @property
    def harmful(self) -> bool:
        """True if adaptation makes the query loss worse, by more than the noise over the tasks.

        That is: not finite after a finite one; or higher by a quarter and by ``3 + 6/(tasks - 1)`` standard errors of
        the mean over at least 3 tasks; or doubled, together with a support loss that rises; or ``2 + 8/tasks`` times as
        high. Of losses below 0, the spread over the tasks stands for the size.
        """
        support = self.support_losses
        overshoots = not support[-1] <= support[0]
        return self._rises(self.query, _GROSS_RISE if overshoots else _GROSS_RISE + _GROSS_PER_TASK / len(self.query))

    @property
    def diverges_at(self) -> int | None:
        """The first inner step with a support loss that is not finite, or above its start and rising to the end.

        None if it does not end higher than it started, by the rule of ``harmful``.
        """
        losses = self.support_losses
        if not math.isfinite(losses[0]):
            return None
        for step, loss in enumerate(losses):
            if not math.isfinite(loss):
                return step
        if not self._rises(self.support, _GROSS_RISE):
            return None
        step = len(losses) - 1
        while step > 1 and losses[0] < losses[step - 1] < losses[step]:
            step -= 1
        return step if losses[step] > losses[step - 1] else None

    @property
    def _weights(self) -> Tensor:
        """Each task's weight in the mean over batches of the mean over tasks."""
        each = [torch.full((count,), 1 / (count * len(self.parts)), dtype=torch.float64) for count in self.parts]
        return torch.cat(each)

    def _scale(self, losses: Tensor) -> float:
        """What a rise of the mean loss is compared with."""
        start = float(self._weights @ losses[:, 0])
        return start if start > 0 and _no_negative(losses) else self._spread(losses)

    def _spread(self, losses: Tensor) -> float:
        """Standard deviation over the tasks before adaptation; the size of the mean if there is none."""
        start = losses[:, 0]
        spread = float(start.std()) if len(start) > 1 else 0.0
        return spread or abs(float(self._weights @ start)) or 1.0

    def _rises(self, losses: Tensor, gross: float) -> bool:
        weights = self._weights
        rises = losses[:, -1] - losses[:, 0]
        mean = float(weights @ rises)
        if not bool(torch.isfinite(losses[:, 0]).all()):
            return False
        if not math.isfinite(mean):
            return True
        size = mean / self._scale(losses)
        if size >= gross or size < _CLEAR_RISE:
            return size >= gross
        count = len(weights)
        if count < _LEAST_TASKS:
            return False
        error = math.sqrt(float((weights * weights * (rises - mean) ** 2).sum()) * count / (count - 1))
        return mean > (_NOISE_ERRORS + _FEW_TASKS_ERRORS / (count - 1)) * error


def _no_negative(losses: Tensor) -> bool:
    return bool((losses[:, [0, -1]] >= 0).all())


def adaptation(problem: Problem, task_map: TaskMap) -> Adaptation | None:
    """Adapt to a problem's tasks as its inner loop does; None for plain training.

    Dropout draws the same masks at each call, and for the query sets before and after. Putting parameters, buffers and
    random states back is left to the caller.
    """
    if isinstance(problem, PlainProblem):
        return None
    parts = problem.parts if isinstance(problem, AccumulatedProblem) else (problem,)
    with preserved_randomness(), double_backward(), torch.no_grad():
        seed_generators()
        return Adaptation.of([_of_batch(in_float32(each), task_map) for each in parts])


def _of_shards(problem: MetaProblem) -> Adaptation:
    """The same on sharded parameters, one task after another."""
    maml = ShardedMaml.of(problem)
    queries, supports, theta = [], [], maml.own.point()
    for support, query in zip(each_task(problem.support), each_task(problem.query), strict=True):
        steps, adapted = maml.adapt(theta, support)
        queries.append(torch.stack([maml.value(query, point) for point in (theta, adapted)]))
        supports.append(torch.stack([*(step.loss for step in steps), maml.value(support, adapted)]))
    query, support = (torch.stack(each).detach().double().cpu() for each in (queries, supports))
    return Adaptation(query, support, (problem.tasks,))


def _of_batch(problem: MetaProblem, task_map: TaskMap) -> Adaptation:
    if any_split(problem.params.values()):
        return _of_shards(problem)
    params, rates, steps = problem.params, problem.rate_by_step(), problem.inner_steps

    def one(support: Any, query: Any) -> tuple[Tensor, Tensor]:
        return _losses(problem.loss, params, rates, support, query, steps, problem.inner_update)

    def together(support: Any, query: Any) -> tuple[Tensor, Tensor]:
        side = SideBySide(params, rates, task_count(support, "support"))
        loss, update = problem.side_by_side(), beside(problem.inner_update)
        return _losses(loss, side.params, side.rates, support, query, steps, update)

    query, support = task_map.apply(one, together, problem.support, problem.query)
    # The device is waited for once.
    both = torch.cat([query.double(), support.double()], -1).cpu()
    return Adaptation(both[:, :2], both[:, 2:], (problem.tasks,))


def _losses(
    loss: TaskLoss,
    params: Params,
    rates: InnerRate,
    support: Any,
    query: Any,
    steps: int,
    update: InnerUpdate,
) -> tuple[Tensor, Tensor]:
    """The query losses at both ends of the inner loop and the support losses along it, in a last dimension."""
    seed = int(torch.randint(2**31, ()))
    queries: list[Tensor] = []
    supports: list[Tensor] = []

    def seen(point: Params, data: Any) -> Tensor:
        # The loss that the inner loop takes the gradient of: it passes each point on the way.
        own = loss(point, data)
        if len(supports) in {0, steps}:
            with preserved_randomness():
                torch.manual_seed(seed)
                queries.append(loss({name: value.detach() for name, value in point.items()}, query).detach())
        supports.append(own.detach())
        return own

    adapted = adapt(seen, params, support, rates, steps, update)
    with torch.enable_grad():
        seen(adapted, support)
    return torch.stack(queries, -1), torch.stack(supports, -1)
