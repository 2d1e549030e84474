"""One check of a run: look ahead, measure the curvature, decide, act."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_maml_guard.guard.actions import Situation
from lightning_maml_guard.guard.divergence import fails, passes, undecided
from lightning_maml_guard.guard.loggers import inform, log_values, metrics, warn
from lightning_maml_guard.guard.lookahead import Caps, Lookahead, LookaheadResult, lookahead_of
from lightning_maml_guard.guard.report import CheckReport
from lightning_maml_guard.guard.rescale import reaches_alpha
from lightning_maml_guard.guard.rollback import Rollback, finite
from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.guard.state_machine import Transition
from lightning_maml_guard.maml.meta_learning import MetaLearning
from lightning_maml_guard.messages.reasons import Kind, Reason, Remedy, of_error
from lightning_maml_guard.messages.sentences import left_safe_region, returned
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.shadow import ClosureError
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.stability.objective import objective_of
from lightning_maml_guard.stability.problems import Problem, accumulated, has_meta_problem, owners, state_problem
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.stability.training_match import TrainingMatch
from lightning_maml_guard.theory.limits import SAFE, UNRESOLVED, UNSAFE
from lightning_maml_guard.utils.distributed import SharedError
from lightning_maml_guard.utils.isolation import undisturbed
from lightning_maml_guard.utils.warnings import GuardWarning

# Shares of the largest curvature so far and of the loss at the start: a collapsed network has hardly any of the first
# left, and is not below the second.
_COLLAPSED, _UNLEARNED = 0.15, 0.8


class Check:
    """One check of a run; it leaves the run as it was where it fails."""

    def __init__(self, run: GuardedRun, trainer: Any, module: Any) -> None:
        self.settings, self.run, self.trainer, self.module = run.settings, run, trainer, module
        self.rollback = Rollback(run, trainer, module)
        # Where the run was rolled back by this check: what lowers its rates if the rest of the check fails.
        self._rolled_back: tuple[list[Optimizer], LookaheadResult] | None = None
        self._acted = False

    def check(self, batch: Any, batch_idx: int, step: int, *, scheduled: bool) -> None:
        """Check once, on the batch of the coming step; a triggered check that finds nothing ends early."""
        run, watches = self.run, self.run.machine.watches
        try:
            with run.cache.ranks.together():
                self._check(batch, batch_idx, step, scheduled)
        except GuardWarning:
            raise
        except Exception as error:
            # Whatever goes wrong in a check, training goes on as if the guard were not there. A state that it changed
            # without acting on it is changed again by the next.
            if not self._acted:
                run.machine.watches = watches
            run.announce(_failure(error, step))
            if self._rolled_back is not None:
                optimizers, present = self._rolled_back
                self.rollback.halve(present.begin, scheduled_rate(optimizers), step)

    def cap(self, owned: list[int]) -> None:
        """Hold the optimizers that move the problem's parameters at the caps."""
        run, optimizers = self.run, self.trainer.optimizers
        # Lightning's tuners step the run's optimizers with the run's callbacks taken out, to see what a rate does.
        run.caps.hold(
            [optimizers[index] for index in owned if index < len(optimizers)],
            lambda: self.settings in self.trainer.callbacks,
        )
        run.state.capped = owned  # only now: a failure is met again, and told again, at the next check

    def end(self) -> None:
        """Roll back a last step that made the run diverge: no check comes after it."""
        run, statistics, ratio = self.run, self.run.state.statistics, self.settings.lookahead.divergence_ratio
        if run.snapshot is None:
            return
        if not finite(self.module):
            self.rollback.at_end(run.snapshot, math.nan, math.nan)
        elif len(run.replay) and (
            run.schedule.state.spiked or not statistics.first
        ):  # nothing else tells without losses
            with run.cache.ranks.together(), undisturbed(self.trainer, self.module):
                problem, _, optimizers = self._stated(*run.replay.latest())
                loss = lookahead_of([problem], optimizers, 0, self.trainer, run.cache).under(run.caps.caps).begin
            if statistics.diverged(loss, ratio):
                self.rollback.at_end(run.snapshot, loss, statistics.start)

    def _check(self, batch: Any, batch_idx: int, step: int, scheduled: bool) -> None:
        settings, run, trainer, module = self.settings, self.run, self.trainer, self.module
        ratio, statistics = settings.lookahead.divergence_ratio, run.state.statistics
        present, failing, severe, start = None, False, math.nan, math.nan
        # 1. Look ahead.
        with undisturbed(trainer, module):
            problem, owned, optimizers = self._stated(batch, batch_idx)
            run.turns.watch(optimizers)
            lookahead = self._lookahead(problem, optimizers)
            if lookahead is not None:
                present, start, severe = lookahead.judged(run.caps.caps, statistics.start, ratio)
                statistics.look(present.begin)
                if lookahead.clipping_failure is not None:
                    run.announce(of_error(Kind.CLIPPING_FAILED, lookahead.clipping_failure))
            self._match(batch, batch_idx, optimizers)
        if present is not None:
            failing = fails(severe, ratio)
            run.note_severity(step, severe)
            if not scheduled and not failing:
                self._charge(lookahead, 0.0)
                log_values(trainer, module, {"guard/severity": severe}, step)
                return
            # 2. Roll back a run that has diverged already.
            if settings.rollback and failing and not present.begin <= ratio * start:
                if not self.rollback.go_back(present.begin, step):
                    return
                self._rolled_back = optimizers, present
        rolled_back = self._rolled_back is not None
        # 3. Measure the curvature, advance the state, and decide on the rates.
        with undisturbed(trainer, module):
            report = measure(
                problem,
                optimizer=optimizers,
                curvature=settings.curvature,
                margin=settings.margin,
                step=step,
                cache=run.cache,
            )
            findings, judged = report.findings, severe
            if failing and report.status != UNSAFE and self._may_be_clipped(lookahead, present, start):
                run.announce(Reason(Kind.CLIPPING_NOT_SEEN, step=step))
                failing, judged = False, undecided(ratio)
            if failing and present is not None:
                tried = run.caps.caps.applied(report.alpha, report.beta)
                explained = report.status == UNSAFE
                findings = (*findings, lookahead_reason(present, start, *tried, explained=explained))
            transition = run.machine.take(report, judged)
            caps = settings.acting.decide(
                Situation(
                    report=report,
                    transition=transition,
                    caps=run.caps.caps,
                    margin=settings.margin,
                    reach_alpha=reaches_alpha(module),
                    fails=failing,
                    rolled_back=rolled_back,
                    present=present,
                    lookahead=lookahead,
                )
            )
        if run.state.capped != owned:
            self.cap(owned)
        # 4. Act.
        if not trainer.fast_dev_run:
            self._acted = True
            self._act(report, findings, transition, caps, step)
            if rolled_back and present is not None:
                self.rollback.report(present.begin, report.alpha, report.beta, step)
                self._rolled_back = None  # its rates are lowered
            if settings.rollback and (run.snapshot is None or passes(severe, ratio)):
                self.rollback.keep(step)
        self._warn_of_collapse(report, step)
        # 5. Keep and log what was found.
        self._charge(lookahead, report.cost)
        run.schedule.state.unjudged = not run.state.history and report.beta_status == UNRESOLVED
        alpha, beta = run.caps.caps.applied(report.alpha, report.beta)
        if trainer.fast_dev_run:
            alpha, beta = report.alpha, report.beta
        found = CheckReport.of(
            report,
            findings=findings,
            status=report.status if present is None else transition.state,
            alpha_applied=alpha,
            beta_applied=beta,
            severity=severe,
            growth=math.nan if present is None else present.growth,
        )
        run.state.history = [*run.state.history, found][-settings.history_size :]
        log_values(trainer, module, metrics(found), step)

    def _stated(self, batch: Any, batch_idx: int) -> tuple[Problem, list[int], list[Optimizer]]:
        """A step's problem, and the optimizers that move it with their indices.

        A step accumulates batches of which the first is at hand: those before it stand for the others.
        """
        more = self.trainer.accumulate_grad_batches - 1
        batches = [(batch, batch_idx), *(self.run.replay.earlier()[:more] if more else [])]
        problem = accumulated([state_problem(self.settings.problem, self.module, *each) for each in batches])
        owned = owners(problem, self.trainer.optimizers)
        return problem, owned, [self.trainer.optimizers[index] for index in owned]

    def _lookahead(self, problem: Problem, optimizers: list[Optimizer]) -> Lookahead | None:
        steps, run, size = self.settings.lookahead.steps, self.run, self.trainer.accumulate_grad_batches
        if not steps or self.trainer.fast_dev_run:
            return None
        earlier = run.replay.earlier()[size - 1 :]
        older = [state_problem(self.settings.problem, self.module, *each) for each in earlier]
        groups = [older[first : first + size] for first in range(0, len(older) - size + 1, size)]
        try:
            problems = [problem, *map(accumulated, groups)]
            return lookahead_of(problems, optimizers, steps, self.trainer, run.cache, run.state.clipped_to)
        except ClosureError as error:
            run.announce(Reason(Kind.NO_LOOKAHEAD, detail=str(error)))
            return None

    def _match(self, batch: Any, batch_idx: int, optimizers: list[Optimizer]) -> None:
        """Begin to compare a problem that was stated for the run with the step to come; once."""
        run, source = self.run, self.settings.problem
        if run.matched or (
            source is None and (isinstance(self.module, MetaLearning) or not has_meta_problem(self.module))
        ):
            return
        run.matched, trainer = True, self.trainer
        problem = state_problem(source, self.module, batch, batch_idx)
        tasks = run.cache.map_for(getattr(problem, "task_chunk_size", None), getattr(problem, "looped", False))
        run.match = TrainingMatch(
            problem,
            objective_of(problem, "support", tasks),
            optimizers,
            trainer.optimizers,
            accumulated=trainer.accumulate_grad_batches,
            half=str(trainer.precision).partition("-")[0] not in {"32", "64"},
            ranks=run.cache.ranks,
        )

    def _may_be_clipped(self, lookahead: Lookahead | None, present: LookaheadResult | None, start: float) -> bool:
        """Whether the run may survive what the lookahead does not, because it clips out of sight."""
        if lookahead is None or present is None or lookahead.sees_clipping:
            return False
        return present.begin <= self.settings.lookahead.divergence_ratio * start

    def _act(
        self, report: StabilityReport, findings: tuple[Reason, ...], transition: Transition, caps: Caps, step: int
    ) -> None:
        """Apply the caps, speak, stop."""
        run, action, spelling = self.run, self.settings.acting, self.settings.spelling
        if action.caps_rates:
            run.caps.apply(self.module, caps)
        alpha, beta = caps.applied(report.alpha, report.beta)
        if transition.returned and action.speaks:
            inform(returned(step, safe=transition.state == SAFE, applied=beta, configured=report.beta))
        # A rollback has a message of its own.
        if transition.entered and action.speaks and self._rolled_back is None:
            warn(left_safe_region(step, findings, action.effect(spelling, alpha, beta), spelling))
        if transition.state == UNSAFE and action.stops:
            run.stop(self.trainer, step, findings)
        if action.speaks:
            for note in report.notes:
                told = transition.entered and note in findings
                run.announce(replace(note, step=step), just_said=told)

    def _warn_of_collapse(self, report: StabilityReport, step: int) -> None:
        """Warn where nearly all curvature is gone, and not because the run has learned."""
        state, loss, start = self.run.state, self.run.state.statistics.loss, self.run.state.statistics.start
        state.sharpest = max(state.sharpest, report.lambda_max)
        collapsed = report.lambda_max < _COLLAPSED * state.sharpest and loss > _UNLEARNED * start
        if collapsed and self.settings.acting.speaks:
            losses = (math.nan, loss, start)
            now, sharpest = report.lambda_max, state.sharpest
            self.run.announce(Reason(Kind.NETWORK_COLLAPSED, value=now, limit=sharpest, losses=losses, step=step))

    def _charge(self, lookahead: Lookahead | None, measured: float) -> None:
        gradients = 0 if lookahead is None else lookahead.gradients
        self.run.schedule.charge(lookahead_gradients=gradients, measured=measured)


def lookahead_reason(result: LookaheadResult, start: float, alpha: float, beta: float, *, explained: bool) -> Reason:
    """State what a lookahead that diverges saw at these rates; ``explained``: the critical values say why."""
    losses = (result.begin, result.end, start)
    if not math.isfinite(result.begin):
        return Reason(Kind.LOSS_NOT_FINITE, losses=losses, remedy=Remedy.START_AGAIN)
    return Reason(
        Kind.LOOKAHEAD_DIVERGES,
        losses=losses,
        steps=len(result.losses) - 1,
        alpha=alpha,
        beta=beta,
        remedy=Remedy.NONE if explained else Remedy.LOWER_BETA_UNSPECIFIED,
    )


def _failure(error: Exception, step: int) -> Reason:
    reason = of_error(Kind.CHECK_FAILED, error, step=step)
    if isinstance(error, torch.OutOfMemoryError):
        return replace(reason, effect="out of memory")
    return replace(reason, effect="other rank", where="") if isinstance(error, SharedError) else reason
