"""A run under a guard: its state, and the live objects that work on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_maml_guard.guard.actions import ACTIONS, Action
from lightning_maml_guard.guard.divergence import gradient_norm
from lightning_maml_guard.guard.loggers import Figures, warn
from lightning_maml_guard.guard.lookahead import LookaheadOptions, check_lookahead
from lightning_maml_guard.guard.replay_buffer import ReplayBuffer
from lightning_maml_guard.guard.rescale import AppliedCaps
from lightning_maml_guard.guard.schedule import Schedule
from lightning_maml_guard.guard.state import GuardState, StateError, from_checkpoint
from lightning_maml_guard.guard.state_machine import StateMachine
from lightning_maml_guard.messages.reasons import Kind, Reason, of_error
from lightning_maml_guard.messages.sentences import announced
from lightning_maml_guard.messages.spelling import Spelling
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.stability.hvp import MeasurementCache
from lightning_maml_guard.stability.options import CurvatureOptions, check_curvature
from lightning_maml_guard.stability.problems import ProblemSource, has_meta_problem
from lightning_maml_guard.theory.limits import check_margin
from lightning_maml_guard.utils.checks import check_choice, check_count, check_device, check_flag, check_number
from lightning_maml_guard.utils.distributed import Ranks
from lightning_maml_guard.utils.lightning_compat import MisconfigurationException
from lightning_maml_guard.utils.warnings import GuardWarning


class Settings(Protocol):
    """A guard's arguments; see :class:`~lightning_maml_guard.ConvergenceGuard`."""

    every_n_steps: int
    max_cost: float | None
    margin: float
    patience: int
    problem: ProblemSource | None
    curvature: CurvatureOptions
    lookahead: LookaheadOptions
    rollback: bool
    max_rollbacks: int
    snapshot_device: str | None
    figures: bool
    history_size: int
    spelling: Spelling

    @property
    def acting(self) -> Action:
        """The action."""


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
        # The live objects take over what a checkpoint held; `saved` asks them for it.
        kept, self.state.snapshot = self.state.snapshot, None
        self.snapshot = None if kept is None else Snapshot.restored(kept)
        self.replay = ReplayBuffer(settings.lookahead.batches)
        self.replay.load(self.state.batches)
        self.state.batches = []
        self.figures = Figures(settings.figures)
        # Gradient norm of the step at hand, maybe on the device; None if it is not known.
        self.norm: Tensor | float | None = None

    def take_gradient(self, optimizer: Optimizer) -> None:
        """Keep the norm of the gradient at hand; a failure costs one warning."""
        try:
            self.norm = gradient_norm(optimizer)
        except Exception as error:
            self.announce(of_error(Kind.NO_GRADIENT_NORM, error))

    def take_step(self, loss: Any, trainer: Any) -> None:
        """Compare a step's loss and gradient norm with those of the steps before; a spike calls a check."""
        known = isinstance(loss, Tensor) and loss.numel() == 1
        value = float(loss.item()) if known else math.nan
        norm = math.nan if self.norm is None else float(self.norm)
        self.norm = None
        if self.cache.ranks.size > 1:
            # On every rank, whatever it has: one that stayed away would leave the others waiting.
            had = torch.tensor([float(known), value, norm], device=trainer.strategy.root_device)
            share, value, norm = trainer.strategy.reduce(had, reduce_op="mean").tolist()
            known = share == 1
        if not known:
            return
        value *= trainer.accumulate_grad_batches
        statistics, lookahead = self.state.statistics, self.settings.lookahead
        told = self.machine.unsafe and not self.settings.acting.caps_rates
        if statistics.update(value, norm) and lookahead.triggers and not told:
            self.schedule.spike(diverged=statistics.diverged(value, lookahead.divergence_ratio))

    def take_over(self, before: GuardedRun) -> None:
        """Go on with the hooks, batches and pictures of a run whose state is replaced while it trains."""
        # Lightning's LearningRateFinder does that: it saves the run, trains, and loads the checkpoint again.
        self.caps.take_over(before.caps)
        self.figures = before.figures
        if not self.replay.restored:
            self.replay = before.replay

    def resumed(self, plain: Any) -> GuardedRun:
        """Make the run that a checkpoint tells of; one whose state cannot be read starts anew, and says so."""
        settings, unread = self.settings, None
        try:
            state = from_checkpoint(plain)
        except StateError as error:
            state, unread = GuardState(), Reason(Kind.STATE_NOT_READ, detail=str(error))
        most = settings.history_size
        state.history, state.severities = state.history[-most:], state.severities[-most:]
        run = GuardedRun(settings, state, inert=self.inert, ranks=self.cache.ranks)
        run.take_over(self)
        if unread is not None:
            run.announce(unread)
        return run

    def saved(self) -> GuardState:
        """Collect the state for a checkpoint, what the live objects hold included."""
        settings = self.settings
        # In one of several processes each has batches of its own, and the checkpoint is the first one's.
        exactly = settings.acting.resumes_exactly and settings.lookahead.steps > 0 and self.cache.ranks.size == 1
        self.cache.note_the_map()
        return replace(
            self.state,
            watches=self.machine.watches,
            caps=self.caps.caps,
            batches=self.replay.state() if exactly else [],
            snapshot=None if self.snapshot is None else self.snapshot.state(),
        )

    def announce(self, reason: Reason, *, just_said: bool = False) -> None:
        """Warn, unless the same was said before; ``just_said``: another message holds it, so it counts as said."""
        if reason.key not in self.state.announced:
            self.state.announced.add(reason.key)
            if not just_said:
                self.state.note("notice", reason, step=reason.step)
                warn(announced(reason, self.settings.spelling))

    @contextmanager
    def only_told(self, what: str) -> Iterator[None]:
        """Let a failure outside a check cost one warning and nothing else; ``what`` could not be done."""
        try:
            yield
        except GuardWarning:
            raise
        except Exception as error:
            self.announce(of_error(Kind.TASK_FAILED, error, what=what))

    def stop(self, trainer: Any, step: int, reasons: tuple[Reason, ...]) -> None:
        """Ask the Trainer to stop."""
        if self.state.stopped_step is None:
            self.state.note("stopped", *reasons, step=step)
        self.state.stopped_step, self.state.stopping = step, list(reasons)
        trainer.should_stop = True

    def note_severity(self, step: int, severe: float) -> None:
        """Keep what a lookahead said."""
        self.state.severities = [*self.state.severities, (step, severe)][-self.settings.history_size :]


