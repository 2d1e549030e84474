"""Rolling a diverged run back to parameters and optimizer state of the last check that passed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lightning_maml_guard.guard.loggers import logger_step
from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.messages.advice_sentences import advised
from lightning_maml_guard.messages.reasons import Kind, Reason, of_error
from lightning_maml_guard.messages.sentences import announced, sentence
from lightning_maml_guard.optim.snapshot import Snapshot


class Rollback:
    """Keeps snapshots of a run, goes back to the latest, and says so."""

    def __init__(self, run: GuardedRun, trainer: Any, module: Any) -> None:
        self.run, self.trainer, self.module = run, trainer, module

    def keep(self, step: int) -> None:
        """Keep the state of the run: on all ranks, or on none. A failure costs one warning."""
        run = self.run
        if not run.settings.lookahead.steps:
            return
        try:
            with run.cache.ranks.together():
                # What is never rolled back to does not take memory of the device.
                device = run.settings.snapshot_device or (None if run.settings.rollback else "cpu")
                kept = Snapshot(self.module, self.trainer.optimizers, step, device)
            run.snapshot = kept
        except Exception as error:
            earlier = -1 if run.snapshot is None else run.snapshot.step
            run.announce(replace(of_error(Kind.NO_SNAPSHOT, error, step=step), steps=earlier))

    def go_back(self, loss: float, step: int) -> bool:
        """Go back to the snapshot, or stop the run if that was done too often; False if it was stopped.

        Before there is a snapshot the run goes on from where it is.
        """
        run = self.run
        if run.snapshot is None:
            return True
        if run.state.rollbacks >= run.settings.max_rollbacks:
            reason = self._reason(Kind.TOO_MANY_ROLLBACKS, loss, step)
            run.stop(self.trainer, step, (reason,))
            advice, to_do = run.state.advice, "Look at the data, the loss and the precision."
            if advice is not None:
                to_do = advised(advice, run.settings.spelling)
            run.tell(
                self.trainer, f"ConvergenceGuard: training stops. {sentence(reason)}\n{to_do[0].upper()}{to_do[1:]}"
            )
            return False
        run.snapshot.restore(self.module, self.trainer.optimizers)
        run.state.statistics.forget()
        run.state.rollbacks += 1
        return True

    def report(self, loss: float, alpha: float, beta: float, step: int, *, halved: bool = False) -> None:
        """Say that the run was rolled back because of a loss, and which rates are applied from now on."""
        if self.run.snapshot is not None:
            applied = self.run.caps.caps.applied(alpha, beta)
            effect = "halved" if halved else ""
            self._tell(self._reason(Kind.ROLLED_BACK, loss, step, alpha=applied[0], beta=applied[1], effect=effect))

    def halve(self, loss: float, scheduled: float, step: int, *, held: bool) -> None:
        """Halve the meta rate of a run that was rolled back to where nothing could be measured, and say so.

        ``held``: whether its optimizers can be capped at all.
        """
        run = self.run
        caps, effect = run.caps.caps, "halved" if held else "not lowered"
        if held:
            run.caps.apply(self.module, Caps(caps.alpha, caps.applied(math.nan, scheduled)[1] / 2))
        if run.snapshot is not None:
            beta = run.caps.caps.beta or math.nan
            self._tell(self._reason(Kind.ROLLED_BACK, loss, step, beta=beta, effect=effect))

    def at_end(self, snapshot: Snapshot, loss: float, start: float) -> None:
        """End a run whose last step made it diverge where the snapshot was taken; ``nan``: parameters not finite."""
        snapshot.restore(self.module, self.trainer.optimizers)
        losses, step = (math.nan, loss, start), logger_step(self.trainer)
        self._tell(Reason(Kind.ROLLED_BACK_AT_END, losses=losses, steps=snapshot.step, step=step))

    def _reason(self, kind: Kind, loss: float, step: int, **more: Any) -> Reason:
        run = self.run
        to = -1 if run.snapshot is None else run.snapshot.step
        counts = run.state.rollbacks, run.settings.max_rollbacks
        return Reason(kind, losses=(loss, math.nan, math.nan), steps=to, counts=counts, step=step, **more)

    def _tell(self, reason: Reason) -> None:
        self.run.state.note("rolled back", reason, step=reason.step)
        self.run.tell(self.trainer, announced(reason, self.run.settings.spelling))
