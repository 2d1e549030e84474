"""Batches made of tasks drawn from the last ones: they stand for the new tasks of the steps to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch

from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem, Problem
from lightning_maml_guard.utils.task_map import chosen_tasks, joined_tasks


def resampled(problems: Sequence[Problem], count: int) -> list[Problem]:
    """Add batches up to ``count``, of tasks drawn with replacement from all those at hand (the bootstrap).

    A network memorises a few batches that are tried again and again, and survives rates at which it diverges on new
    tasks. Problems without tasks to draw from (plain training, a single task) are left as they are.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [part for each in problems for part in _parts(each)]
    if sum(part.tasks for part in parts) < 2:
        return list(problems)
    support, query = (joined_tasks([getattr(part, name) for part in parts]) for name in ("support", "query"))
    alike = support is not None and query is not None
    found = list(problems)
    for like in cycle(problems):
        if len(found) >= count:
            break
        # Tasks of different shapes are drawn from their own batch.
        drawn = [
            _drawn(part, *((support, query) if alike else (part.support, part.query)), generator)
            for part in _parts(like)
        ]
        found.append(AccumulatedProblem(tuple(drawn)) if isinstance(like, AccumulatedProblem) else drawn[0])
    return found


def _parts(problem: Problem) -> tuple[MetaProblem, ...]:
    if isinstance(problem, PlainProblem):
        return ()
    return problem.parts if isinstance(problem, AccumulatedProblem) else (problem,)


def _drawn(like: MetaProblem, support: Any, query: Any, generator: torch.Generator) -> MetaProblem:
    """A batch as large as another one."""
    count = replace(like, support=support, query=query).tasks
    chosen = torch.randint(count, (like.tasks,), generator=generator).tolist()
    return replace(like, support=chosen_tasks(support, chosen), query=chosen_tasks(query, chosen))
