"""One check of a run: look ahead, measure the curvature, decide, act."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from torch.optim import Optimizer

from lightning_maml_guard.guard.actions import Situation
from lightning_maml_guard.guard.advising import Adviser
from lightning_maml_guard.guard.loggers import log_check, log_values
from lightning_maml_guard.guard.look import Look, advised_alpha, allows, ease, look_at
from lightning_maml_guard.guard.report import CheckReport
from lightning_maml_guard.guard.rollback import Rollback
from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.guard.state_machine import Transition
from lightning_maml_guard.lookahead.divergence import fails, passes, undecided
from lightning_maml_guard.lookahead.learning import chance_loss, last_loss_reason
from lightning_maml_guard.lookahead.lookahead import Caps, LookaheadResult, lookahead_reason
from lightning_maml_guard.messages.advice import Advice, Cause
from lightning_maml_guard.messages.advice_sentences import NO_WAY_BACK, advice_given
from lightning_maml_guard.messages.reasons import Kind, Reason, of_check
from lightning_maml_guard.messages.sentences import announced, returned
from lightning_maml_guard.messages.terminal import inform
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.stability.measure import measure
from lightning_maml_guard.stability.problems import NoLossError, Problem
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import SAFE, UNRESOLVED, UNSAFE
from lightning_maml_guard.utils.isolation import undisturbed
from lightning_maml_guard.utils.shards import finite, reshard
from lightning_maml_guard.utils.warnings import GuardWarning


class Check:
    """One check of a run; it leaves the run as it was where it fails."""

    def __init__(self, run: GuardedRun, trainer: Any, module: Any) -> None:
        self.settings, self.run, self.trainer, self.module = run.settings, run, trainer, module
        self.rollback = Rollback(run, trainer, module)
        reshard(module)
        # Where the run was rolled back by this check: what lowers its rates if the rest of the check fails.
        self._rolled_back: tuple[list[Optimizer], LookaheadResult] | None = None
        self._acted = False
        self._looked = False

    def check(self, batch: Any, batch_idx: int, step: int, *, scheduled: bool) -> None:
        """Check once, on the batch of the coming step; a triggered check that finds nothing ends early."""
        run, watches = self.run, self.run.machine.watches
        try:
            if step == 0 and run.snapshot is None and not self.trainer.fast_dev_run:
                self.rollback.keep(step)  # first, as the check may fail; later only states whose lookahead passes
            with run.cache.ranks.together():
                self._check(batch, batch_idx, step, scheduled)
        except GuardWarning:
            raise
        except Exception as error:
            # Whatever goes wrong in a check, training goes on as if the guard were not there. A state that it changed
            # without acting on it is changed again by the next.
            if not self._acted:
                run.machine.watches = watches
            if isinstance(error, NoLossError) and run.cache.ranks.processes == 1 and run.schedule.put_off():
                return
            run.announce(of_check(error, step))
            if self._rolled_back is not None:
                optimizers, present = self._rolled_back
                self.rollback.halve(present.begin, scheduled_rate(optimizers), step)
            elif not (self._looked or self._acted):
                with run.only_told("judge the run by its last loss"):
                    self._judge_last_loss(step)

    def _check(self, batch: Any, batch_idx: int, step: int, scheduled: bool) -> None:
        settings, run, trainer, module = self.settings, self.run, self.trainer, self.module
        ratio, caps_before = settings.lookahead.divergence_ratio, run.caps.caps
        # 1. Look ahead.
        with undisturbed(trainer, module):
            look = look_at(run, trainer, module, batch, batch_idx, step)
            self._looked = look.present is not None
            if look.present is not None:
                run.state.statistics.look(look.present.begin)
            if not run.state.history:
                run.state.statistics.chance = chance_loss(module, batch)
            run.begin_match(trainer, module, batch, batch_idx, look.optimizers)
            adviser, stuck = Adviser(run, trainer, module, look, step), run.state.statistics.stuck
            learning, collapsed = self.rollback.compare(look), None
            away = learning is not None and learning.lost
            if learning is not None and away and not adviser.comes_back(learning.kept_loss):
                collapsed, look.severity = self.rollback.lost(learning, look, step), max(look.severity, math.log(ratio))
            adviser.look_at_peak()
            adviser.look_at_progress()
        failing = look.present is not None and fails(look.severity, ratio)
        gone = collapsed is not None or (look.present is not None and look.scale.diverged(look.present.begin, ratio))
        if failing:
            if look.present is not None and self.rollback.helps(look.present.begin):
                run.schedule.confirm()
        elif stuck and adviser.news is None:
            self.rollback.warn_of_stall(look, step)
        if look.present is not None:
            run.note_severity(step, look.severity, look.beta)
            if not scheduled and not failing and adviser.news is None:
                slips, well = learning is not None and not learning.holds, passes(look.severity, ratio)
                if away:
                    self.rollback.undo(look, step)
                elif slips or well:
                    ease(run, trainer, module, look, step, slips=slips)
                if well and not away:
                    self.rollback.keep(step)
                self._charge(look, adviser.cost)
                log_values(trainer, module, look.metrics, step)
                return
            # 2. Roll back a run that has diverged already, or lost what it had learned.
            if settings.rollback and failing and gone and self.rollback.helps(look.present.begin):
                if not self.rollback.go_back(look.present.begin, step, look):
                    return
                self._rolled_back = look.optimizers, look.present
        elif look.last is not None and self.rollback.ends(look.last, step):
            return
        rolled_back = self._rolled_back is not None
        lost = look.loss is not None and self._is_lost(look.loss)
        # 3. Measure the curvature, advance the state, and decide on the rates.
        with undisturbed(trainer, module):
            report, measured = self._measured(look.problem, look.optimizers, step)
            findings = (*report.findings, *look.findings, *([] if collapsed is None else [collapsed]))
            further = None if failing or run.state.history else adviser.look_further(report)
            if further is not None:
                # What leaves only in a longer look is no more severe than what just fails in a lookahead.
                failing, longer = True, min(look.scale.severity(further.present.end), math.log(ratio))
                look.severity = max(look.severity, longer)
                run.note_severity(step, look.severity, look.beta)
            # Rates at which a run learns clearly less than at lower ones are judged as those at which it diverges.
            judged = look.severity if further is None else max(look.severity, math.log(ratio))
            if failing and report.status != UNSAFE and look.may_miss_clipping(ratio):
                run.announce(Reason(Kind.CLIPPING_NOT_SEEN, step=step))
                failing, judged = False, undecided(ratio)
            if look.last is not None and report.status != UNSAFE:  # else the curvature has its word
                judged = look.scale.severity(look.last)
                run.note_severity(step, judged, report.beta)
                if failing := fails(judged, ratio):
                    run.schedule.confirm()
                    findings = (*findings, last_loss_reason(look.last, look.scale))
            tried = caps_before.applied(report.alpha, report.beta)
            if failing and look.present is not None and further is None and collapsed is None:
                findings = (*findings, lookahead_reason(look.present, look.scale.start, *tried))
            transition = run.machine.take(report, judged)
            advice = adviser.advise(report, findings, transition, further)
            # Where the run survives the next steps, but not for long, a lower meta rate replaces no lower inner one.
            reach = run.caps.reaches_alpha(module)
            out_of_reach = further is not None and advice is not None and advice.alpha is not None and not reach
            situation = Situation(
                report=report,
                transition=transition,
                caps=run.caps.caps,
                margin=settings.margin,
                reach_alpha=reach,
                fails=failing and not out_of_reach,
                rolled_back=rolled_back,
                present=look.present,
                lookahead=look.lookahead,
                scale=look.scale,
                harmful=look.harmful,
                advised=advised_alpha(run, look.problem),
                left=gone,
                allows=partial(allows, run, alpha=report.alpha, beta=report.beta, step=step),
            )
            if failing or rolled_back:
                run.state.ceiling = run.state.ceiling.failed(*tried, step)
            caps = run.caps.caps if lost else settings.acting.decide(situation)
            run.schedule.ease(step, changed=caps != run.caps.caps)
        if run.state.capped != look.owned:
            run.cap(trainer, look.owned)
        # 4. Act.
        if not trainer.fast_dev_run:
            self._acted = True
            halved = not measured and caps.beta == run.caps.caps.applied(report.alpha, report.beta)[1] / 2
            self._act(report, advice, transition, caps, step, lost=lost)
            if advice is None and not run.state.history and settings.acting.speaks:
                for reason in adviser.crossing(report):
                    inform(announced(reason, settings.spelling))
            if rolled_back and look.present is not None:
                self.rollback.report(look.present.begin, report.alpha, report.beta, step, halved=halved)
                self._rolled_back = None  # its rates are lowered
            if passes(judged, ratio):
                self.rollback.keep(step)
        self.rollback.warn_of_collapse(look.problem, report, transition.state, step)
        # 5. Keep and log what was found.
        self._charge(look, report.cost + adviser.cost)
        run.schedule.state.unjudged = not run.state.history and report.beta_status == UNRESOLVED
        alpha, beta = run.caps.caps.applied(report.alpha, report.beta)
        if trainer.fast_dev_run:
            alpha, beta = report.alpha, report.beta
        found = CheckReport.of(
            report,
            findings=findings,
            status=report.status if look.loss is None else transition.state,
            alpha_applied=alpha,
            beta_applied=beta,
            severity=look.severity,
            growth=math.nan if look.present is None else look.present.growth,
            adaptation_gain=look.adaptation_gain,
            advice=advice,
        )
        run.state.history = [*run.state.history, found][-settings.history_size :]
        log_check(trainer, module, found, step, caps_rates=settings.acting.caps_rates)

    def _is_lost(self, loss: float) -> bool:
        """Whether no lower rate can help: parameters are not finite, and the run was not rolled back."""
        acts = self.settings.acting.caps_rates and self._rolled_back is None
        return acts and not math.isfinite(loss) and not finite(self.module)

    def _act(
        self,
        report: StabilityReport,
        advice: Advice | None,
        transition: Transition,
        caps: Caps,
        step: int,
        *,
        lost: bool = False,
    ) -> None:
        """Apply the caps, speak, stop."""
        run, action, spelling = self.run, self.settings.acting, self.settings.spelling
        before = run.caps.caps
        if action.caps_rates:
            run.caps.apply(self.module, caps)
        alpha, beta = caps.applied(report.alpha, report.beta)
        if transition.returned and action.speaks:
            tried, safe = self._looked, transition.state == SAFE
            inform(returned(step, safe=safe, applied=beta, configured=report.beta, tried=tried))
        if advice is not None and action.speaks:
            acts = transition.entered and self._rolled_back is None  # a rollback says what it does by itself
            helps = advice.alpha is None or run.caps.reaches_alpha(self.module)
            changed = caps != before
            effect = action.effect(spelling, alpha, beta, helps=helps, changed=changed) if acts else []
            if lost:
                effect = [NO_WAY_BACK]
            run.tell(self.trainer, advice_given(step, advice, effect, spelling))
        elif lost and action.speaks:
            run.tell(self.trainer, f"ConvergenceGuard: step {step}: {NO_WAY_BACK}")
        if lost or (transition.state == UNSAFE and action.stops):
            run.stop(self.trainer, step, report.findings if advice is None else advice.evidence)
        if action.speaks:
            for note in report.notes:
                # That nothing can be measured where a run has been thrown to is no news.
                thrown = note.kind is Kind.NOT_MEASURED and transition.state == UNSAFE
                told = thrown or (transition.entered and note in report.findings)
                run.announce(replace(note, step=step), just_said=told)

    def _measured(self, problem: Problem, optimizers: list[Optimizer], step: int) -> tuple[StabilityReport, bool]:
        """Measure the curvature; where that fails and the next steps were tried, they alone decide."""
        run, settings = self.run, self.settings
        try:
            with run.cache.ranks.together():
                report = measure(
                    problem,
                    optimizer=optimizers,
                    curvature=settings.curvature,
                    margin=settings.margin,
                    step=step,
                    cache=run.cache,
                )
            return report, True
        except GuardWarning:
            raise
        except Exception as error:
            if not self._looked:
                raise
            run.announce(replace(of_check(error, step), kind=Kind.NO_CURVATURE_MEASURED))
            reason = Reason(Kind.NOT_MEASURED, detail=f"{type(error).__name__}: {error}", step=step)
            alpha, beta = getattr(problem, "alpha", math.nan), scheduled_rate(optimizers)
            criterion = settings.curvature.criterion
            return StabilityReport.unmeasured(reason, alpha=alpha, beta=beta, criterion=criterion, step=step), False

    def _judge_last_loss(self, step: int) -> None:
        """Act on the loss of the last step where no step could be tried: a run that has diverged is not left alone."""
        run, statistics, ratio = self.run, self.run.state.statistics, self.settings.lookahead.divergence_ratio
        loss, scale = statistics.last, statistics.scale
        left = loss is not None and scale.diverged(loss, ratio) and not self.trainer.fast_dev_run
        if loss is None or not left or self.rollback.ends(loss, step):
            return
        run.schedule.confirm()
        beta = max(scheduled_rate(each) for each in self.trainer.optimizers)
        report = StabilityReport.unmeasured(last_loss_reason(loss, scale), alpha=math.nan, beta=beta, step=step)
        run.note_severity(step, scale.severity(loss), beta)
        transition, lost = run.machine.take(report, scale.severity(loss)), self._is_lost(loss)
        caps, lowers = run.caps.caps, self.settings.acting.caps_rates and transition.state == UNSAFE
        if lowers and math.isfinite(loss) and run.holds(self.trainer):
            caps = caps.halved(beta)
        found = Advice(cause=Cause.UNKNOWN, step=step, evidence=report.findings)
        advice = found if transition.entered else None
        run.state.advice = run.state.advice or advice
        self._act(report, advice, transition, caps, step, lost=lost)

    def _charge(self, look: Look, cost: float) -> None:
        gradients = 0 if look.lookahead is None else look.lookahead.gradients
        self.run.schedule.charge(lookahead_gradients=gradients, measured=cost + look.cost)
