"""What a check sees of a run before it measures curvature: the next steps, the schedule, adaptation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.optim import Optimizer

from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.guard.schedule import SCHEDULED
from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import Caps, Lookahead, lookahead_of
from lightning_maml_guard.lookahead.new_tasks import enough_tasks
from lightning_maml_guard.lookahead.resampled import resampled
from lightning_maml_guard.lookahead.results import LookaheadResult
from lightning_maml_guard.maml.meta_learning import MetaLearning
from lightning_maml_guard.messages.reasons import Kind, Reason, of_error
from lightning_maml_guard.messages.sentences import rates_lowered
from lightning_maml_guard.messages.terminal import inform
from lightning_maml_guard.optim.lr_cap import known_rate, scheduled_rate
from lightning_maml_guard.optim.rates_ahead import read_ahead
from lightning_maml_guard.optim.shadow import ClosureError
from lightning_maml_guard.stability.adaptation import Adaptation, adaptation
from lightning_maml_guard.stability.problems import (
    Problem,
    accumulated,
    alpha_of,
    at_alpha,
    dead_units,
    has_meta_problem,
    inner_steps_of,
    owners,
    state_problem,
    takes_gradients,
)
from lightning_maml_guard.utils.isolation import undisturbed
from lightning_maml_guard.utils.lightning_compat import plan_of

# A run's parameters count as intact while its loss is below this many times the one that training started from.
_INTACT = 1.5
# Batches from one reading of a stated problem's inner rate to the next.
_READ = 8


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
        schedule_rises: Whether the schedule takes the outer rate higher than it is.
        alpha: The inner rate applied; ``nan`` in plain training.
        adaptation: What adaptation does at it; None in plain training, or where it was not looked at.
        last_loss: Loss of the last step where no step can be tried; None else, or where it is not known.
        representative: Whether the tasks at hand stand for those to come: they are many, or the same.
    """

    problem: Problem
    owned: list[int]
    optimizers: list[Optimizer]
    problems: list[Problem] = field(default_factory=list)
    lookahead: Lookahead | None = None
    present: LookaheadResult | None = None
    scale: Scale = Scale()  # noqa: RUF009 (a tuple)
    severity: float = math.nan
    schedule_rises: bool = False
    alpha: float = math.nan
    adaptation: Adaptation | None = None
    last_loss: float | None = None
    representative: bool = False

    @property
    def loss(self) -> float | None:
        """The loss where the run is, or of the last step."""
        return self.last_loss if self.present is None else self.present.begin

    @property
    def beta(self) -> float:
        """The scheduled outer rate, read once for the lookahead: on a device that waits; ``nan`` without one."""
        return math.nan if self.lookahead is None else self.lookahead.beta

    @property
    def adaptation_gain(self) -> float:
        """See :attr:`Adaptation.gain`; ``nan`` where it was not looked at."""
        return math.nan if self.adaptation is None else self.adaptation.gain

    @property
    def findings(self) -> tuple[Reason, ...]:
        """What is wrong beside the next steps."""
        found = self.adaptation
        if found is None or not self.stays_harmful:
            return ()
        losses, diverges_at = (found.before, found.after, math.nan), found.diverges_at or 0
        return (Reason(Kind.ADAPTATION_HARMFUL, alpha=self.alpha, losses=losses, steps=diverges_at),)

    @property
    def is_intact(self) -> bool:
        """Whether the loss is not much above the one that training started from."""
        return self.lookahead is None or self.lookahead.begin <= self.scale.times(_INTACT, self.scale.start)

    def may_miss_clipping(self, ratio: float) -> bool:
        """Whether the run may survive what the lookahead did not, because it clips out of sight; no inner loop does."""
        tried, found = self.lookahead, self.present
        if tried is None or found is None or self.harmful:
            return False
        return not tried.sees_clipping and not self.scale.diverged(found.begin, ratio)

    @property
    def died(self) -> tuple[Reason, ...]:
        """The units that are dead where the run is now, if most are and the loss has not left."""
        if not self.is_intact or not math.isfinite(self.severity):
            return ()
        found = dead_units(self.problem)
        return (Reason(Kind.UNITS_DIED, counts=(found.dead, found.units)),) if found.most else ()

    @property
    def harmful(self) -> bool:
        """Whether adaptation makes tasks worse."""
        return self.adaptation is not None and self.adaptation.harmful

    @property
    def stays_harmful(self) -> bool:
        """Whether adaptation makes tasks worse, and the next steps are not known to mend that."""
        found, present = self.adaptation, self.present if self.representative else None
        return self.harmful and not (found is not None and present is not None and present.end <= found.before)


