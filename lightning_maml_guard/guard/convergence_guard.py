"""ConvergenceGuard: its arguments and Lightning's hooks. One check is in check.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_maml_guard.guard.actions import ACTIONS, Action
from lightning_maml_guard.guard.check import Check
from lightning_maml_guard.guard.loggers import SEND, logger_step, takes_no_steps
from lightning_maml_guard.guard.look import due
from lightning_maml_guard.guard.report import CheckReport, frame, record_of
from lightning_maml_guard.guard.rollback import Rollback
from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.guard.settings import check_pieces, check_settings, check_watchable, identity, idle_because
from lightning_maml_guard.guard.state import Event, to_checkpoint
from lightning_maml_guard.lookahead.lookahead import LookaheadOptions
from lightning_maml_guard.messages.advice import Advice
from lightning_maml_guard.messages.spelling import IN_PYTHON, Spelling
from lightning_maml_guard.messages.terminal import inform
from lightning_maml_guard.pages.outcome import summary
from lightning_maml_guard.stability.options import CurvatureOptions
from lightning_maml_guard.stability.problems import ProblemSource
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.utils.lightning_compat import Callback, check_strategy, ranks_of

if TYPE_CHECKING:
    import pandas as pd


class ConvergenceGuard(Callback):
    """Watches whether a MAML run's learning rates can converge, and acts when they cannot.

    A check comes before a step and uses the batch of that step. It estimates the eigenvalues of the task loss's Hessian
    and compares the inner rate ``alpha`` and the outer rate ``beta`` with their critical values: with those of the
    update as configured, for the optimizer as it runs, or with those of Takagi et al., ``alpha_c = 1/lambda_max`` and
    ``beta_c = min_i 2/(lambda_i - alpha*lambda_i^2)``. It also makes a *lookahead*: it tries the next steps on copies
    of parameters and optimizer state. If the loss rises too far there, that is repeated from two other batches, and the
    median counts. The run is ``unsafe`` when the lookahead takes the loss to ``divergence_ratio`` times the one that
    training started from, or when half of what was learned is lost. Healthy runs often have a rate above its critical
    value: if the lookahead does not diverge, the run is at the ``edge``, which is logged without a warning. Without a
    lookahead the critical values alone decide.

    A jump of the loss or the gradient norm calls a check between the scheduled ones, which measures curvature only if
    its lookahead fails. A check leaves random states, buffers, gradients and your logged values as they were. If it
    raises an exception, training goes on with one warning that says why.

    Args:
        every_n_steps: Optimizer steps between two checks; the first is at step 0. None: at step 0, at a few early
            steps, and at multiples of 100, as often as ``max_cost`` allows.
        action: What to do when the run is unsafe. ``"log"``: log the numbers, no more. ``"warn"``: one warning when
            the state changes to unsafe. ``"rescale"``: cap the applied rates at ``margin`` times their critical values,
            or lower if the lookahead diverges there; later checks raise them again, and the schedule is never changed.
            ``"stop"``: ask the Trainer to stop, after a step at rate 0 (``stopped_step``, ``stopping_reason``).
        margin: Share of its critical value up to which a rate is safe, at most 1; ``rescale`` caps rates there.
        curvature: How curvature is measured, see :class:`CurvatureOptions`. The critical values of its ``criterion``
            are those that are judged and logged as ``alpha_c`` and ``beta_c``.
        lookahead: How the next steps are tried, see :class:`LookaheadOptions`; ``steps=0`` tries none.
        patience: Consecutive unsafe checks before acting.
        problem: ``(pl_module, batch) -> MetaProblem``, for modules that have no ``meta_problem``. The inner rate of
            such a module is capped by its attribute ``inner_lr_cap``, where it has one (None, or the highest rate to
            use). Without a problem, the ``training_step`` is watched as plain training: ``beta_c`` only.
        rollback: Whether ``action="rescale"`` keeps a few copies of parameters, buffers and optimizer state, and goes
            back to the latest good one when the loss diverges or half of what was learned is lost. None: it does.
        max_rollbacks: Rollbacks after which the guard stops the run instead of rolling back once more.
        snapshot_device: Where the copies are kept (``"cpu"``); None: beside the parameters.
        max_cost: Without ``every_n_steps``: share of the training's work that checks may take, counted in gradients
            and matrix-vector products, so that the same run checks at the same steps. A check waits until the steps
            taken pay for it; the first ones, up to 300 training steps, and one of a diverged loss do not wait.
        figures: Whether TensorBoard, Weights & Biases and MLflow get pictures of the region and the spectrum, too.
        history_size: Checks that ``history`` and ``severities`` keep, the latest ones. Loggers get all of them.
        allow_untested: Whether to go on under a strategy the guard was not tested with (DeepSpeed and others that split
            a module in ways of their own). A check that fails there gives one warning, as elsewhere.

    Attributes:
        spelling: How messages write the guard's arguments; the command line sets its own.

    Raises:
        TypeError: If ``curvature`` or ``lookahead`` is of another class.
        ValueError: If another argument is not allowed.

    Example:
        >>> import torch
        >>> from pytorch_lightning import Trainer
        >>> from lightning_maml_guard import ConvergenceGuard, MetaLearningModule, TaskDataModule
        >>> from lightning_maml_guard.networks import mlp
        >>> from lightning_maml_guard.tasks.regression import Sinusoid
        >>> module = MetaLearningModule(mlp(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=100.0))
        >>> guard = ConvergenceGuard(every_n_steps=5, action="log")
        >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        >>> trainer = Trainer(max_steps=10, accelerator="cpu", callbacks=[guard], logger=False, **quiet)
        >>> trainer.fit(module, TaskDataModule(Sinusoid(), val_episodes=0))
        >>> guard.history[0].status
        'unsafe'
    """

    spelling: Spelling = IN_PYTHON

    def __init__(
        self,
        every_n_steps: int | None = None,
        action: str = "warn",
        margin: float = 1.0,
        curvature: CurvatureOptions = CurvatureOptions(),  # noqa: B008 (frozen)
        lookahead: LookaheadOptions = LookaheadOptions(),  # noqa: B008 (frozen)
        *,
        patience: int = 1,
        problem: ProblemSource | None = None,
        rollback: bool | None = None,
        max_rollbacks: int = 10,
        snapshot_device: str | None = None,
        max_cost: float = 0.02,
        figures: bool = True,
        history_size: int = 1000,
        allow_untested: bool = False,
    ) -> None:
        super().__init__()
        # Where the user gives a number of steps, cost leaves no check out.
        self.every_n_steps = 100 if every_n_steps is None else every_n_steps
        self.max_cost: float | None = max_cost
        self.action, self.margin, self.patience = action, margin, patience
        self.curvature, self.lookahead, self.problem = curvature, lookahead, problem
        self.max_rollbacks, self.snapshot_device = max_rollbacks, snapshot_device
        self.rollback: bool = False if rollback is None else rollback
        self.figures, self.history_size, self.allow_untested = figures, history_size, allow_untested
        check_settings(self)
        if rollback is None:
            self.rollback = self.acting.caps_rates and lookahead.steps > 0
        self.margin = float(margin)
        self.max_cost = float(max_cost) if every_n_steps is None else None
        self._inert = False
        self._run = GuardedRun(self)

    @property
    def acting(self) -> Action:
        """The action, as an object."""
        return ACTIONS[self.action]

    @property
    def history(self) -> list[CheckReport]:
        """The latest ``history_size`` checks."""
        return self._run.state.history

    @property
    def severities(self) -> list[tuple[int, float]]:
        """Steps of the latest lookaheads, with their severities: ``guard/severity``, explained in the guide."""
        return self._run.state.severities

    @property
    def events(self) -> list[Event]:
        """Rollbacks, stops and notices of the run."""
        return self._run.state.events

    @property
    def stopped_step(self) -> int | None:
        """Step at which the guard stopped the run; None if it did not."""
        return self._run.state.stopped_step

    @property
    def stopping_reason(self) -> str | None:
        """Why the guard stopped the run, and what to set; None if it did not."""
        return self._run.stopping_reason

    @property
    def advice(self) -> Advice | None:
        """What to change so that the run trains, the latest; None while there is nothing to say."""
        return self._run.state.advice

    def frame(self) -> pd.DataFrame:
        """Make a pandas table of the history.

        Returns:
            One check per row, indexed by ``step``: ``status``, the numbers of a :class:`CheckReport` under their own
            names, intervals as ``..._low`` and ``..._high``, and ``reasons`` as one text.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        return frame(self.history)

    def settings(self) -> dict[str, Any]:
        """Read the guard's arguments by name, in the constructor's order; ``every_n_steps`` None where cost decides."""
        given = {name: getattr(self, name) for name in signature(type(self)).parameters if hasattr(self, name)}
        return given if self.max_cost is None else given | {"every_n_steps": None}

    def plot(self, border: Sequence[StabilityReport] = ()) -> Any:
        """Draw the safe region with the path of ``(alpha, beta)`` in it.

        Args:
            border: Measurements at larger inner rates (``stability.measure.measure_border``), to draw the region there.

        Returns:
            ``(fig, ax)`` of matplotlib.
        """
        from lightning_maml_guard.plots.region import safe_region

        return safe_region(self.history, border=border)

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page about the run: no network, readable in light, dark and on paper.

        It is written whole or not at all: on a full or read-only disk there is a warning, and an older page stays.

        Args:
            path: Where to, for example ``"run.html"``; its folder must exist.

        Returns:
            The path.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from lightning_maml_guard.pages.report import write

        return write(record_of(self, self._run.state, self._run.clock), path)

    def summary(self) -> str:
        """Sum the run up: how it ended, its checks and what they cost, the rates applied, what to set.

        Returns:
            A few lines; printed at the end of a run unless ``action="log"``.
        """
        return summary(record_of(self, self._run.state, self._run.clock))

    @cached_property  # Lightning reads it six times a step, for the names of its profiler
    def state_key(self) -> str:
        """Key of the guard's state in a checkpoint; guards that differ in what they do may run side by side."""
        return self._generate_state_key(**identity(self))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is something to measure, and start anew (a resumed run restores its state next)."""
        if stage != "fit":
            return
        check_watchable(self, trainer, pl_module)
        check_strategy(trainer, self.allow_untested)
        self._inert = bool(getattr(trainer, "barebones", False))
        self._run = GuardedRun(self, inert=self._inert, ranks=ranks_of(trainer))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Apply the caps of a resumed run, or none, from its first step on."""
        check_pieces(trainer, pl_module)
        run, idle = self._run, idle_because(trainer, pl_module)
        if idle is not None:
            self._inert = True
            return run.announce(idle)
        with run.warn_on_failure("read how long the run will be"):
            run.begin(trainer)
        with run.warn_on_failure("apply the caps that the checkpoint holds"):
            run.cap_optimizers(trainer, run.state.capped)
            if self.acting.caps_rates:  # without any, one that an earlier run left on the module ends
                run.caps.apply(pl_module, run.caps.caps)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check before the batch is used, if a check is due: by schedule, or by the last step's loss or gradient."""
        if self._inert or takes_no_steps(trainer):
            return
        run = self._run
        if self.lookahead.steps or trainer.accumulate_grad_batches > 1:
            what = "take up the batches that the checkpoint holds" if run.replay.restored else "keep a batch"
            with run.warn_on_failure(what):
                run.take_batch(batch, batch_idx, trainer.accumulate_grad_batches)
        run.turns.begin()
        if batch_idx % trainer.accumulate_grad_batches or run.turns.found:
            return  # gradients of a step that is half done must not outlive a rollback
        step = logger_step(trainer)
        if (scheduled := due(run, trainer, pl_module, batch, batch_idx, step)) is None:
            Rollback(run, trainer, pl_module).keep_if_due(step)
            with run.warn_on_failure(SEND):
                run.ratios.log_moved(trainer, self.history, run.state.statistics, *run.rates(trainer, step), step)
            return
        last, unsafe = self.history[-1:], run.machine.unsafe
        with run.clock.checking(step, speaks=self.acting.speaks):
            Check(run, trainer, pl_module).check(batch, batch_idx, step, scheduled=scheduled)
        if self.history[-1:] != last:
            with run.warn_on_failure("send a picture or histogram to a logger (figures=False sends none)"):
                run.figures.after_check(trainer, self.history, changed=run.machine.unsafe != unsafe)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep the norm of the gradient at hand."""
        if not self._inert:
            self._run.take_gradient(optimizer)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Note that a gradient was computed: optimizers with one each take turns."""
        self._run.turns.backward()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare the step's loss and gradient norm with those of the steps before."""
        if not self._inert and not takes_no_steps(trainer):
            self._run.take_step(outputs.get("loss") if isinstance(outputs, dict) else outputs, trainer, batch_idx)
            with self._run.warn_on_failure("compare a batch with what it was before its step"):
                self._run.replay.after_step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Roll back a last step that made the run diverge, send the last pictures, and sum the run up."""
        run = self._run
        with run.warn_on_failure("roll the last step back"):
            Rollback(run, trainer, pl_module).undo_last_step()
        if not self._inert:
            with run.warn_on_failure("send the last pictures to a logger (figures=False sends none)"):
                run.figures.at_end(trainer, self.history)
            run.clock.end()
            if self.acting.speaks:
                inform(self.summary())

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks out of the optimizers: Lightning tears a run down only where it ends by itself."""
        self._run.caps.release()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks out of the optimizers, and drop the batches and the snapshot."""
        self._run.caps.release()
        self._run.ring.kept.clear()
        self._run.replay.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Leave a run's live objects out: a module may hold the guard among the hyperparameters that it saves."""
        return self.__dict__ | {"_run": replace(self._run.saved(), batches=[], spike=[], snapshots=[])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._run = GuardedRun(self, state["_run"], inert=self._inert)

    def state_dict(self) -> dict[str, Any]:
        """Collect the state a resumed run needs.

        Returns:
            Primitives and tensors, so that a checkpoint loads with ``weights_only``. With ``action="rescale"`` or
            ``"stop"`` in a single process they hold the lookahead's batches, with ``rollback=True`` the snapshots, too.
        """
        return to_checkpoint(self._run.saved())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a run.

        Args:
            state_dict: What :meth:`state_dict` returned, also in an older version. If it holds something else, the
                guard starts anew with one warning.
        """
        self._run = self._run.resumed(state_dict)
