"""What a check sees of a run before it measures curvature: the next steps, the schedule, adaptation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import Lookahead, LookaheadResult, lookahead_of
from lightning_maml_guard.lookahead.resampled import resampled
from lightning_maml_guard.messages.reasons import Kind, Reason, of_error
from lightning_maml_guard.optim.shadow import ClosureError
from lightning_maml_guard.stability.adaptation import ENDS_COST, Adaptation, adaptation
from lightning_maml_guard.stability.problems import Problem, accumulated, dead_units, owners, state_problem

# A batch is odd if its loss at sane parameters is this many times the others' median; of more than so many.
ODD, OTHERS = 5.0, 3
# A run's parameters count as sane while its loss is below this many times the one that training started from.
_SANE = 1.5


@dataclass
class Look:
    """What a check sees of a run.

    Attributes:
        problem: The problem of the coming step.
        owned: Indices of the optimizers that move its parameters.
        optimizers: These optimizers.
        problems: The problem and those of the batches before it, the latest first.
        lookahead: Tries steps; None where it cannot.
        present: The lookahead of the median severity; None without one.
        scale: How losses are compared.
        severity: How far the lookahead takes the loss; ``nan`` without one.
        rises: Whether the schedule takes the meta rate higher than it is.
        adaptation: What adaptation does; None in plain training, or where it was not looked at.
    """

    problem: Problem
    owned: list[int]
    optimizers: list[Optimizer]
    problems: list[Problem] = field(default_factory=list)
    lookahead: Lookahead | None = None
    present: LookaheadResult | None = None
    scale: Scale = Scale()  # noqa: RUF009 (frozen)
    severity: float = math.nan
    rises: bool = False
    adaptation: Adaptation | None = None

    @property
    def adaptation_gain(self) -> float:
        """Logarithm of the loss before adaptation over the one after it; ``nan`` where it was not looked at."""
        return math.nan if self.adaptation is None else self.adaptation.gain

    @property
    def metrics(self) -> dict[str, float]:
        """What is logged of a look without a measurement."""
        values = {"guard/severity": self.severity, "guard/adaptation_gain": self.adaptation_gain}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    @property
    def cost(self) -> float:
        """What it cost beside the lookahead's gradients, in training steps."""
        return 0.0 if self.adaptation is None else ENDS_COST

    @property
    def findings(self) -> tuple[Reason, ...]:
        """What is wrong beside the next steps."""
        found = self.adaptation
        if found is None or not found.harmful:
            return ()
        at = found.diverges_at
        reason = Reason(
            Kind.ADAPTATION_HARMFUL,
            alpha=getattr(self.problem, "alpha", math.nan),
            losses=(found.before, found.after, math.nan),
            steps=0 if at is None else at,
        )
        return (reason,)

    @property
    def is_sane(self) -> bool:
        """Whether the run is still where it learned."""
        return self.lookahead is None or self.lookahead.begin <= self.scale.times(_SANE, self.scale.start)

    @property
    def died(self) -> tuple[Reason, ...]:
        """The units that are dead where the run is now, if most are and the loss has not left."""
        if not self.is_sane or not math.isfinite(self.severity):
            return ()
        found = dead_units(self.problem)
        return (Reason(Kind.UNITS_DIED, counts=(found.dead, found.units)),) if found.most else ()

    @property
    def harmful(self) -> bool:
        """Whether adaptation makes tasks worse."""
        return self.adaptation is not None and self.adaptation.harmful


def look_at(run: GuardedRun, trainer: Any, module: Any, batch: Any, batch_idx: int, step: int) -> Look:
    """Look at a run before a step."""
    problem, owned, optimizers = stated(run, trainer, module, batch, batch_idx)
    run.repeats = run.repeats or all(run.cache.ranks.gather(run.replay.repeats))
    run.turns.watch(optimizers)
    look = Look(problem, owned, optimizers, scale=run.state.statistics.scale)
    _look_ahead(look, run, trainer, module, step)
    look.adaptation = found = _adapted(run, problem)
    if found is not None:
        run.state.losses.adapt(step, found.before, found.after)
    return look


def stated(
    run: GuardedRun, trainer: Any, module: Any, batch: Any, batch_idx: int
) -> tuple[Problem, list[int], list[Optimizer]]:
    """State a step's problem, and the optimizers that move it with their indices.

    A step accumulates batches of which the first is at hand: those before it stand for the others.
    """
    more = trainer.accumulate_grad_batches - 1
    batches = [(batch, batch_idx), *(run.replay.earlier()[:more] if more else [])]
    problem = accumulated([state_problem(run.settings.problem, module, *each) for each in batches])
    owned = owners(problem, trainer.optimizers)
    return problem, owned, [trainer.optimizers[index] for index in owned]


def _look_ahead(look: Look, run: GuardedRun, trainer: Any, module: Any, step: int) -> None:
    options, size = run.settings.lookahead, trainer.accumulate_grad_batches
    if not options.steps or trainer.fast_dev_run:
        return
    earlier = run.replay.earlier()[size - 1 :]
    older = [state_problem(run.settings.problem, module, *each) for each in earlier]
    older = older[: min(run.cache.ranks.gather(len(older)))]  # as many on every rank
    groups = [older[first : first + size] for first in range(0, len(older) - size + 1, size)]
    look.problems = [look.problem, *map(accumulated, groups)]
    problems = fresh(run, look.problems)
    try:
        look.lookahead = lookahead_of(
            problems, look.optimizers, options.steps, trainer, run.cache, run.state.clipped_to
        )
    except ClosureError as error:
        run.announce(Reason(Kind.NO_LOOKAHEAD, detail=str(error)))
        return
    ratio, caps, scale = options.divergence_ratio, run.caps.caps, look.scale
    look.present, look.scale, look.severity = look.lookahead.judged(caps, scale, ratio)
    if look.lookahead.clipping_failure is not None:
        run.announce(of_error(Kind.CLIPPING_FAILED, look.lookahead.clipping_failure))
    now = look.lookahead.beta
    look.rises = run.highest_to_come(trainer, look.optimizers, step) > 1.01 * now > 0 and caps.beta is None


def fresh(run: GuardedRun, problems: Sequence[Problem]) -> list[Problem]:
    """Fill problems up to the lookahead's number, unless the run uses the same batch at every step."""
    return list(problems) if run.repeats else resampled(problems, run.settings.lookahead.batches)


def _adapted(run: GuardedRun, problem: Problem) -> Adaptation | None:
    found = adaptation(problem, run.cache.map_of(problem), each_step=False)
    return None if found is None else Adaptation.of(run.cache.ranks.gather(found))
