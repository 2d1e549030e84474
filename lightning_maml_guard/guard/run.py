"""A run under a guard: its state, and the live objects that work on it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_maml_guard.guard.loggers import Figures, Ratios, alert, logger_step
from lightning_maml_guard.guard.report import LatestLimits, Stopwatch
from lightning_maml_guard.guard.rescale import AppliedCaps
from lightning_maml_guard.guard.schedule import Schedule
from lightning_maml_guard.guard.settings import Settings
from lightning_maml_guard.guard.state import GuardState, StateError, from_checkpoint
from lightning_maml_guard.guard.state_machine import StateMachine
from lightning_maml_guard.lookahead.divergence import SETTLED
from lightning_maml_guard.lookahead.replay_buffer import ReplayBuffer
from lightning_maml_guard.maml.meta_learning import MetaLearning
from lightning_maml_guard.messages.advice_sentences import NO_WAY_BACK, advised
from lightning_maml_guard.messages.reasons import Kind, Reason, of_error
from lightning_maml_guard.messages.sentences import announced, cause
from lightning_maml_guard.messages.terminal import warn
from lightning_maml_guard.optim.clipping import gradient_norm
from lightning_maml_guard.optim.lr_cap import known_rate
from lightning_maml_guard.optim.rates_ahead import RatesAhead, RateTrend
from lightning_maml_guard.optim.snapshot import Snapshot, SnapshotRing
from lightning_maml_guard.optim.turns import Turns
from lightning_maml_guard.stability.hvp import MeasurementCache
from lightning_maml_guard.stability.objective import objective_of
from lightning_maml_guard.stability.problems import alpha_of, at_alpha, has_meta_problem, state_problem
from lightning_maml_guard.stability.training_match import TrainingMatch
from lightning_maml_guard.utils.distributed import Ranks
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.lightning_compat import planned_steps
from lightning_maml_guard.utils.shards import finite
from lightning_maml_guard.utils.warnings import ReportedFailure


class GuardedRun:
    """A run under a guard: its state, and the live objects that work on it."""

    def __init__(
        self, settings: Settings, state: GuardState | None = None, *, inert: bool = False, ranks: Ranks | None = None
    ) -> None:
        self.settings, self.state, self.inert = settings, state or GuardState(), inert
        self.cache = MeasurementCache(self.state.facts, ranks or Ranks())
        self.schedule = Schedule(settings.every_n_steps, settings.max_cost, self.state.schedule)
        self.machine = StateMachine(settings.patience, settings.lookahead.divergence_ratio, self.state.watches)
        self.caps = AppliedCaps(settings.acting.caps_rates and not inert, self.state.caps)
        self.ring = SnapshotRing([Snapshot.restored(each) for each in self.state.snapshots])
        self.replay = ReplayBuffer(settings.lookahead.batches)
        self.replay.load(self.state.batches, self.state.spike)
        self.state.snapshots, self.state.batches, self.state.spike = [], [], []  # `saved` asks the live objects
        self.figures, self.ratios, self.clock = Figures(settings.figures), Ratios(), Stopwatch()
        self.norm: Tensor | float | None = None  # of the latest gradient, maybe on the device; None: not known
        self._losses: list[float] = []  # of the batches accumulated so far
        self.match: TrainingMatch | None = None  # compares the problem with the coming step, once
        self.matched, self.turns, self._coming = False, Turns(), RateTrend()
        self.limits = LatestLimits()
        self.ahead: RatesAhead | None = None
        self.alpha = math.nan  # the inner rate as configured, where it was read last
        self.repeats = False  # whether every step uses the same batch: then nothing is drawn from its tasks

    def begin(self, trainer: Any) -> None:
        """Take in how far a run will go and what data it has."""
        self.clock.begin()
        self.schedule.planned = planned_steps(trainer)
        self.repeats = trainer.num_training_batches <= trainer.accumulate_grad_batches

    def cap_optimizers(self, trainer: Any, owned: list[int]) -> None:
        """Cap the steps of the optimizers with these indices."""
        held = [each for index, each in enumerate(trainer.optimizers) if index in owned]
        # Lightning's tuners step the run's optimizers with the run's callbacks taken out, to see what a rate does.
        self.caps.hold(held, lambda: self.settings in trainer.callbacks)
        self.state.capped = owned  # last, so that after a failure the next check tries again

    def is_capped(self, beta: float) -> bool:
        """Whether a rate is capped below what is configured, or was raised just now; ``beta``: as scheduled."""
        return self.caps.lowers(beta) or self.schedule.raised

    def cap_all_optimizers(self, trainer: Any) -> bool:
        """Cap all optimizers if none is capped yet; return whether any is."""
        if not (self.state.capped and self.caps.held):
            with self.warn_on_failure("lower the outer rate"):
                self.cap_optimizers(trainer, list(range(len(trainer.optimizers))))
        return bool(self.state.capped) and self.caps.held

    def take_gradient(self, optimizer: Optimizer) -> None:
        """Compare the gradient with the problem's, and keep its norm; a failure costs one warning."""
        self.turns.step(optimizer)
        if self.match is not None:
            with self.warn_on_failure("compare the gradient with the problem's"):
                self.match.take_gradient(optimizer)
        if self.settings.lookahead.triggers and self.settings.lookahead.steps:
            try:
                self.norm = gradient_norm(optimizer)
            except Exception as error:
                self.announce(of_error(Kind.NO_GRADIENT_NORM, error))

    def take_batch(self, batch: Any, batch_idx: int, accumulated: int) -> None:
        """Keep the batch of the coming step: for the lookaheads, and for the curvature of an accumulated batch."""
        self.replay.resize(accumulated * (self.settings.lookahead.batches if self.settings.lookahead.steps else 1))
        self.replay.add(batch, batch_idx)

    def take_step(self, loss: Any, trainer: Any, batch_idx: int) -> None:
        """Compare a step's loss and gradient norm with those of the steps before; a spike calls a check."""
        self.replay.skipped = loss is None and trainer.lightning_module.automatic_optimization
        self.ratios.show(trainer, self.state.history)
        self.state.losses.end = logger_step(trainer) + 1
        if self.turns.taken():
            self.announce(Reason(Kind.OPTIMIZERS_TAKE_TURNS))
            self.caps.release()
            self.ring.kept.clear()
            self.match = None  # no single problem is that of training
        known, accumulated = isinstance(loss, Tensor) and loss.numel() == 1, trainer.accumulate_grad_batches
        if not self.settings.lookahead.steps:
            known = known and self.cache.ranks.processes == 1
            return self._take_loss_alone(float(loss.item()) * accumulated if known else None, trainer)
        known, value, norm = self._mean_over_ranks(known, float(loss.item()) if known else math.nan, trainer)
        value *= accumulated
        self._finish_match(value if known else math.nan)
        if known:
            self._losses.append(value)
        elif not trainer.lightning_module.automatic_optimization and self.settings.acting.speaks:
            self.announce(Reason(Kind.NO_STEP_LOSS))
        # One batch after another is accumulated: the step's loss is their mean.
        if self._losses and ((batch_idx + 1) % accumulated == 0 or trainer.is_last_batch):
            value, self._losses = fmean(self._losses), []
            self._compare_step(value, norm, trainer)

    def _mean_over_ranks(self, known: bool, loss: float, trainer: Any) -> tuple[bool, float, float]:
        """Whether every rank knows a batch's loss, and the means of the loss and of the gradient norm."""
        norm, self.norm = math.nan if self.norm is None else float(self.norm), None
        if self.cache.ranks.processes == 1:
            return known, loss, norm
        # On every rank, whatever it has: one that stayed away would leave the others waiting.
        own = torch.tensor([float(known), loss, norm], device=trainer.strategy.root_device)
        share, loss, norm = trainer.strategy.reduce(own, reduce_op="mean").tolist()
        return share == 1, loss, norm

    def _compare_step(self, loss: float, norm: float, trainer: Any) -> None:
        """Call a check if the step's loss or gradient norm spiked; drop the snapshot before it if it did no good."""
        self.state.losses.add(loss)
        step, statistics, lookahead = logger_step(trainer), self.state.statistics, self.settings.lookahead
        watches = lookahead.triggers and (self.settings.acting.caps_rates or not self.machine.unsafe)
        spiked, left_best = statistics.update(loss, norm), statistics.has_left_best
        lost_half = left_best and statistics.has_lost_half
        size, at_best = trainer.accumulate_grad_batches, statistics.loss <= statistics.best
        self.replay.note_loss(loss, step, size, spiked=spiked, at_best=at_best)
        if (spiked or lost_half) and watches:
            diverged = lost_half or statistics.scale.diverged(loss, lookahead.divergence_ratio)
            self.schedule.spike(diverged=diverged, lost=not math.isfinite(loss))
        if statistics.since >= SETTLED:
            self.schedule.note_mean_loss(statistics.loss, step)
        if watches:
            self.schedule.note_left_best(left_best)
        if left_best or not statistics.near_best:
            self.ring.drop_from(step)  # the loss is that of the copy made before the step

    def _take_loss_alone(self, loss: float | None, trainer: Any) -> None:
        """Without lookaheads: say that a loss is not finite, and stop if that is the action or nothing can help."""
        self._finish_match(math.nan if loss is None else loss)
        if loss is not None:
            self.state.losses.add(loss)
        if loss is None or math.isfinite(loss):
            return
        step, action = logger_step(trainer), self.settings.acting
        reason = Reason(Kind.LOSS_NOT_FINITE, losses=(loss, math.nan, math.nan), step=step)
        lost = action.caps_rates and not finite(trainer.lightning_module)
        if action.speaks:
            self.announce(reason)
        if action.speaks and lost:
            self.warn_and_alert(trainer, f"ConvergenceGuard: step {step}: {NO_WAY_BACK}")
        if action.stops or lost:
            self.stop(trainer, step, (reason,))

    def begin_match(self, trainer: Any, module: Any, batch: Any, batch_idx: int, optimizers: list[Optimizer]) -> None:
        """Begin to compare the problem that the user states with the coming step; once."""
        source, ours = self.settings.problem, isinstance(module, MetaLearning)
        if self.matched or (source is None and (ours or not has_meta_problem(module))):
            return
        self.matched = True
        stated = partial(state_problem, source, module, batch, batch_idx)
        problem = stated()
        alpha = alpha_of(problem)
        if self.caps.caps.alpha is not None:  # the step trains under it
            problem = at_alpha(problem, self.caps.caps.applied(alpha, math.nan)[0])
        elif self.caps.active and not ours and self.caps.reaches_alpha(module):
            ignored = self.caps.try_on(module, alpha, stated)
            if ignored is not None:
                self.announce(ignored)
        # There compiled code runs eagerly: what is traced here would not be compiled again for training.
        with double_backward():
            self.match = TrainingMatch(
                problem,
                objective_of(problem, "support", self.cache.map_of(problem)),
                optimizers,
                trainer.optimizers,
                accumulated=trainer.accumulate_grad_batches,
                half=str(trainer.precision).partition("-")[0] not in {"32", "64"},
                ranks=self.cache.ranks,
            )

    def _finish_match(self, loss: float) -> None:
        """End the comparison of the problem with training, and say what does not match."""
        match, self.match = self.match, None
        if match is not None and not match.is_at(self.caps.caps.applied(self.alpha, math.nan)[0]):
            self.matched = False  # a cap has moved since the problem was stated: the next step is compared
        elif match is not None:
            with self.warn_on_failure("compare the loss with the problem's"):
                differs = match.finish(loss)
                if not math.isnan(match.clipped_to):
                    self.state.clipped_to = match.clipped_to
                if differs is not None:
                    self.announce(differs)

    def take_over(self, before: GuardedRun) -> None:
        """Keep the hooks, batches and pictures when Lightning's LearningRateFinder loads its checkpoint again."""
        self.caps.take_over(before.caps)
        self.figures, self.ratios, self.clock = before.figures, before.ratios, before.clock
        self.repeats, self.schedule.planned = before.repeats, before.schedule.planned
        if not self.replay.restored:
            self.replay = before.replay

    def resumed(self, plain: Any) -> GuardedRun:
        """Restore a run from a checkpoint; if its state cannot be read, it starts anew with a warning."""
        settings, unread, most = self.settings, None, self.settings.history_size
        try:
            state = from_checkpoint(plain)
        except StateError as error:
            state, unread = GuardState(), Reason(Kind.STATE_NOT_READ, detail=str(error))
        state.history, state.severities = state.history[-most:], state.severities[-most:]
        run = GuardedRun(settings, state, inert=self.inert, ranks=self.cache.ranks)
        run.take_over(self)
        if unread is not None:
            run.announce(unread)
        return run

    def saved(self) -> GuardState:
        """Collect the state for a checkpoint from here and from the live objects."""
        settings, ranks = self.settings, self.cache.ranks
        # One of several processes has batches of its own, or pieces, and the checkpoint is the first one's.
        exactly = settings.acting.resumes_exactly and settings.lookahead.steps > 0 and ranks.processes == 1
        kept = self.ring.state() if settings.rollback and ranks.size == ranks.processes else []
        self.cache.remember_looping()
        state = replace(self.state, watches=self.machine.watches, caps=self.caps.caps, snapshots=kept)
        return replace(state, batches=self.replay.state(), spike=self.replay.spike_state()) if exactly else state

    def announce(self, reason: Reason, *, just_said: bool = False) -> None:
        """Warn, unless the same was said before; ``just_said``: another message holds it, so it counts as said."""
        if reason.key not in self.state.announced:
            self.state.announced.add(reason.key)
            if not just_said:
                self.state.add_event("notice", reason, step=reason.step)
                warn(announced(reason, self.settings.spelling))

    def warn_on_failure(self, what: str) -> ReportedFailure:
        """Turn an exception into one warning, that ``what`` could not be done."""
        return ReportedFailure(lambda error: self.announce(of_error(Kind.TASK_FAILED, error, what=what)))

    def stop(self, trainer: Any, step: int, reasons: tuple[Reason, ...]) -> None:
        """Ask the Trainer to stop."""
        if self.state.stopped_step is None:
            self.state.add_event("stopped", *reasons, step=step)
        self.state.stopped_step, self.state.stopping = step, list(reasons)
        trainer.should_stop = True
        self.caps.stand_still(trainer)

    @property
    def stopping_reason(self) -> str | None:
        """What to set, and why the run was stopped; None if it was not."""
        state, spelling = self.state, self.settings.spelling
        if not state.stopping:
            return None
        to_do = [] if state.advice is None else [advised(state.advice, spelling)]
        return " ".join([*to_do, *(cause(each, spelling) for each in state.stopping)])

    def warn_and_alert(self, trainer: Any, message: str) -> None:
        """Warn, and send an alert through the loggers that have them."""
        warn(message)
        with self.warn_on_failure("send an alert to a logger"):
            alert(trainer, message)

    def rates(self, trainer: Any, step: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """The applied inner and outer rates of the coming step, and the highest over a lookahead's steps."""
        now = self.alpha, known_rate([trainer.optimizers[at] for at in self.state.capped])
        schedule = self.ahead if trainer.lr_scheduler_configs else None
        caps, coming = self.caps.caps, self._coming.take(now, schedule, step, self.settings.lookahead.steps)
        return caps.applied(*now), caps.applied(*coming)

    def note_severity(self, step: int, severe: float, beta: float) -> None:
        """Keep a lookahead's severity; ``beta``: the scheduled outer rate."""
        self.ratios.note_lookahead(severe, self.caps.caps.applied(self.alpha, beta))
        self.state.severities = [*self.state.severities, (step, severe)][-self.settings.history_size :]
