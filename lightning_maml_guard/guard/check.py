"""One check of a run: look ahead, measure the curvature, decide, act."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from lightning_maml_guard.guard.actions import OUT_OF_REACH, applied_rates
from lightning_maml_guard.guard.advising import Adviser
from lightning_maml_guard.guard.judgement import Judgement, Outlook, judge, situation_of
from lightning_maml_guard.guard.loggers import SEND, log_check, log_values
from lightning_maml_guard.guard.look import Look, adjust_caps, look_at, plan_next_caps_check
from lightning_maml_guard.guard.report import CheckReport
from lightning_maml_guard.guard.rollback import Rollback
from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.guard.state_machine import Transition
from lightning_maml_guard.lookahead.divergence import fails, passes
from lightning_maml_guard.lookahead.learning import chance_loss, last_loss_reason
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.lookahead.results import LookaheadResult
from lightning_maml_guard.messages.advice import Advice, Cause
from lightning_maml_guard.messages.advice_sentences import (
    NO_WAY_BACK,
    advice_given,
    last_step,
    left_at_any_rate,
    no_rate_survives,
)
from lightning_maml_guard.messages.reasons import Kind, of_check
from lightning_maml_guard.messages.sentences import announced, returned
from lightning_maml_guard.messages.terminal import inform
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.rates_ahead import crossing
from lightning_maml_guard.optim.shadow import needs_closure
from lightning_maml_guard.stability.adaptation import COST
from lightning_maml_guard.stability.problems import NoLossError
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import SAFE, UNRESOLVED, UNSAFE
from lightning_maml_guard.utils.isolation import undisturbed
from lightning_maml_guard.utils.lightning_compat import least_run
from lightning_maml_guard.utils.shards import finite, reshard
from lightning_maml_guard.utils.warnings import GuardWarning


class Check:
    """One check of a run; it leaves the run as it was where it fails."""

    def __init__(self, run: GuardedRun, trainer: Any, module: Any) -> None:
        self.settings, self.run, self.trainer, self.module = run.settings, run, trainer, module
        self.rollback, self.ratio = Rollback(run, trainer, module), run.settings.lookahead.divergence_ratio
        reshard(module)
        # Where the run was rolled back by this check: what lowers its rates if the rest of the check fails.
        self._rolled_back: tuple[list[Optimizer], LookaheadResult] | None = None
        self._acted = False
        self._looked = False

    def check(self, batch: Any, batch_idx: int, step: int, *, scheduled: bool) -> None:
        """Check once, on the batch of the coming step; a triggered check that finds nothing ends early."""
        run, watches = self.run, self.run.machine.watches
        try:
            if step == 0 and run.ring.latest is None and not self.trainer.fast_dev_run:
                self.rollback.keep(step)  # first, as the check may fail; later only states whose lookahead passes
            with run.cache.ranks.fail_together():
                run.ring.drop_unlike(*self.rollback.held())
                self._check(batch, batch_idx, step, scheduled)
        except GuardWarning:
            raise
        except Exception as error:
            # Whatever goes wrong in a check, training goes on as if the guard were not there. A state that it changed
            # without acting on it is changed again by the next.
            if not self._acted:
                run.machine.watches = watches
            if isinstance(error, NoLossError) and run.cache.ranks.processes == 1 and run.schedule.postpone():
                return
            run.announce(of_check(error, step))
            if self._rolled_back is not None:
                optimizers, present = self._rolled_back
                self.rollback.halve_beta(present.begin, scheduled_rate(optimizers), step)
            elif not (self._looked or self._acted):
                with run.warn_on_failure("judge the run by its last loss"):
                    self._judge_last_loss(step)

    def _check(self, batch: Any, batch_idx: int, step: int, scheduled: bool) -> None:
        """Look ahead; unless that ends the check, roll back, measure, decide, act and keep what was found."""
        run, trainer = self.run, self.trainer
        outlook = self._look(batch, batch_idx, step)
        look = outlook.look
        if self._ends_early(outlook, step, scheduled=scheduled) or not self._goes_on(outlook, step):
            return
        lost = look.loss is not None and self._is_lost(look.loss)
        with undisturbed(trainer, self.module):
            found = judge(run, outlook, step)
            caps = self._decide(outlook, found, step, lost=lost)
        if run.state.capped != look.owned:
            run.cap_optimizers(trainer, look.owned)
        if not trainer.fast_dev_run:
            self._acted = True
            self._act_on(outlook, found, caps, step, lost=lost)
        self.rollback.warn_of_collapse(look.problem, found.report, found.transition.state, step)
        self._keep(outlook, found, step)

    def _look(self, batch: Any, batch_idx: int, step: int) -> Outlook:
        """Look ahead, compare the run with its snapshots, and try the schedule's peak or a stalled run's rates."""
        run, trainer, module, ratio = self.run, self.trainer, self.module, self.ratio
        caps, statistics = run.caps.caps, run.state.statistics
        with undisturbed(trainer, module):
            look = look_at(run, trainer, module, batch, batch_idx, step)
            self._looked = look.present is not None
            if look.present is not None:
                statistics.note_lookahead(look.present.begin)
            if not run.state.history:
                statistics.chance = chance_loss(module, batch)
            if not any(map(needs_closure, look.optimizers)):  # else a step's loss is that of parameters it has moved
                run.begin_match(trainer, module, batch, batch_idx, look.optimizers)
            adviser, stuck = Adviser(run, trainer, module, look, step), statistics.stuck
            learning, collapse = self.rollback.compare(look), None
            if learning is not None and learning.has_lost_half and not adviser.recovers(learning):
                collapse = self.rollback.forget_lost(learning, look, step)
                look.severity = max(look.severity, math.log(ratio))
            adviser.look_at_peak()
            adviser.look_at_progress()
        diverges_ahead, has_diverged = False, collapse is not None
        if look.present is not None:
            diverges_ahead = fails(look.severity, ratio)
            has_diverged = has_diverged or look.scale.diverged(look.present.begin, ratio)
            if diverges_ahead and self.rollback.may_help(look.present.begin):
                run.schedule.confirm_divergence()
            run.note_severity(step, look.severity, look.beta)
        if stuck and not diverges_ahead and adviser.new_finding is None:
            self.rollback.warn_of_stall(look, step)
        has_left_learned = has_diverged or not (look.is_intact or look.may_miss_clipping(ratio))
        return Outlook(look, adviser, caps, learning, collapse, diverges_ahead, has_diverged, has_left_learned)

    def _ends_early(self, outlook: Outlook, step: int, *, scheduled: bool) -> bool:
        """End a triggered check that found nothing: adjust the caps, and keep a snapshot if the lookahead passes."""
        look, run, trainer, module = outlook.look, self.run, self.trainer, self.module
        if look.present is None or scheduled or outlook.diverges_ahead or outlook.adviser.new_finding is not None:
            return False
        left_best = outlook.learning is not None and not outlook.learning.does_as_well
        well = passes(look.severity, self.ratio)
        if outlook.has_lost_half:
            self.rollback.undo_excursion(look, step)
        elif left_best or well:
            adjust_caps(run, trainer, module, look, step, left_best=left_best)
        if well and not outlook.has_lost_half:
            self.rollback.keep(step)
        self._charge(look, outlook.adviser.cost)
        values = {"guard/severity": look.severity, "guard/adaptation_gain": look.adaptation_gain}
        with run.warn_on_failure(SEND):
            log_values(trainer, {name: value for name, value in values.items() if math.isfinite(value)}, step)
        return True

    def _goes_on(self, outlook: Outlook, step: int) -> bool:
        """Roll back a run that has diverged already, or lost what it had learned; False if that ends the check."""
        look, run = outlook.look, self.run
        if look.present is None:
            return look.last_loss is None or not self.rollback.go_back_untried(look.last_loss, step)
        begin = look.present.begin
        # At lower rates the run learns from its oldest snapshot, and no longer from where it is.
        found = outlook.adviser.stalled if outlook.adviser.tried_from is not None else None
        restarts = found is not None and (found.best.factors.beta < 1 or run.caps.reaches_alpha(self.module))
        diverged = outlook.diverges_ahead and outlook.has_left_learned and self.rollback.may_help(begin)
        if self.settings.rollback and run.ring.latest is not None and (restarts or diverged):
            if restarts:
                run.ring.drop_after(run.ring.kept[0].step)
            if not self.rollback.go_back(begin, step, look):
                return False
            self._rolled_back = look.optimizers, look.present
        return True

    def _decide(self, outlook: Outlook, found: Judgement, step: int, *, lost: bool) -> Caps:
        """Decide on the caps to apply; those of a run that no rate brings back stay."""
        run, look, rolled_back = self.run, outlook.look, self._rolled_back is not None
        before = 0 if look.lookahead is None else look.lookahead.gradients
        reach = run.caps.reaches_alpha(self.module)
        situation = situation_of(run, outlook, found, step, reach_alpha=reach, rolled_back=rolled_back)
        if found.failing or rolled_back:
            tried = outlook.caps.applied(found.report.alpha, found.report.beta)
            run.state.ceiling = run.state.ceiling.with_failure(*tried, step)
        caps = run.caps.caps if lost else self.settings.acting.decide(situation)
        plan_next_caps_check(run, look, step, before, caps)
        return caps

    def _act_on(self, outlook: Outlook, found: Judgement, caps: Caps, step: int, *, lost: bool) -> None:
        """Act on what a check found, and keep a copy of a run that is well."""
        run, report, present, acting = self.run, found.report, outlook.look.present, self.settings.acting
        halved = not found.measured and caps.beta == run.caps.caps.applied(report.alpha, report.beta)[1] / 2
        self._act(report, found.advice, found.transition, caps, step, lost=lost)
        if found.advice is None and not run.state.history and acting.speaks:
            for reason in crossing(run.ahead, report.beta_c, step):
                inform(announced(reason, self.settings.spelling))
        if self._rolled_back is not None and present is not None:
            self.rollback.report(present.begin, report.alpha, report.beta, step, halved=halved)
            self._rolled_back = None  # its rates are lowered
        if passes(found.severity, self.ratio):
            self.rollback.keep(step)

    def _act(
        self,
        report: StabilityReport,
        advice: Advice | None,
        transition: Transition,
        caps: Caps,
        step: int,
        *,
        lost: bool,
    ) -> None:
        """Apply the caps, speak, stop."""
        run, action, spelling = self.run, self.settings.acting, self.settings.spelling
        before = run.caps.caps
        if action.caps_rates:
            run.caps.apply(self.module, caps)
        beta = caps.applied(report.alpha, report.beta)[1]
        if transition.returned and action.speaks:
            tried, safe = self._looked, transition.state == SAFE
            inform(returned(step, safe=safe, applied=beta, configured=report.beta, tried=tried))
        if advice is not None and action.speaks:
            changed, helps = caps != before, advice.alpha is None or run.caps.reaches_alpha(self.module)
            # A rollback says what it does by itself.
            acts = (transition.entered or changed) and self._rolled_back is None
            acts = acts and (action.stops or not left_at_any_rate(advice))
            acts = acts and (action.stops or action.caps_rates or not no_rate_survives(advice))
            applied = applied_rates(caps, report.alpha, report.beta)
            effect = action.effect(spelling, applied, helps=helps, changed=changed) if acts else []
            if self._rolled_back is not None and not helps:
                effect = [OUT_OF_REACH]
            effect += [last_step(least_run(self.trainer))] if acts and action.stops else []
            if lost:
                effect = [NO_WAY_BACK]
            run.warn_and_alert(self.trainer, advice_given(step, advice, effect, spelling))
        elif lost and action.speaks:
            run.warn_and_alert(self.trainer, f"ConvergenceGuard: step {step}: {NO_WAY_BACK}")
        if lost or (transition.state == UNSAFE and action.stops):
            run.stop(self.trainer, step, report.findings if advice is None else advice.evidence)
        if action.speaks:
            for note in report.notes:
                # Nobody need be told that a diverged run could not be measured, nor that a rate has no limit to compare
                # with if its steps were tried.
                diverged = note.kind is Kind.NOT_MEASURED and transition.state == UNSAFE
                tried = note.kind is Kind.NOT_JUDGED and self._looked
                told = diverged or tried or (transition.entered and note in report.findings)
                run.announce(replace(note, step=step), just_said=told)

    def _keep(self, outlook: Outlook, found: Judgement, step: int) -> None:
        """Count what a check cost, keep what it found in the history, and log it."""
        run, report, look = self.run, found.report, outlook.look
        self._charge(look, report.cost + outlook.adviser.cost)
        run.schedule.state.unjudged = not run.state.history and report.beta_status == UNRESOLVED
        alpha, beta = run.caps.caps.applied(report.alpha, report.beta)
        if self.trainer.fast_dev_run:
            alpha, beta = report.alpha, report.beta
        kept = CheckReport.of(
            report,
            findings=found.findings,
            status=report.status if look.loss is None else found.transition.state,
            alpha_applied=alpha,
            beta_applied=beta,
            severity=look.severity,
            growth=math.nan if look.present is None else look.present.growth,
            adaptation_gain=look.adaptation_gain,
            advice=found.advice,
        )
        run.state.history = [*run.state.history, kept][-self.settings.history_size :]
        with run.warn_on_failure(SEND):
            log_check(self.trainer, kept, step, caps_rates=self.settings.acting.caps_rates)

    def _charge(self, look: Look, cost: float) -> None:
        gradients = 0 if look.lookahead is None else look.lookahead.gradients
        adapted = 0.0 if look.adaptation is None else COST
        self.run.schedule.charge(lookahead_gradients=gradients, measured=cost + adapted)

    def _is_lost(self, loss: float) -> bool:
        """Whether no lower rate can help: parameters are not finite, and the run was not rolled back."""
        acts = self.settings.acting.caps_rates and self._rolled_back is None
        return acts and not math.isfinite(loss) and not finite(self.module)

    def _judge_last_loss(self, step: int) -> None:
        """Act on the loss of the last step if no step could be tried."""
        run, statistics, ratio = self.run, self.run.state.statistics, self.ratio
        loss, scale = statistics.last, statistics.scale
        diverged = loss is not None and scale.diverged(loss, ratio) and not self.trainer.fast_dev_run
        if loss is None or not diverged or self.rollback.go_back_untried(loss, step):
            return
        run.schedule.confirm_divergence()
        beta = max(scheduled_rate(each) for each in self.trainer.optimizers)
        report = StabilityReport.unmeasured(last_loss_reason(loss, scale), alpha=math.nan, beta=beta, step=step)
        run.note_severity(step, scale.severity(loss), beta)
        transition, lost = run.machine.take(report, scale.severity(loss)), self._is_lost(loss)
        caps, lowers = run.caps.caps, self.settings.acting.caps_rates and transition.state == UNSAFE
        if lowers and math.isfinite(loss) and run.cap_all_optimizers(self.trainer):
            caps = caps.halved(beta)
        found = Advice(cause=Cause.UNKNOWN, step=step, evidence=report.findings)
        advice = found if transition.entered else None
        run.state.advice = run.state.advice or advice
        self._act(report, advice, transition, caps, step, lost=lost)