def look_at(run: GuardedRun, trainer: Any, module: Any, batch: Any, batch_idx: int, step: int) -> Look:
    """Look at a run before a step."""
    problem, owned, optimizers = step_problem(run, trainer, module, batch, batch_idx)
    run.repeats = run.repeats or all(run.cache.ranks.gather(run.replay.repeats))
    run.turns.watch(optimizers)
    if len(optimizers) < len(trainer.optimizers):
        run.state.statistics.stalled = False  # a loss that others work against need not fall
    run.alpha = alpha_of(problem)
    if not run.state.history and run.settings.problem is None and not has_meta_problem(module):
        with undisturbed(trainer, module):
            own = takes_gradients(problem)
        if own:
            run.announce(Reason(Kind.OWN_GRADIENTS), just_said=not run.settings.acting.speaks)
    look = Look(problem, owned, optimizers, scale=run.state.statistics.scale)
    _look_ahead(look, run, trainer, module, step)
    look.representative = run.repeats or all(run.cache.ranks.gather(enough_tasks(look.problems)))
    look.alpha = run.caps.caps.applied(run.alpha, math.nan)[0]
    look.adaptation = found = _adaptation_of(run, at_alpha(problem, look.alpha) if look.alpha < run.alpha else problem)
    if found is not None:
        run.state.losses.note_adaptation(step, found.before, found.after)
    return look


def step_problem(
    run: GuardedRun, trainer: Any, module: Any, batch: Any, batch_idx: int
) -> tuple[Problem, list[int], list[Optimizer]]:
    """State a step's problem, and the optimizers that move it with their indices."""
    # Of the batches that a step accumulates only the first is at hand: those before it stand for the others.
    more = trainer.accumulate_grad_batches - 1
    batches = [(batch, batch_idx), *(run.replay.earlier()[:more] if more else [])]
    problem = problem_of(run, module, batches)
    owned = owners(problem, trainer.optimizers)
    return problem, owned, [trainer.optimizers[index] for index in owned]


def problem_of(run: GuardedRun, module: Any, batches: Sequence[tuple[Any, int]]) -> Problem:
    """State the problem of a step that accumulates these batches, each with its index."""
    return accumulated([state_problem(run.settings.problem, module, *each) for each in batches])


def _look_ahead(look: Look, run: GuardedRun, trainer: Any, module: Any, step: int) -> None:
    options, size = run.settings.lookahead, trainer.accumulate_grad_batches
    if not options.steps or trainer.fast_dev_run:
        return
    earlier = run.replay.earlier()[size - 1 :]
    older = [state_problem(run.settings.problem, module, *each) for each in earlier]
    older = older[: min(run.cache.ranks.gather(len(older)))]  # as many on every rank
    groups = [older[first : first + size] for first in range(0, len(older) - size + 1, size)]
    look.problems = [look.problem, *map(accumulated, groups)]
    problems, ratio, caps = with_resampled(run, look.problems), options.divergence_ratio, run.caps.caps
    try:
        look.lookahead = lookahead_of(
            problems, look.optimizers, options.steps, trainer, run.cache, run.state.clipped_to
        )
        look.present, look.scale, look.severity = look.lookahead.judged(caps, look.scale, ratio)
    except ClosureError as error:
        run.announce(Reason(Kind.NO_LOOKAHEAD, detail=str(error)))
        look.lookahead, look.last_loss = None, run.state.statistics.last
        return
    if look.lookahead.clipping_failure is not None:
        run.announce(of_error(Kind.CLIPPING_FAILED, look.lookahead.clipping_failure))
    peak = peak_ahead(run, trainer, look.optimizers, step)
    look.schedule_rises = peak > 1.01 * look.lookahead.beta > 0 and caps.beta is None


def peak_ahead(run: GuardedRun, trainer: Any, optimizers: list[Optimizer], step: int) -> float:
    """The highest outer rate that the schedule has from a step on; ``nan`` without a schedule."""
    if not trainer.lr_scheduler_configs:
        return math.nan
    if run.ahead is None or not run.ahead.matches(step, scheduled_rate(optimizers)):
        run.ahead = read_ahead(plan_of(trainer), optimizers, step)
        if run.ahead.failure is not None:
            run.announce(of_error(Kind.SCHEDULE_NOT_READ, run.ahead.failure))
    return run.ahead.peak(step)[0]


