"""One check of a run: try the coming steps, measure the curvature, decide, act."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_maml_guard.guard import messages
from lightning_maml_guard.guard.isolation import isolated
from lightning_maml_guard.guard.loggers import log_values, metrics, unlogged
from lightning_maml_guard.guard.lookahead import Trial
from lightning_maml_guard.guard.probe import Attempts, Problem, attempts, configured_inner_rate, owners, state_problem
from lightning_maml_guard.guard.run import Run, Settings
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.shadow import ClosureError
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.theory.limits import UNRESOLVED, UNSAFE, fails, passes
from lightning_maml_guard.utils.warnings import GuardWarning


class Checker:
    """Checks a run once, and leaves it as it was where the check fails.

    Args:
        settings: The guard's arguments.
        run: The run's state.
        trainer: The Trainer.
        module: The module.
    """

    def __init__(self, settings: Settings, run: Run, trainer: Any, module: Any) -> None:
        self.settings, self.run, self.trainer, self.module = settings, run, trainer, module
        # A run that was taken back, by this check: what its rates must be lowered by if the rest of the check fails.
        self._taken_back: tuple[Optimizer, Trial] | None = None
        self._acted = False

    def check(self, batch: Any, batch_idx: int, step: int, *, scheduled: bool) -> None:
        """Check once.

        Args:
            batch: The batch of the coming step.
            batch_idx: Its index.
            step: Training step.
            scheduled: Whether it was time; a triggered check that finds nothing ends early.

        Raises:
            GuardWarning: If the user made warnings errors.
        """
        watches = self.run.course.watches
        try:
            with self.run.memory.ranks.together():
                self._check(batch, batch_idx, step, scheduled)
        except GuardWarning:
            raise
        except Exception as error:
            # Whatever goes wrong in a check, training goes on as if the guard were not there. A state that it changed
            # without acting on it is changed again by the next.
            if not self._acted:
                self.run.course.watches = watches
            self.run.course.say_once(messages.failed(step, error), step=step)
            if self._taken_back is not None:
                optimizer, present = self._taken_back
                self.run.intervention.halve(self.module, scheduled_rate(optimizer), present, step)

    def govern(self, owned: list[int]) -> None:
        """Cap the optimizers that move the problem's parameters, as the caps are.

        Args:
            owned: Their indices.
        """
        rescue, optimizers = self.run.rescue, self.trainer.optimizers
        # Lightning's tuners step the run's optimizers with the run's callbacks taken out, to see what a rate does.
        rescue.govern(
            [optimizers[index] for index in owned if index < len(optimizers)],
            lambda: self.settings in self.trainer.callbacks,
        )
        rescue.governed = owned  # only now: a failure is met again, and told again, at the next check

    def end(self) -> None:
        """Take back a last step that lost the run: no check comes after it."""
        run, snapshot = self.run, self.run.rescue.snapshot
        if snapshot is None:
            return
        what = ""
        if not all(bool(torch.isfinite(each).all()) for each in self.module.parameters()):
            what = "the last step made parameters non-finite"
        elif run.lookout.called:
            with run.memory.ranks.together(), self._undisturbed():
                problem, _, optimizer = self._stated(*run.replay.latest())
                loss = attempts([problem], optimizer, 0, self.trainer, run.memory)(run.rescue.caps).begin
            if run.lookout.range.lost(loss, self.settings.alarm):
                start = run.lookout.range.start
                what = f"after the last step the loss was {loss:.3g} (training started at {start:.3g})"
        if what:
            run.intervention.end_at(snapshot, self.trainer, self.module, what)

    def _stated(self, batch: Any, batch_idx: int) -> tuple[Problem, list[int], Optimizer]:
        """A step's problem, the indices of the optimizers that move it, and the fastest of these."""
        problem = state_problem(self.settings.problem, self.module, batch, batch_idx)
        owned = owners(problem, self.trainer.optimizers)
        return problem, owned, max((self.trainer.optimizers[index] for index in owned), key=scheduled_rate)

    def _check(self, batch: Any, batch_idx: int, step: int, scheduled: bool) -> None:
        settings, run, trainer, module = self.settings, self.run, self.trainer, self.module
        present, failing, severe, reference = None, False, math.nan, math.nan
        with self._undisturbed():
            problem, owned, optimizer = self._stated(batch, batch_idx)
            attempt = self._trials(problem, optimizer)
            if attempt is not None:
                present, reference, severe = attempt.judged(run.rescue.caps, run.lookout.range.start, settings.alarm)
        if present is not None:
            failing = fails(severe, settings.alarm)
            run.note_severity(step, severe)
            if not scheduled and not failing:
                self._charge(attempt, problem, 0.0)
                log_values(trainer, module, {"guard/severity": severe}, step)
                return
            if settings.rollback and failing and not present.begin <= settings.alarm * reference:
                if not run.intervention.take_back(trainer, module, present.begin, step):
                    return
                self._taken_back = optimizer, present
        taken_back = self._taken_back is not None
        with self._undisturbed():
            report = measure(
                self._measured(problem),
                optimizer=optimizer,
                criterion=settings.criterion,
                estimator=settings.estimator,
                max_iter=settings.max_iter,
                tol=settings.tol,
                tasks=settings.tasks,
                data=settings.data,
                margin=settings.margin,
                step=step,
                memory=run.memory,
                basis=settings.basis,
            )
            if present is not None:
                alpha, beta = run.rescue.caps.applied(report.alpha, report.beta)
                explained, spelling = report.status == UNSAFE, settings.spelling
                said = messages.tried(present, reference, alpha, beta, explained, spelling) if failing else ""
                reasons = (*report.reasons, said) if said else report.reasons
                report = replace(report, severity=severe, growth=present.growth, reasons=reasons)
            turn = run.course.take(report)
            caps = run.intervention.caps(
                module, report, turn, fails=failing, taken_back=taken_back, present=present, attempt=attempt
            )
        if run.rescue.governed != owned:
            self.govern(owned)
        if present is not None:
            report = replace(report, status=turn.state)
        if not trainer.fast_dev_run:
            self._acted = True
            report = run.intervention.act(trainer, module, report, turn, caps, taken_back=taken_back)
            if taken_back:
                run.intervention.report_taken_back(report, present, caps, step)
                self._taken_back = None  # its rates are lowered
            if settings.rollback and (run.rescue.snapshot is None or passes(severe, settings.alarm)):
                self._keep(step)
        loss, start = run.lookout.range.loss, run.lookout.range.start
        if run.course.lost_curvature(report, loss, start) and settings.action != "log":
            lost = messages.nothing_learned(
                step, report.lambda_max, run.course.sharpest, loss, start, settings.spelling
            )
            run.course.say_once(lost, step=step)
        self._charge(attempt, problem, report.cost)
        run.lookout.unjudged = not run.history and report.beta_status == UNRESOLVED
        run.note(report)
        log_values(trainer, module, metrics(report), step)

    def _measured(self, problem: Any) -> Any:
        part = self.settings.tasks_per_check
        return problem if part is None or not isinstance(problem, MetaProblem) else problem.part(part)

    def _charge(self, attempt: Attempts | None, problem: Any, measured: float) -> None:
        share = self._measured(problem).tasks / problem.tasks if isinstance(problem, MetaProblem) else 1.0
        evaluations = 0 if attempt is None else attempt.runner.runs * (self.settings.trial_steps + 1)
        self.run.lookout.budget.charge(trial_steps=evaluations, measured=measured * share)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with unlogged(self.trainer), isolated(self.module), configured_inner_rate(self.module):
            yield

    def _keep(self, step: int) -> None:
        run = self.run
        try:
            run.rescue.keep(self.module, self.trainer.optimizers, step, run.memory.ranks)
        except Exception as error:
            kept = run.rescue.snapshot
            run.course.say_once(
                f"ConvergenceGuard could not copy parameters and optimizer state at step {step}, so "
                + ("there is nothing to roll back to" if kept is None else f"a rollback goes to step {kept.step}")
                + f". snapshot_device='cpu' keeps the copy off the device.\nCause: {type(error).__name__}: {error}"
            )

    def _trials(self, problem: Any, optimizer: Any) -> Attempts | None:
        settings, run = self.settings, self.run
        if not settings.trial_steps or self.trainer.fast_dev_run:
            return None
        older = [state_problem(settings.problem, self.module, *each) for each in run.replay.earlier()]
        try:
            return attempts([problem, *older], optimizer, settings.trial_steps, self.trainer, run.memory)
        except ClosureError as error:
            run.course.say_once(
                f"ConvergenceGuard judges by curvature alone: the coming steps cannot be tried. {error}"
            )
            return None
