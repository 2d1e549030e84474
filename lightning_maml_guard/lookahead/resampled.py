"""Batches drawn from the tasks of those at hand: what training on fresh tasks will be like, before there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice

import torch

from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.stability.problems import AccumulatedProblem, Problem
from lightning_maml_guard.utils.task_map import chosen_tasks


def resampled(problems: Sequence[Problem], count: int) -> list[Problem]:
    """Fill a list of problems up to ``count`` with tasks drawn from theirs with replacement (the bootstrap).

    A batch tried again and again is learned by heart, and survives rates at which fresh tasks do not. Problems without
    tasks to draw from (plain training, a single task) are left as they are.
    """
    generator = torch.Generator().manual_seed(0)
    sources = [each for each in problems if _tasks(each) > 1]
    if not sources:
        return list(problems)
    missing = max(count - len(problems), 0)
    return [*problems, *(_drawn(each, generator) for each in islice(cycle(sources), missing))]


def _tasks(problem: Problem) -> int:
    return problem.tasks if isinstance(problem, (MetaProblem, AccumulatedProblem)) else 0


def _drawn(problem: Problem, generator: torch.Generator) -> Problem:
    if isinstance(problem, AccumulatedProblem):
        return AccumulatedProblem(tuple(_of_one(each, generator) for each in problem.parts))
    assert isinstance(problem, MetaProblem)
    return _of_one(problem, generator)


def _of_one(problem: MetaProblem, generator: torch.Generator) -> MetaProblem:
    chosen = torch.randint(problem.tasks, (problem.tasks,), generator=generator).tolist()
    support, query = (chosen_tasks(data, chosen) for data in (problem.support, problem.query))
    return replace(problem, support=support, query=query)
