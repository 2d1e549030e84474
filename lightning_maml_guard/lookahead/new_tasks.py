"""What trials lead to on other tasks than those they train on."""

from __future__ import annotations

import math
import sys
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
        peak: Peak of the schedule over the outer rate at hand, to which factors on that rate are relative.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        lookahead_of: Callable[[Sequence[Problem]], Lookahead],
        ranks: Ranks,
        peak: float = 1.0,
    ) -> None:
        self._problems, self._lookahead_of, self._ranks, self._peak = problems, lookahead_of, ranks, peak
        self._ends: dict[tuple[Factors, int], float] = {}

    @property
    def known(self) -> bool:
        """Whether there are enough tasks to hold some out."""
        return self._lookahead is not None

    def learned(self, factors: Factors, steps: int) -> float:
        """By how much so many steps take the loss of the tasks held out below ``before``; ``-inf`` if they diverge."""
        return self.before - self._end(factors, steps)

    def learn_more(
        self, rates: Sequence[Factors], other: Factors, steps: int, factor: float = 1.0, share: float = 0.0
    ) -> bool:
        """Whether one of some rates learns more than ``factor`` times what another does, by a share of ``before``."""
        least = factor * max(self.learned(other, steps), 0.0) + share * abs(self.before) if rates else math.inf
        return any(self.learned(each, steps) > least for each in rates)

    @property
    def before(self) -> float:
        """Loss of the tasks held out before any step, with or without adaptation, whichever is lower."""
        return min(self._end(Factors(alpha), 0) for alpha in (0.0, 1.0))

    def _end(self, factors: Factors, steps: int) -> float:
        assert self._lookahead is not None
        key = factors, steps
        if key not in self._ends:
            # What is no longer finite has learned nothing: the rest of the steps is left out.
            self._ends[key] = self._lookahead.run(
                factors.alpha, factors.beta * self._peak, steps=steps, highest=sys.float_info.max
            ).end
        return self._ends[key]

    @cached_property
    def _lookahead(self) -> Lookahead | None:
        if not all(self._ranks.gather(enough_tasks(self._problems))):
            return None
        splits = [_split(each) for each in self._problems if not isinstance(each, PlainProblem)]
        lookahead = self._lookahead_of([trained for trained, _ in splits])
        lookahead.evaluate_after([held_out for _, held_out in splits])
        return lookahead


def enough_tasks(problems: Sequence[Problem]) -> bool:
    """Return True if some tasks can be held out of each of these batches, and enough of all."""
    known = [each for each in problems if not isinstance(each, PlainProblem)]
    parts = [part for each in known for part in (each.parts if isinstance(each, AccumulatedProblem) else (each,))]
    held_out = [part.tasks // _SHARE for part in parts]
    return len(known) == len(problems) and min(held_out, default=0) > 0 and sum(held_out) >= _LEAST


def _split(problem: _Maml) -> tuple[_Maml, _Maml]:
    """The tasks to train on, and those to hold out."""
    if isinstance(problem, AccumulatedProblem):
        trained, held_out = zip(*map(_split, problem.parts), strict=True)
        return AccumulatedProblem(trained), AccumulatedProblem(held_out)
    held = problem.tasks // _SHARE
    return _part(problem, range(held, problem.tasks)), _part(problem, range(held))


def _part(problem: MetaProblem, tasks: Sequence[int]) -> MetaProblem:
    return replace(problem, support=chosen_tasks(problem.support, tasks), query=chosen_tasks(problem.query, tasks))
