"""Rolling a run that diverged, or lost what it learned, back to parameters and optimizer state of a few steps ago."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from lightning_maml_guard.guard.loggers import logger_step
from lightning_maml_guard.guard.look import Look, step_problem
from lightning_maml_guard.guard.rescale import is_calm
from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.lookahead.divergence import fails
from lightning_maml_guard.lookahead.learning import PROBES, Learning, compare_with_snapshots, lost_reason, probe_indices
from lightning_maml_guard.lookahead.lookahead import Caps, Lookahead, lookahead_of
from lightning_maml_guard.lookahead.odd_batches import without_odd
from lightning_maml_guard.lookahead.rate_search import FAR_LOWER_BETA
from lightning_maml_guard.messages.advice_sentences import given_up
from lightning_maml_guard.messages.reasons import Kind, Reason, of_error
from lightning_maml_guard.messages.sentences import announced
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.rollback_state import rollback_state
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.optim.stability_limits import is_preconditioned
from lightning_maml_guard.stability.problems import Problem, dead_units
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import SAFE
from lightning_maml_guard.utils.isolation import undisturbed
from lightning_maml_guard.utils.shards import finite

# Snapshots that are tried before a rollback, the youngest first.
_MOST_TRIED = 3
# A run has learned nothing while its loss is above this share of that at its oldest snapshot, on the same batches.
_UNLEARNED = 0.97
# Inner rates that differ by no more than this share are the same.
_SAME_ALPHA = 0.95


class Rollback:
    """Keeps snapshots of a run, compares the run with them, and goes back to one."""

    def __init__(self, run: GuardedRun, trainer: Any, module: Any) -> None:
        self.run, self.trainer, self.module = run, trainer, module
        self.held = partial(rollback_state, trainer, module, run.settings.rollback)
        self._steps_discarded = 0
        self._loss_now = math.nan  # of a run that has lost what it learned

    def keep(self, step: int) -> None:
        """Keep a snapshot: on all ranks, or on none. A failure costs one warning."""
        run = self.run
        if not run.settings.lookahead.steps:
            return
        try:
            with run.cache.ranks.fail_together():
                # What is never rolled back to does not take memory of the device.
                device = run.settings.snapshot_device or (None if run.settings.rollback else "cpu")
                alpha = run.caps.caps.applied(run.alpha, math.nan)[0]
                wasted = run.state.wasted
                run.ring.keep(*self.held(), step, device, wasted=wasted, alpha=alpha)
        except Exception as error:
            earlier = -1 if run.ring.latest is None else run.ring.latest.step
            run.announce(replace(of_error(Kind.NO_SNAPSHOT, error, step=step), steps=earlier))

    def keep_if_due(self, step: int) -> None:
        """Keep a snapshot if the latest one is old and the loss is near its best."""
        run = self.run
        if run.ring.is_due(step) and run.state.statistics.near_best:
            self.keep(step)

    def compare(self, look: Look) -> Learning | None:
        """Compare a run whose loss has left its best with its snapshots; None if it has not, or without any.

        If none of them does better, the tasks have become harder, and the best loss is raised to that of now.
        """
        run, statistics = self.run, self.run.state.statistics
        if look.lookahead is None or look.present is None or not run.ring.kept:
            return None
        first = look.present.losses[: PROBES + 1]
        level, ratio = median(first), run.settings.lookahead.divergence_ratio
        far = statistics.scale.diverged(level, ratio)
        # The start of a few batches may be that of easy tasks.
        early = not look.scale.settled and fails(look.severity, ratio)
        if not all(map(math.isfinite, first)) or not (
            far or early or statistics.has_left_best or statistics.is_above_best(level)
        ):
            return None
        found = self._compared(look, statistics.recent, start=statistics.start)
        mean = found.losses[1] if early else level if far else statistics.loss
        if found.does_as_well and (early or len(run.ring.kept) > 1) and statistics.rebase(mean):
            look.scale = statistics.scale
            look.severity = look.scale.severity(look.present.end, look.present.begin)
        return found

    def forget_lost(self, found: Learning, look: Look, step: int) -> Reason:
        """Forget the snapshots made after the run lost what it had learned; the reason that says so."""
        ring, self._loss_now = self.run.ring, found.losses[1]
        ring.drop_after(ring.kept[found.good_snapshots[0]].step)
        if look.lookahead is not None:
            look.lookahead.begin = math.inf  # what to advise is not to be tried from here
        assert ring.latest is not None
        return lost_reason(found, ring.latest.step, step)

    def warn_of_collapse(self, problem: Problem, report: StabilityReport, status: str, step: int) -> None:
        """Warn of dead units if nearly all curvature is gone and the loss is back where it began."""
        reason = self.run.state.collapse_reason(report.lambda_max, step)
        if reason is None or status != SAFE or not self.run.settings.acting.speaks:
            return
        with undisturbed(self.trainer, self.module):
            found = dead_units(problem)
        if found.most:
            self.run.announce(replace(reason, counts=(found.dead, found.units)))

    def warn_of_stall(self, look: Look, step: int) -> None:
        """Warn that a run does not learn, and whether that is because its units have died."""
        state, statistics = self.run.state, self.run.state.statistics
        if not self.run.settings.acting.speaks or look.lookahead is None or not self.run.ring.kept:
            return
        with undisturbed(self.trainer, self.module):
            _, now, before = self._compared(look).losses
            # A slow run at least does better on the batches that it was just trained on.
            if now < look.scale.times(_UNLEARNED, before):
                statistics.stalled = False
                return
            found = dead_units(look.problem)
        # A preconditioner's limit, measured early on, says little; where a rate was called too high, none is too low.
        says = state.advice is None and not any(map(is_preconditioned, look.optimizers))
        shares = [each.beta_ratio for each in state.history if says and each.beta_ratio > 0]
        counts = (found.dead, found.units) if found.most else (0, 0)
        losses = statistics.loss, math.nan, statistics.start
        reason = Reason(Kind.STALLED, losses=losses, limit=statistics.chance, steps=statistics.steps, counts=counts)
        self.run.announce(replace(reason, value=max(shares, default=math.nan), step=step))

    def _compared(self, look: Look, recent: Sequence[float] = (), *, start: float = math.inf) -> Learning:
        statistics, chosen = self.run.state.statistics, probe_indices(len(look.problems))
        lookahead = self._lookahead([look.problems[index] for index in chosen], look)
        seen = [recent[-index] if 0 < index <= len(recent) else -math.inf for index in chosen]
        found = compare_with_snapshots(
            lookahead,
            *self.held(),
            self.run.ring.kept,
            statistics.untrained_from(start),
            seen,
            logger_step(self.trainer) - chosen[-1],
            self.run.caps.caps.applied(lookahead.alpha, math.nan)[0],
        )
        look.lookahead.gradients += lookahead.gradients  # type: ignore[union-attr]
        return found

    def _lookahead(self, problems: Sequence[Problem], look: Look) -> Lookahead:
        run, steps = self.run, self.run.settings.lookahead.steps
        return lookahead_of(problems, look.optimizers, steps, self.trainer, run.cache, run.state.clipped_to)

    def may_help(self, loss: float) -> bool:
        """Whether going back may help: not if an inner rate that cannot be capped has risen or is to blame."""
        youngest, state = self.run.ring.latest, self.run.state
        risen = youngest is not None and youngest.alpha < _SAME_ALPHA * self.run.alpha
        again = state.blames_alpha and state.rollbacks > 0
        return self.run.caps.reaches_alpha(self.module) or not (risen if math.isfinite(loss) else again)

    def drop_unusable_snapshots(self, look: Look) -> None:
        """Drop the snapshots after the youngest good one from which the next steps survive at a very low rate.

        At such a rate only wrong parameters or a wrong optimizer state make the loss diverge. An odd batch is left out.
        """
        ring, before = self.run.ring, look.lookahead
        if before is None or len(ring.kept) < 2:
            return
        found = self._compared(look, start=self.run.state.statistics.start)
        caps = self.run.caps.caps
        beta = FAR_LOWER_BETA * caps.applied(math.nan, before.beta)[1]
        ends: dict[int, float] = {}
        for snapshot in [ring.kept[index] for index in found.good_snapshots[:_MOST_TRIED]]:
            with snapshot.visited(*self.held()):
                look.lookahead = self._without_odd(look)
                tried = look.lookahead.under(Caps(self._alpha_at(snapshot), beta))
            ends[snapshot.step] = tried.end
            if is_calm(tried, look.scale):
                ring.drop_after(snapshot.step)
                return
        ring.drop_after(min(ends, key=lambda step: ends[step]))

    def _alpha_at(self, snapshot: Snapshot) -> float | None:
        """The cap on the inner rate after going back to a snapshot: no more than was applied there."""
        cap = self.run.caps.caps.alpha
        if not self.run.caps.reaches_alpha(self.module) or not 0 < snapshot.alpha < _SAME_ALPHA * self.run.alpha:
            return cap
        return snapshot.alpha if cap is None else min(cap, snapshot.alpha)

    def _without_odd(self, look: Look) -> Lookahead:
        """The lookahead without batches whose loss is far above the others'."""
        before, tried = look.lookahead, self._lookahead(look.problems, look)
        assert before is not None
        kept, odd = without_odd(look.problems, tried, look.scale)
        if odd is None:
            return before
        found = self._lookahead(kept, look)
        found.begin, found.gradients = before.begin, before.gradients + tried.gradients
        return found

    def go_back(self, loss: float, step: int, look: Look | None = None) -> bool:
        """Go back to the latest snapshot, if there is one; stop the run and return False after too many rollbacks."""
        run = self.run
        if run.ring.latest is None:
            return True
        if run.state.rollbacks >= run.settings.max_rollbacks:
            reason = self._reason(Kind.TOO_MANY_ROLLBACKS, loss, step)
            run.stop(self.trainer, step, (reason,))
            run.warn_and_alert(self.trainer, given_up(reason, run.state.advice, run.settings.spelling))
            return False
        if look is not None:
            with undisturbed(self.trainer, self.module):
                self.drop_unusable_snapshots(look)
        run.caps.apply(self.module, Caps(self._alpha_at(run.ring.latest), run.caps.caps.beta))
        run.ring.latest.restore(*self.held())
        self._steps_discarded = step - run.state.wasted - run.ring.latest.progress
        run.state.wasted += self._steps_discarded
        run.state.statistics.reset_means()
        run.state.rollbacks += 1
        return True

    def undo_excursion(self, look: Look, step: int) -> None:
        """Go back before the loss rose for some steps, with the same rates: they would lead back too, but later."""
        run, tried, found = self.run, look.lookahead, look.present
        left = run.settings.rollback and run.state.rollbacks < run.settings.max_rollbacks
        if not left or tried is None or found is None or not self.may_help(found.begin):
            return
        if self.go_back(found.begin, step, look):
            self.report(found.begin, tried.alpha, tried.beta, step)

    def go_back_untried(self, loss: float, step: int) -> bool:
        """Go back if the last loss has diverged and no step could be tried; False if the check is to go on."""
        run, ratio = self.run, self.run.settings.lookahead.divergence_ratio
        if not (run.settings.rollback and run.ring.latest and run.state.statistics.scale.diverged(loss, ratio)):
            return False
        run.schedule.confirm_divergence()
        if self.go_back(loss, step):
            self.halve_beta(loss, scheduled_rate(self.trainer.optimizers), step)
        return True

    def report(self, loss: float, alpha: float, beta: float, step: int, *, halved: bool = False) -> None:
        """Warn that the run was rolled back because of a loss, and say which rates are applied from now on."""
        if self.run.ring.latest is not None:
            applied = self.run.caps.caps.applied(alpha, beta)
            more = {"alpha": applied[0], "beta": applied[1], "effect": "halved" if halved else ""}
            self._tell(self._reason(Kind.ROLLED_BACK, loss, step, **more))

    def halve_beta(self, loss: float, scheduled: float, step: int) -> None:
        """Halve the outer rate of a run that was rolled back to where nothing could be measured, and warn."""
        run, held = self.run, self.run.cap_all_optimizers(self.trainer)
        caps, effect = run.caps.caps, "halved" if held else "not lowered"
        if held:
            run.caps.apply(self.module, caps.halved(scheduled))
        if run.ring.latest is not None:
            beta = run.caps.caps.beta or math.nan
            self._tell(self._reason(Kind.ROLLED_BACK, loss, step, beta=beta, effect=effect))

    def undo_last_step(self) -> None:
        """Go back if the last step of training made the run diverge: no check comes after it."""
        run, statistics = self.run, self.run.state.statistics
        if run.ring.latest is None or not run.settings.rollback:
            return
        spiked = run.schedule.state.spiked or not statistics.first  # without losses nothing else tells
        if not finite(self.module):
            self._go_back_at_end(math.nan, math.nan)
        elif len(run.replay) and spiked:
            with run.cache.ranks.fail_together(), undisturbed(self.trainer, self.module):
                problem, _, optimizers = step_problem(run, self.trainer, self.module, *run.replay.latest())
                lookahead = lookahead_of([problem], optimizers, 0, self.trainer, run.cache)
                loss = lookahead.under(run.caps.caps).begin
                # Under an inner rate that has risen since, the loss may be too high there, too.
                with run.ring.latest.visited(*self.held()):
                    earlier = lookahead.under(run.caps.caps).begin
            ratio = run.settings.lookahead.divergence_ratio
            if statistics.scale.diverged(loss, ratio) and not statistics.scale.diverged(earlier, ratio):
                self._go_back_at_end(loss, statistics.start)

    def _go_back_at_end(self, loss: float, start: float) -> None:
        """Go back to the latest snapshot when training ends; a loss of ``nan``: parameters not finite."""
        assert self.run.ring.latest is not None
        self.run.ring.latest.restore(*self.held())
        losses, step = (math.nan, loss, start), logger_step(self.trainer)
        self._tell(Reason(Kind.ROLLED_BACK_AT_END, losses=losses, steps=self.run.ring.latest.step, step=step))

    def _reason(self, kind: Kind, loss: float, step: int, **more: Any) -> Reason:
        run = self.run
        to = -1 if run.ring.latest is None else run.ring.latest.step
        counts = run.state.rollbacks, run.settings.max_rollbacks
        losses = (loss if math.isnan(self._loss_now) else self._loss_now, math.nan, math.nan)
        return Reason(
            kind, losses=losses, steps=to, counts=counts, step=step, value=float(self._steps_discarded), **more
        )

    def _tell(self, reason: Reason) -> None:
        self.run.state.add_event("rolled back", reason, step=reason.step)
        self.run.warn_and_alert(self.trainer, announced(reason, self.run.settings.spelling))
