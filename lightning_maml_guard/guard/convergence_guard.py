"""ConvergenceGuard: when to measure, decide and act."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch

from lightning_maml_guard.guard.check import Checker
from lightning_maml_guard.guard.loggers import logger_step, warn
from lightning_maml_guard.guard.probe import gradient_norm, has_meta_problem, takes_no_steps
from lightning_maml_guard.guard.processes import check_strategy, ranks_of
from lightning_maml_guard.guard.results import Results
from lightning_maml_guard.guard.run import Run
from lightning_maml_guard.guard.schedule import SCHEDULED
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.stability.estimators import Estimator
from lightning_maml_guard.stability.measure import check_options
from lightning_maml_guard.theory.limits import check_margin
from lightning_maml_guard.utils.checks import check_choice, check_count, check_device, check_flag, check_number
from lightning_maml_guard.utils.lightning_compat import Callback, MisconfigurationException

ACTIONS = ("log", "warn", "rescale", "stop")


class ConvergenceGuard(Results, Callback):
    """Watches whether a MAML run's learning rates can converge, and acts when they cannot.

    A check comes before a step and uses the batch the step will use. It does two things. It estimates the task loss's
    Hessian eigenvalues and compares the inner rate with ``alpha_c = 1/lambda_max`` and the meta rate with
    ``beta_c = min_i 2/(lambda_i - alpha*lambda_i^2)`` (Takagi et al.) or with the limits of the update as configured,
    for the optimizer as it runs. And it *tries* the coming ``trial_steps`` steps on copies of parameters and optimizer
    state; a trial that does not pass is repeated from two other batches, and the median counts. A ratio above 1 alone
    is not divergence: healthy runs live at the edge of stability. The run is ``unsafe`` when the trial takes the loss
    to ``alarm`` times the one training started from; a rate beyond its critical value whose trial survives is at the
    ``edge``, which is logged and not warned about. Without a trial the ratios decide.

    Checks come every ``every_n_steps`` steps, and between them when the loss or the gradient norm of a step leaves its
    running range: then the trial goes first, and the curvature is measured only if it fails. A check leaves random
    states, buffers, gradients and logged values as they were; if it fails, training goes on with one warning that says
    why.

    ===========  ================================================================================
    action       effect when the rates are unsafe
    ===========  ================================================================================
    ``log``      none: the numbers are logged
    ``warn``     one warning each time the state changes to unsafe
    ``rescale``  the applied rates are capped at ``margin`` times their critical values, or lower
                 if the coming steps do not survive there or end lower below; later checks release
                 them by half as much again and to the critical values at most. The schedule is
                 never touched
    ``stop``     the Trainer is asked to stop (after the step at hand; with ``min_steps`` it goes on
                 until then); ``stopped_step`` and ``stopping_reason`` say when and why
    ===========  ================================================================================

    The defaults were chosen on GuardBench's tuning set (``python -m benchmarks.guard_bench --set tune``): the
    exact criterion's ratio tells dying runs better than the poster's (AUROC .84 against .60 one step ahead) and saves
    as many; ``margin=0.5`` ends rescued runs at 1.14 of the best healthy loss where 1 ends at 1.17, and would call half
    of the stable region its edge; with the repeated trial a ``patience`` above 1 only comes later (2 false alarms in 94
    healthy runs checked every 5 steps). On the reporting set a guard at its defaults gives 0.5 warnings per 1000
    healthy steps, and ``rescale`` with rollback brings all 140 dying runs to a finite end, half of those that can be
    compared within 1.07 of the best; looking every 10 instead of every 100 steps (and when triggered) saves no more.

    Args:
        every_n_steps: Optimizer steps between two checks; the first is at step 0. None: every 100 steps, as far as
            ``max_cost`` allows.
        max_cost: Without ``every_n_steps``: share of the training's work that checks may take, counted in gradients
            and products, so that the same run checks at the same steps. A check is left out until the steps taken pay
            for it. The first one comes at any cost, the second too if the first could not judge the meta rate (Adam
            before its first step), and one of a loss beyond ``alarm``; a jump of the loss or the gradient has a few on
            credit, each after twice the wait of the last.
        action: ``"log"``, ``"warn"``, ``"rescale"`` or ``"stop"``.
        criterion: ``"exact"``: the Jacobian of the update as configured, and the inner loop's own limit.
            ``"simplified"``: the poster's conditions. What is logged as ``alpha_c`` and ``beta_c`` is what is judged.
        margin: Fraction of the critical values that counts as the threshold; ``rescale`` goes to that.
        patience: Consecutive unsafe checks before acting.
        estimator: ``"lanczos"``, ``"pyhessian"`` or ``(matvec, start vector) -> eigenvalues``.
        max_iter: Lanczos steps at most.
        tol: Relative residual at which Lanczos stops.
        tasks: Curvature of the ``"mean"`` task loss, or of the ``"worst"`` (sharpest) task.
        data: The loss whose Hessian is measured: ``"support"``, ``"query"`` or ``"both"``.
        problem: ``(pl_module, batch) -> MetaProblem``, for modules that have no ``meta_problem``. The inner
            rate of such a module is out of reach: ``rescale`` then caps the meta rate alone. Without both, the
            module's own ``training_step`` is watched as plain training: ``beta_c`` only.
        trial_steps: Steps a trial takes, each about the cost of a training step; 0 judges by the ratios alone.
        replay: Batches the trial goes through, the coming one and those before it, kept by reference on the device.
            GuardBench: replaying fewer than 8 loses most of the recall where tasks are resampled.
        alarm: Factor over the loss that training started from that counts as dying, above 1.
        triggers: Whether a loss above twice its running mean or a gradient norm above four times its own calls a
            check. Reads one number a step from the device.
        rollback: With ``action="rescale"``: keep parameters, buffers and optimizer state of the last check that passed,
            and go back to them when the loss is lost; the batches since are skipped and the meta rate at least halved.
        max_rollbacks: Rollbacks before the guard stops the run and says so.
        snapshot_device: Where that copy is kept (``"cpu"``); None: beside the parameters.
        figures: Whether TensorBoard, Weights & Biases and MLflow get the spectrum's histogram with every check, and the
            pictures of safe region and spectrum when the state changes and at the end. Other loggers get numbers alone.
        history_size: Checks that ``history`` and ``severities`` keep, the latest ones. Loggers get all of them.
        tasks_per_check: Measure the curvature on so many tasks of the batch (the first ones) instead of all: a few are
            cheaper, and their mean is sharper than that of all. Trials go on with the whole batch.
        basis: Where a check keeps its Lanczos vectors, ``max_iter`` at most: ``"device"``, ``"cpu"`` (the same numbers,
            slower) or ``"bfloat16"`` (half the memory, wider intervals). See :func:`~lightning_maml_guard.measure` for
            what a check needs.
        allow_untested: Whether to go on under a strategy the guard was not tested with (FSDP, DeepSpeed and others that
            split a module). A check that fails there is one warning, as ever.

    Raises:
        ValueError: If an argument is not allowed.

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

    def __init__(
        self,
        every_n_steps: int | None = None,
        action: str = "warn",
        criterion: str = "exact",
        margin: float = 1.0,
        patience: int = 1,
        estimator: Estimator = "lanczos",
        max_iter: int = 20,
        tol: float = 1e-2,
        tasks: str = "mean",
        data: str = "support",
        problem: Callable[[Any, Any], MetaProblem] | None = None,
        trial_steps: int = 10,
        replay: int = 8,
        alarm: float = 3.0,
        triggers: bool = True,
        rollback: bool = False,
        max_rollbacks: int = 10,
        snapshot_device: str | None = None,
        figures: bool = True,
        history_size: int = 1000,
        allow_untested: bool = False,
        max_cost: float = 0.02,
        tasks_per_check: int | None = None,
        basis: str = "device",
    ) -> None:
        super().__init__()
        check_number("max_cost", max_cost, above=0, below=1)
        # A number of steps is taken at its word.
        self.max_cost = float(max_cost) if every_n_steps is None else None
        every_n_steps = 100 if every_n_steps is None else every_n_steps
        for name, number in (
            ("every_n_steps", every_n_steps),
            ("patience", patience),
            ("replay", replay),
            ("max_rollbacks", max_rollbacks),
            ("history_size", history_size),
        ):
            check_count(name, number)
        if tasks_per_check is not None:
            check_count("tasks_per_check", tasks_per_check)
        check_count("trial_steps", trial_steps, 0)
        check_choice("action", action, ACTIONS)
        for name, flag in (
            ("triggers", triggers),
            ("rollback", rollback),
            ("figures", figures),
            ("allow_untested", allow_untested),
        ):
            check_flag(name, flag)
        check_device("snapshot_device", snapshot_device)
        if problem is not None and not callable(problem):
            raise ValueError(
                f"Expected argument `problem` to be a function (pl_module, batch) -> MetaProblem but got {problem!r}. "
                "Pass such a function, or None for the module's own `meta_problem`."
            )
        check_number("alarm", alarm, above=1)
        if rollback and (action != "rescale" or not trial_steps):
            raise ValueError(
                "rollback=True takes a run back and lowers its rates until a trial survives, so it needs "
                f"action='rescale' and trial_steps of at least 1 but got {action!r} and {trial_steps}. Set both, or "
                "leave `rollback` out."
            )
        check_margin(margin)
        check_options(
            criterion=criterion, estimator=estimator, max_iter=max_iter, tol=tol, tasks=tasks, data=data, basis=basis
        )
        self.tasks_per_check, self.basis = tasks_per_check, basis
        self.every_n_steps, self.action, self.criterion = every_n_steps, action, criterion
        self.margin, self.patience, self.estimator = float(margin), patience, estimator
        self.max_iter, self.tol, self.tasks, self.data = max_iter, tol, tasks, data
        self.problem = problem
        self.trial_steps, self.replay, self.alarm, self.triggers = trial_steps, replay, float(alarm), triggers
        self.rollback, self.max_rollbacks, self.snapshot_device = rollback, max_rollbacks, snapshot_device
        self.figures, self.history_size, self.allow_untested = figures, history_size, allow_untested
        self._inert = False
        self._run = Run(self)

    @cached_property  # Lightning reads it six times a step, for the names of its profiler
    def state_key(self) -> str:
        """Key of the guard's state in a checkpoint; guards that differ in what they do may run side by side."""
        return self._generate_state_key(
            every_n_steps=self.every_n_steps,
            action=self.action,
            criterion=self.criterion,
            tasks=self.tasks,
            data=self.data,
            margin=self.margin,
            patience=self.patience,
            estimator=self.estimator
            if isinstance(self.estimator, str)
            else getattr(self.estimator, "__name__", "callable"),
            problem=getattr(self.problem, "__qualname__", None),
        )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is something to measure, and start a run of its own (a resumed one restores its state next).

        Args:
            trainer: The Trainer.
            pl_module: The module.
            stage: Lightning's stage.

        Raises:
            MisconfigurationException: If there is nothing the guard could measure, or if it was not tested with the
                strategy.
        """
        if stage != "fit":
            return
        if self.problem is None and not has_meta_problem(pl_module) and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"ConvergenceGuard cannot watch the training_step of {type(pl_module).__name__}: with manual "
                "optimisation it takes optimizer steps of its own. Give the module a method meta_problem(batch) -> "
                "MetaProblem, or pass ConvergenceGuard(problem=lambda module, batch: MetaProblem(...))."
            )
        if trainer.world_size > 1 and self.estimator == "pyhessian":
            raise MisconfigurationException(
                f"ConvergenceGuard(estimator='pyhessian') measures one process's loss, but {trainer.world_size} train "
                "together. Use estimator='lanczos', whose products are averaged over them."
            )
        check_strategy(trainer, self.allow_untested)
        self._inert = bool(getattr(trainer, "barebones", False))
        self._run = Run(self, inert=self._inert, ranks=ranks_of(trainer))
        if self._inert:
            warn(
                "ConvergenceGuard does nothing in this run: Trainer(barebones=True) asks for no logging and no "
                "extra work."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Apply the caps of a resumed run from its first step on.

        Args:
            trainer: The Trainer.
            pl_module: The module.
        """
        rescue = self._run.rescue
        with self._run.course.only_told("apply the caps that the checkpoint holds"):
            Checker(self, self._run, trainer, pl_module).govern(rescue.governed)
            if rescue.caps.alpha is not None:
                rescue.apply(pl_module, rescue.caps)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure, if it is time or the last step was out of its range, before the batch is used.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            batch: The batch of the coming step, on the training device.
            batch_idx: Its index.
        """
        if self._inert or takes_no_steps(trainer):
            return
        run = self._run
        if self.trial_steps:
            what = "take up the batches that the checkpoint holds"
            with run.course.only_told(what) if run.replay.restored else nullcontext():
                run.replay.add(batch, batch_idx)
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients of a step that is half done must not outlive a rollback
        step = logger_step(trainer)
        due = run.lookout.due(step, at_once_if_lost=self.rollback)
        if due is None:
            run.dress(trainer, batch_idx)
        else:
            last, unsafe = run.history[-1:], run.course.unsafe
            Checker(self, run, trainer, pl_module).check(batch, batch_idx, step, scheduled=due == SCHEDULED)
            if run.history[-1:] != last:
                run.show(trainer, changed=run.course.unsafe != unsafe)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep the norm of the gradient at hand.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            optimizer: The optimizer about to step.
        """
        if not self.triggers or not self.trial_steps or self._inert:
            return
        try:
            self._run.norm = gradient_norm(optimizer)
        except Exception as error:
            self._run.course.say_once(
                "ConvergenceGuard looks between checks when the loss jumps, but not when the gradient norm does: it "
                f"could not be computed.\nCause: {type(error).__name__}: {error}"
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare the step's loss and gradient norm with those of the steps before.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            outputs: What the step returned.
            batch: Its batch.
            batch_idx: Its index.
        """
        loss: Any = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self._inert or takes_no_steps(trainer) or not self.trial_steps:
            return
        run = self._run
        known = isinstance(loss, torch.Tensor) and loss.numel() == 1
        value = float(loss.item()) if known else math.nan
        norm = math.nan if run.norm is None else float(run.norm)
        run.norm = None
        if run.memory.ranks.size > 1:
            # On every rank, whatever it has: one that stayed away would leave the others waiting.
            had = torch.tensor([float(known), value, norm], device=trainer.strategy.root_device)
            share, value, norm = trainer.strategy.reduce(had, reduce_op="mean").tolist()
            known = share == 1
        if not known:
            return
        told = self.action != "rescale" and run.course.unsafe
        value *= trainer.accumulate_grad_batches
        run.lookout.saw(value, norm, alarm=self.alarm, triggers=self.triggers and not told)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take back a last step that lost the run, and send the last pictures.

        Args:
            trainer: The Trainer.
            pl_module: The module.
        """
        with self._run.course.only_told("take the last step back"):
            Checker(self, self._run, trainer, pl_module).end()
        if not self._inert:
            self._run.show_at_end(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks out of the optimizers, and let go of the batches and the snapshot.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            stage: Lightning's stage.
        """
        self._run.rescue.release()
        self._run.rescue.snapshot = None
        self._run.replay.clear()

    def state_dict(self) -> dict[str, Any]:
        """Collect the state a resumed run needs.

        Returns:
            Primitives and tensors only, so that a checkpoint loads with ``weights_only``. With ``action="rescale"`` or
            ``"stop"`` in a single process the last ``replay`` batches are among them, with ``rollback=True`` the copy
            to go back to: a resumed run is then the one that was interrupted.
        """
        return self._run.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a run.

        Args:
            state_dict: What :meth:`state_dict` collected, also in an older version.
        """
        self._run.load(state_dict)
