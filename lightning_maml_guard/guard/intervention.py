"""What a guard does about a check: lower the rates or let them rise, take the run back, stop it, say so."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lightning_maml_guard.guard.course import Course, Turn
from lightning_maml_guard.guard.loggers import inform, logger_step, warn
from lightning_maml_guard.guard.lookahead import Trial
from lightning_maml_guard.guard.messages import Spelling, left, returned, rolled_back
from lightning_maml_guard.guard.rescale import Caps, Try, lowered, raised
from lightning_maml_guard.guard.rescue import Rescue, critical_caps, reaches_alpha
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import UNSAFE


class Intervention:
    """Acts on a run.

    Args:
        action: The guard's action.
        margin: Fraction of the critical values that rates are capped at.
        max_rollbacks: Rollbacks before the run is stopped.
        course: The states of the run so far.
        rescue: What applies caps and takes the run back.
        spelling: How the guard's arguments are written.
    """

    def __init__(
        self, action: str, margin: float, max_rollbacks: int, course: Course, rescue: Rescue, spelling: Spelling
    ) -> None:
        self.action, self.margin, self.max_rollbacks = action, margin, max_rollbacks
        self.course, self.rescue, self.spelling = course, rescue, spelling
        self.stopped_step: int | None = None
        self.stopping_reason: str | None = None

    def caps(
        self,
        module: Any,
        report: StabilityReport,
        turn: Turn,
        *,
        fails: bool,
        taken_back: bool,
        present: Trial | None,
        attempt: Try | None,
    ) -> Caps:
        """Find the caps from the coming step on.

        Args:
            module: The module.
            report: The check.
            turn: What it changed.
            fails: Whether its trial failed.
            taken_back: Whether the run was taken back before the measurement.
            present: The trial under the caps so far; None without trials.
            attempt: Tries the coming steps; None without trials.

        Returns:
            The caps.
        """
        caps, reach = self.rescue.caps, reaches_alpha(module)
        if self.action != "rescale":
            return caps
        if present is None or attempt is None:
            waiting = report.status == UNSAFE and turn.state != UNSAFE
            return caps if waiting else critical_caps(report, caps, self.margin, reach)
        if taken_back or (fails and turn.state == UNSAFE):
            loss = attempt(caps).begin if taken_back else present.begin
            return lowered(report, caps, self.margin, attempt, loss=loss, reach_alpha=reach, at_least_halve=taken_back)
        return caps if fails else raised(report, caps, self.margin, present, attempt)

    def act(
        self, trainer: Any, module: Any, report: StabilityReport, turn: Turn, caps: Caps, *, taken_back: bool
    ) -> StabilityReport:
        """Apply the caps, speak, stop.

        Args:
            trainer: The Trainer.
            module: The module.
            report: The check.
            turn: What it changed.
            caps: The caps from now on.
            taken_back: Whether the run was taken back, which has a message of its own.

        Returns:
            The report with the rates as applied.
        """
        step = report.step or 0
        if self.action == "rescale":
            self.rescue.apply(module, caps)
        if turn.returned and self.action != "log":
            inform(f"ConvergenceGuard: step {step}: {returned(report, turn.state, caps)}")
        if turn.entered and self.action != "log" and not taken_back:
            warn(left(report, self.action, step, caps, self.spelling))
        if turn.state == UNSAFE and self.action == "stop":
            self._stop(trainer, step, " ".join(report.reasons))
        if self.action != "log":
            for notice in report.notices:
                told = turn.entered and notice in report.reasons
                self.course.say_once(f"ConvergenceGuard: step {step}: {notice}", just_said=told, step=step)
        alpha, beta = self.rescue.caps.applied(report.alpha, report.beta)
        return replace(report, alpha_applied=alpha, beta_applied=beta)

    def take_back(self, trainer: Any, module: Any, loss: float, step: int) -> bool:
        """Take a lost run back to its last snapshot, or stop it if that was done too often.

        Args:
            trainer: The Trainer.
            module: The module.
            loss: The loss it is lost at.
            step: Training step.

        Returns:
            Whether it goes on, from the snapshot or, before there is one, from where it is.
        """
        rescue = self.rescue
        if rescue.snapshot is None:
            return True
        if rescue.rollbacks >= self.max_rollbacks:
            reason = (
                f"The loss was {loss:.3g} at step {step} after {rescue.rollbacks} rollbacks (max_rollbacks), each with "
                "lower rates: the rates are not what is wrong here. Look at the data, the loss and the precision."
            )
            self._stop(trainer, step, reason)
            warn(f"ConvergenceGuard: training stops. {reason}")
            return False
        rescue.snapshot.restore(module, trainer.optimizers)
        rescue.rollbacks += 1
        return True

    def report_taken_back(self, report: StabilityReport, present: Trial | None, caps: Caps, step: int) -> None:
        """Say that a run was taken back.

        Args:
            report: The curvature where it went.
            present: The trial that was lost.
            caps: The caps from now on.
            step: Step at which it was lost.
        """
        if present is not None and self.rescue.snapshot is not None:
            to, count = self.rescue.snapshot.step, self.rescue.rollbacks
            message = rolled_back(step, to, present.begin, caps, report, count, self.max_rollbacks)
            self.course.note(step, "rolled back", message)
            warn(message)

    def halve(self, module: Any, beta: float, present: Trial | None, step: int) -> None:
        """Halve the meta rate of a run that was taken back to where nothing could be measured, and say so.

        Args:
            module: The module.
            beta: The meta rate as scheduled.
            present: The trial that was lost.
            step: Step at which it was lost.
        """
        caps = self.rescue.caps
        self.rescue.apply(module, Caps(caps.alpha, caps.applied(math.nan, beta)[1] / 2))
        if present is not None and self.rescue.snapshot is not None:
            message = (
                f"ConvergenceGuard: the loss was {present.begin:.3g} at step {step}, so parameters and optimizer state "
                f"were taken back to step {self.rescue.snapshot.step} (rollback {self.rescue.rollbacks} of at most "
                f"{self.max_rollbacks}). The curvature there could not be measured, so the meta rate is halved: beta = "
                f"{self.rescue.caps.beta:.3g}."
            )
            self.course.note(step, "rolled back", message)
            warn(message)

    def end_at(self, snapshot: Snapshot, trainer: Any, module: Any, what: str) -> None:
        """End a run whose last step lost it where a snapshot was taken.

        Args:
            snapshot: The snapshot.
            trainer: The Trainer.
            module: The module.
            what: What is wrong with the parameters as they are.
        """
        snapshot.restore(module, trainer.optimizers)
        message = (
            f"ConvergenceGuard: {what}, so parameters and optimizer state were taken back to step {snapshot.step}."
        )
        self.course.note(logger_step(trainer), "rolled back", message)
        warn(message)

    def _stop(self, trainer: Any, step: int, reason: str) -> None:
        if self.stopped_step is None:
            self.course.note(step, "stopped", reason)
        self.stopped_step, self.stopping_reason = step, reason
        trainer.should_stop = True
