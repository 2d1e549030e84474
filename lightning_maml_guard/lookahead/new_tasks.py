"""What trials lead to on other tasks than those they train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

from lightning_maml_guard.lookahead.lookahead import Lookahead
from lightning_maml_guard.lookahead.results import Factors
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem, Problem
from lightning_maml_guard.utils.distributed import Ranks
from lightning_maml_guard.utils.task_map import chosen_tasks

# One task of so many is held out; fewer than so many held-out tasks say nothing.
_SHARE, _LEAST = 4, 4


_Maml = MetaProblem | AccumulatedProblem


class NewTasks:
    """Tries rates on some of the tasks at hand, and evaluates the others after that.

    A network that adapts little memorises the few tasks of a trial soon, which helps no other task. So trials of
    different inner rates are not compared by the tasks that they train on alone.

    Args:
        problems: The batches at hand.
        lookahead_of: Makes the lookahead of some batches.
        ranks: The processes that train together.
    """

    def __init__(
        self, problems: Sequence[Problem], lookahead_of: Callable[[Sequence[Problem]], Lookahead], ranks: Ranks
    ) -> None:
        self._problems, self._lookahead_of, self._ranks = problems, lookahead_of, ranks
        self._ends: dict[tuple[Factors, int], float] = {}

    @property
    def known(self) -> bool:
        """Whether there are enough tasks to hold some out."""
        return self._lookahead is not None

    def learned(self, factors: Factors, steps: int) -> float:
        """By how much so many steps take the loss of the tasks held out below ``before``; ``-inf`` if they diverge."""
        return self.before - self._end(factors, steps)

    @property
    def before(self) -> float:
        """Loss of the tasks held out before any step, with or without adaptation, whichever is lower."""
        return min(self._end(Factors(alpha), 0) for alpha in (0.0, 1.0))

    def _end(self, factors: Factors, steps: int) -> float:
        assert self._lookahead is not None
        key = factors, steps
        if key not in self._ends:
            self._ends[key] = self._lookahead.run(*factors, steps=steps).end
        return self._ends[key]

    @cached_property
    def _lookahead(self) -> Lookahead | None:
        splits = [_split(each) for each in self._problems]
        known = [each for each in splits if each is not None]
        enough = len(known) == len(splits) and sum(held_out.tasks for _, held_out in known) >= _LEAST
        if not all(self._ranks.gather(enough)):
            return None
        lookahead = self._lookahead_of([trained for trained, _ in known])
        lookahead.evaluate_after([held_out for _, held_out in known])
        return lookahead


def _split(problem: Problem) -> tuple[_Maml, _Maml] | None:
    """The tasks to train on and those to hold out; None if there are too few."""
    if isinstance(problem, PlainProblem):
        return None
    if isinstance(problem, AccumulatedProblem):
        parts = [_split(each) for each in problem.parts]
        known = [each for each in parts if each is not None]
        if len(known) < len(parts):
            return None
        trained, held_out = zip(*known, strict=True)
        return AccumulatedProblem(tuple(trained)), AccumulatedProblem(tuple(held_out))
    held = problem.tasks // _SHARE
    return (_part(problem, range(held, problem.tasks)), _part(problem, range(held))) if held else None


def _part(problem: MetaProblem, tasks: Sequence[int]) -> MetaProblem:
    return replace(problem, support=chosen_tasks(problem.support, tasks), query=chosen_tasks(problem.query, tasks))
