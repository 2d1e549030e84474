"""A run under a guard: its state, and the live objects that work on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from lightning_maml_guard.guard.actions import Action
from lightning_maml_guard.guard.loggers import Figures, warn
from lightning_maml_guard.guard.lookahead import LookaheadOptions
from lightning_maml_guard.guard.replay_buffer import ReplayBuffer
from lightning_maml_guard.guard.rescale import AppliedCaps
from lightning_maml_guard.guard.schedule import Schedule
from lightning_maml_guard.guard.state import GuardState
from lightning_maml_guard.guard.state_machine import StateMachine
from lightning_maml_guard.messages.reasons import Kind, Reason, of_error
from lightning_maml_guard.messages.sentences import Spelling, announced
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.stability.hvp import MeasurementCache
from lightning_maml_guard.stability.options import CurvatureOptions
from lightning_maml_guard.stability.problems import ProblemSource
from lightning_maml_guard.utils.distributed import Ranks
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
        self.settings, self.state = settings, state or GuardState()
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

    def take_over(self, before: GuardedRun) -> None:
        """Go on with the hooks, batches and pictures of a run whose state is replaced while it trains."""
        # Lightning's LearningRateFinder does that: it saves the run, trains, and loads the checkpoint again.
        self.caps.take_over(before.caps)
        self.figures = before.figures
        if not self.replay.restored:
            self.replay = before.replay

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