def check_settings(guard: Any) -> None:
    """Raise a ValueError or TypeError if an argument of a guard is not allowed, or if two do not go together."""
    for name in ("every_n_steps", "patience", "max_rollbacks", "history_size"):
        check_count(name, getattr(guard, name))
    check_number("max_cost", guard.max_cost, above=0, below=1)
    check_choice("action", guard.action, tuple(ACTIONS))
    for name in ("rollback", "figures", "allow_untested"):
        check_flag(name, getattr(guard, name))
    check_device("snapshot_device", guard.snapshot_device)
    if guard.problem is not None and not callable(guard.problem):
        raise ValueError(
            "Expected argument `problem` to be a function (pl_module, batch) -> MetaProblem but got "
            f"{guard.problem!r}. Pass such a function, or None for the module's own `meta_problem`."
        )
    check_margin(guard.margin)
    check_curvature(guard.curvature)
    check_lookahead(guard.lookahead)
    if guard.rollback and not (guard.acting.caps_rates and guard.lookahead.steps):
        raise ValueError(
            "rollback=True rolls a run back and lowers its rates until a lookahead survives, so it needs "
            f"action='rescale' and lookahead steps of at least 1 but got {guard.action!r} and {guard.lookahead.steps}. "
            "Set both, or leave `rollback` out."
        )


def check_watchable(settings: Settings, trainer: Any, pl_module: Any) -> None:
    """Raise a MisconfigurationException if there is nothing a guard could measure in a run."""
    if settings.problem is None and not has_meta_problem(pl_module) and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"ConvergenceGuard cannot watch the training_step of {type(pl_module).__name__}: with manual "
            "optimisation it takes optimizer steps of its own. Give the module a method meta_problem(batch) -> "
            "MetaProblem, or pass ConvergenceGuard(problem=lambda module, batch: MetaProblem(...))."
        )
    if trainer.world_size > 1 and settings.curvature.estimator == "pyhessian":
        raise MisconfigurationException(
            f"ConvergenceGuard(estimator='pyhessian') measures one process's loss, but {trainer.world_size} train "
            "together. Use estimator='lanczos', whose products are averaged over them."
        )
