"""What a guard knows of the run it watches, and keeps across a restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from lightning_maml_guard.guard.console import Gauges
from lightning_maml_guard.guard.course import Course
from lightning_maml_guard.guard.figures import Figures
from lightning_maml_guard.guard.intervention import Intervention
from lightning_maml_guard.guard.messages import Spelling
from lightning_maml_guard.guard.replay_buffer import Replay
from lightning_maml_guard.guard.rescue import Rescue
from lightning_maml_guard.guard.schedule import Lookout
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.stability.budget import Budget
from lightning_maml_guard.stability.estimators import Estimator
from lightning_maml_guard.stability.hvp import Memory
from lightning_maml_guard.stability.report import StabilityReport, from_plain, to_plain
from lightning_maml_guard.utils.distributed import Ranks


class Settings(Protocol):
    """A guard's arguments, and how its messages write them; see :class:`~lightning_maml_guard.ConvergenceGuard`."""

    every_n_steps: int
    max_cost: float | None
    tasks_per_check: int | None
    action: str
    criterion: str
    margin: float
    patience: int
    estimator: Estimator
    max_iter: int
    tol: float
    basis: str
    tasks: str
    data: str
    problem: Callable[[Any, Any], MetaProblem] | None
    trial_steps: int
    replay: int
    alarm: float
    triggers: bool
    rollback: bool
    max_rollbacks: int
    snapshot_device: str | None
    figures: bool
    history_size: int
    spelling: Spelling


class Run:
    """The state of a guarded run.

    Args:
        settings: The guard's arguments.
        inert: Whether nothing may be done to the run.
        ranks: The processes that train together.

    Attributes:
        history: The reports of the latest checks.
        severities: Steps and severities of the latest trials.
        norm: Gradient norm of the step at hand, maybe on the device; None if it is not known.
    """

    def __init__(self, settings: Settings, *, inert: bool = False, ranks: Ranks | None = None) -> None:
        self.history: list[StabilityReport] = []
        self.severities: list[tuple[int, float]] = []
        self.norm: Tensor | float | None = None
        self.course = Course(settings.patience, settings.alarm)
        self.memory = Memory(ranks=ranks or Ranks())
        self.rescue = Rescue(settings.action == "rescale" and not inert, settings.snapshot_device)
        self.intervention = Intervention(
            settings.action, settings.margin, settings.max_rollbacks, self.course, self.rescue, settings.spelling
        )
        self.lookout = Lookout(settings.every_n_steps, Budget(settings.max_cost))
        self.replay = Replay(settings.replay)
        self.gauges, self.figures = Gauges(), Figures(settings.figures)
        self._size = settings.history_size
        # What the guard does to a run hangs on these; where it does nothing they would only swell the checkpoint. In
        # one of several processes each has batches of its own, and the checkpoint is the first one's.
        self._keeps_batches = settings.action in {"rescale", "stop"} and settings.trial_steps > 0
        self._keeps_batches = self._keeps_batches and self.memory.ranks.size == 1

    def note(self, report: StabilityReport) -> None:
        """Put a check's report into the history.

        Args:
            report: The report.
        """
        self.history = [*self.history, report][-self._size :]

    def note_severity(self, step: int, severity: float) -> None:
        """Note what a trial said.

        Args:
            step: Training step.
            severity: Its severity.
        """
        self.severities = [*self.severities, (step, severity)][-self._size :]

    def show(self, trainer: Any, *, changed: bool) -> None:
        """Show the latest check in the progress bar and, as pictures, on the loggers; the run goes on if that fails.

        Args:
            trainer: The Trainer.
            changed: Whether it changed the run's state.
        """
        with self.course.only_told("colour the progress bar"):
            self.gauges.show(trainer, self.history[-1])
        with self.course.only_told("send a picture or histogram to a logger (figures=False sends none)"):
            self.figures.after_check(trainer, self.history, changed=changed)

    def dress(self, trainer: Any, batch_idx: int) -> None:
        """Colour the progress bar again that an epoch may have begun with.

        Args:
            trainer: The Trainer.
            batch_idx: Index of the batch at hand.
        """
        if batch_idx == 0 and self.history:
            with self.course.only_told("colour the progress bar"):
                self.gauges.dress(trainer)

    def show_at_end(self, trainer: Any) -> None:
        """Send the last pictures.

        Args:
            trainer: The Trainer.
        """
        with self.course.only_told("send the last pictures to a logger (figures=False sends none)"):
            self.figures.at_end(trainer, self.history)

    def state(self) -> dict[str, Any]:
        """Collect what a restart needs.

        Returns:
            Primitives and tensors, so that a checkpoint loads with ``weights_only``.
        """
        snapshot = self.rescue.snapshot
        return {
            "history": [to_plain(report) for report in self.history],
            "severities": [list(each) for each in self.severities],
            "stopped_step": self.intervention.stopped_step,
            "stopping_reason": self.intervention.stopping_reason,
            **self.lookout.state(),
            **self.course.state(),
            **self.rescue.state(),
            **self.memory.state(),
            "batches": self.replay.state() if self._keeps_batches else [],
            "snapshot": None if snapshot is None else snapshot.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state.

        Args:
            state: What :meth:`state` collected, also in an older version.
        """
        self.history = [from_plain(plain) for plain in state.get("history", [])][-self._size :]
        self.severities = [(step, value) for step, value in state.get("severities", [])][-self._size :]
        self.intervention.stopped_step = state.get("stopped_step")
        self.intervention.stopping_reason = state.get("stopping_reason")
        self.lookout.load(state)
        self.course.load(state)
        self.rescue.load(state)
        self.memory.load(state)
        self.replay.load(state.get("batches", []))
        snapshot = state.get("snapshot")
        self.rescue.snapshot = None if snapshot is None else Snapshot.restored(snapshot)