def due(run: GuardedRun, trainer: Any, module: Any, batch: Any, batch_idx: int, step: int) -> bool | None:
    """Whether a check that is due before a step is a scheduled one; None where none is due."""
    with run.warn_on_failure("read the inner rate"):
        _read_alpha(run, trainer, module, batch, batch_idx)
    rate, history, statistics = known_rate(trainer.optimizers), run.state.history, run.state.statistics
    rates = {"rate": rate, "alpha": run.alpha, **run.limits.of(history)}
    found = run.schedule.due(step, **rates, stalled=statistics.stalled, capped=run.is_capped(rate))
    return None if found is None else found == SCHEDULED


def _read_alpha(run: GuardedRun, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
    """Read the inner rate as configured; where a problem has to be stated for it, every few batches."""
    source = run.settings.problem
    if isinstance(module, MetaLearning) and source is None:
        rates = module.inner_lr
        run.alpha = max(rates) if isinstance(rates, list) else rates
    elif run.state.history and batch_idx % _READ == 0 and (source is not None or has_meta_problem(module)):
        with undisturbed(trainer, module):
            run.alpha = alpha_of(state_problem(source, module, batch, batch_idx))


def adjust_caps(run: GuardedRun, trainer: Any, module: Any, look: Look, step: int, *, left_best: bool) -> None:
    """Lower the caps of a run whose loss left its best or stagnates, else release them as far as lookaheads allow."""
    lookahead, caps, action = look.lookahead, run.caps.caps, run.settings.acting
    if lookahead is None or look.present is None:
        return
    alpha, beta, before = lookahead.alpha, lookahead.beta, lookahead.gradients
    stagnates = not left_best and run.is_capped(beta) and run.schedule.stagnates(step)
    raised_from = run.schedule.state.raised_from
    undo_raise = stagnates and raised_from < beta
    found, reach, given = caps, run.caps.reaches_alpha(module), (caps, look.present, lookahead, look.scale)
    with undisturbed(trainer, module):
        if undo_raise:
            found = caps.at_most(raised_from)
        elif left_best or stagnates:
            found = action.lower_further(*given, reach, stagnates)
        lowers = found != caps
        if not (left_best or lowers):
            allows = partial(may_try, run, alpha=alpha, beta=beta, step=step)
            found = action.release(*given, allows, advised_rates(run, look.problem))
    if lowers:
        run.state.ceiling = run.state.ceiling.with_failure(*caps.applied(alpha, beta), step)
        if run.state.capped != look.owned:
            run.cap_optimizers(trainer, look.owned)
        inform(rates_lowered(step, *found.applied(alpha, beta), left_best=left_best, raised=undo_raise))
    plan_next_caps_check(run, look, step, before, found)
    run.caps.apply(module, found)


def plan_next_caps_check(run: GuardedRun, look: Look, step: int, gradients: float, found: Caps) -> None:
    """Plan the next check of capped rates after one that found these caps; ``gradients``: computed before it."""
    was, now = (each.applied(math.nan, look.beta)[1] for each in (run.caps.caps, found))
    changed, tried = found != run.caps.caps, look.lookahead is None or look.lookahead.gradients > gradients
    until = 0 if tried or changed else run.state.ceiling.until
    run.schedule.note_caps_checked(step, changed=changed, until=until, raised_from=was if now > was else math.nan)


def advised_rates(run: GuardedRun, problem: Problem) -> Caps:
    """The advised rates, None where there is none: higher ones have to take the loss further down, not only survive."""
    advice, beta = run.state.advice, run.state.ceiling.advised
    alpha = advice.alpha if advice is not None and inner_steps_of(problem) > 1 else None
    return Caps(alpha, beta if beta < math.inf else None)


def may_try(run: GuardedRun, caps: Caps, *, alpha: float, beta: float, step: int) -> bool:
    """Whether higher rates may be tried: not if they have just failed, the loss left its best, or the run ends soon.

    Before the schedule's peak the cap on the outer rate is not lifted for what was tried at a lower rate.
    """
    rises = run.ahead is not None and run.ahead.peak(step)[0] > beta
    statistics, lifts_cap = run.state.statistics, run.caps.caps.beta is not None and caps.beta is None
    if statistics.has_left_best or run.schedule.ends_before(step) or (rises and lifts_cap):
        return False
    return run.state.ceiling.allows(caps, alpha, beta, step, learned=not math.isnan(statistics.scale.best))


def with_resampled(run: GuardedRun, problems: Sequence[Problem]) -> list[Problem]:
    """Fill problems up to the lookahead's number, unless the run uses the same batch at every step."""
    return list(problems) if run.repeats else resampled(problems, run.settings.lookahead.batches)


def _adaptation_of(run: GuardedRun, problem: Problem) -> Adaptation | None:
    found = adaptation(problem, run.cache.map_of(problem))
    return None if found is None else Adaptation.of(run.cache.ranks.gather(found))
