"""ConvergenceGuard: when to measure, decide and act."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_maml_guard._checks import check_count
from lightning_maml_guard._lightning import Callback, MisconfigurationException
from lightning_maml_guard.guard.estimate import Estimator
from lightning_maml_guard.guard.governor import RateGovernor, scheduled_rate
from lightning_maml_guard.guard.isolation import isolated
from lightning_maml_guard.guard.monitor import check_options, measure
from lightning_maml_guard.guard.plain import PlainProblem, training_step_problem
from lightning_maml_guard.guard.products import Memory
from lightning_maml_guard.guard.report import StabilityReport, from_plain, to_plain
from lightning_maml_guard.guard.reporting import inform, log_report, logger_step, warn
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.theory.verdict import SAFE, UNSAFE, check_margin

if TYPE_CHECKING:
    from collections.abc import Iterator

ACTIONS = ("log", "warn", "rescale", "stop")


class ConvergenceGuard(Callback):
    """Watches whether a MAML run's learning rates can converge, and acts when they cannot.

    Every ``every_n_steps`` optimizer steps, before the step is taken and on the batch it will use, the
    guard estimates the task loss's Hessian eigenvalues and compares the inner rate with
    ``alpha_c = 1/lambda_max`` and the meta rate with ``beta_c = min_i 2/(lambda_i - alpha*lambda_i^2)``
    (Takagi et al.), for the optimizer as it runs. A measurement leaves random states, buffers, gradients
    and logged values as they were; if it fails, training goes on with one warning that says why.

    ===========  ================================================================================
    action       effect when a rate is unsafe
    ===========  ================================================================================
    ``log``      none: the numbers are logged
    ``warn``     one warning each time the state changes to unsafe
    ``rescale``  the applied rates are capped at ``margin`` times their critical values until a
                 later check releases them; the schedule itself is never touched
    ``stop``     the Trainer is asked to stop (after the step at hand; with ``min_steps`` it goes on
                 until then); ``stopped_step`` and ``stopping_reason`` say when and why
    ===========  ================================================================================

    Args:
        every_n_steps: Optimizer steps between two checks; the first is at step 0.
        action: ``"log"``, ``"warn"``, ``"rescale"`` or ``"stop"``.
        criterion: ``"simplified"``: the poster's conditions. ``"exact"``: the Jacobian of the update as configured,
            and the inner loop's own limit.
        margin: Act when a rate exceeds ``margin`` times its critical value; ``rescale`` goes to that.
        patience: Consecutive unsafe checks before acting.
        estimator: ``"lanczos"``, ``"pyhessian"`` or ``(matvec, start vector) -> eigenvalues``.
        max_iter: Lanczos steps at most.
        tol: Relative residual at which Lanczos stops.
        tasks: Curvature of the ``"mean"`` task loss, or of the ``"worst"`` (sharpest) task.
        data: The loss whose Hessian is measured: ``"support"``, ``"query"`` or ``"both"``.
        problem: ``(pl_module, batch) -> MetaProblem``, for modules that have no ``meta_problem``. The inner
            rate of such a module is out of reach: ``rescale`` then caps the meta rate alone. Without both, the
            module's own ``training_step`` is watched as plain training: ``beta_c`` only.

    Raises:
        ValueError: If an argument is not allowed.

    Example:
        >>> guard = ConvergenceGuard(every_n_steps=50, action="stop")
        >>> guard.history
        []
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        action: str = "warn",
        criterion: str = "simplified",
        margin: float = 1.0,
        patience: int = 1,
        estimator: Estimator = "lanczos",
        max_iter: int = 20,
        tol: float = 1e-2,
        tasks: str = "mean",
        data: str = "support",
        problem: Callable[[Any, Any], MetaProblem] | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("every_n_steps", every_n_steps), ("patience", patience)):
            check_count(name, number)
        if action not in ACTIONS:
            raise ValueError(f"Expected argument `action` to be one of {ACTIONS} but got {action!r}.")
        if problem is not None and not callable(problem):
            raise ValueError(
                f"Expected argument `problem` to be a function (pl_module, batch) -> MetaProblem but got {problem!r}."
            )
        check_margin(margin)
        check_options(criterion=criterion, estimator=estimator, max_iter=max_iter, tol=tol, tasks=tasks, data=data)
        self.every_n_steps, self.action, self.criterion = every_n_steps, action, criterion
        self.margin, self.patience, self.estimator = margin, patience, estimator
        self.max_iter, self.tol, self.tasks, self.data = max_iter, tol, tasks, data
        self.problem = problem
        self._start_over()
        self._inert = False
        self._governor: RateGovernor | None = None

    def _start_over(self) -> None:
        self.history: list[StabilityReport] = []
        self.stopped_step: int | None = None
        self.stopping_reason: str | None = None
        self._last_step: int | None = None
        self._unsafe_checks = 0
        self._alarms: set[str] = set()
        self._said: set[str] = set()
        self._alpha_cap: float | None = None
        self._beta_cap: float | None = None
        self._governed: list[int] = []
        self._memory = Memory()

    @property
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
            MisconfigurationException: If there is nothing the guard could measure.
        """
        if stage != "fit":
            return
        if self.problem is None and not _has_meta_problem(pl_module) and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"ConvergenceGuard cannot watch the training_step of {type(pl_module).__name__}: with manual "
                "optimisation it takes optimizer steps of its own. Give the module a method meta_problem(batch) -> "
                "MetaProblem, or pass ConvergenceGuard(problem=lambda module, batch: MetaProblem(...))."
            )
        self._start_over()
        self._inert = bool(getattr(trainer, "barebones", False))
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
        self._govern([trainer.optimizers[index] for index in self._governed if index < len(trainer.optimizers)])
        if self._alpha_cap is not None and hasattr(pl_module, "inner_lr_cap"):
            pl_module.inner_lr_cap = self._alpha_cap

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure, if it is time, before the batch is used.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            batch: The batch of the coming step, on the training device.
            batch_idx: Its index.
        """
        step = logger_step(trainer)
        if self._inert or step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        report = self._measure(trainer, pl_module, batch, batch_idx, step)
        if report is None:
            return
        if not trainer.fast_dev_run:
            report = self._act(trainer, pl_module, report, step)
        self.history.append(report)
        log_report(trainer, pl_module, report, step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks out of the optimizers.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            stage: Lightning's stage.
        """
        if self._governor is not None:
            self._governor.remove()
            self._governor = None

    def state_dict(self) -> dict[str, Any]:
        """Collect the state a resumed run needs.

        Returns:
            Primitives only, so that a checkpoint loads with ``weights_only``.
        """
        return {
            "history": [to_plain(report) for report in self.history],
            "stopped_step": self.stopped_step,
            "stopping_reason": self.stopping_reason,
            "last_step": self._last_step,
            "unsafe_checks": self._unsafe_checks,
            "alarms": sorted(self._alarms),
            "said": sorted(self._said),
            "alpha_cap": self._alpha_cap,
            "beta_cap": self._beta_cap,
            "governed": list(self._governed),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a run.

        Args:
            state_dict: What :meth:`state_dict` collected.
        """
        self.history = [from_plain(plain) for plain in state_dict.get("history", [])]
        self.stopped_step = state_dict.get("stopped_step")
        self.stopping_reason = state_dict.get("stopping_reason")
        self._last_step = state_dict.get("last_step")
        self._unsafe_checks = state_dict.get("unsafe_checks", 0)
        self._alarms = set(state_dict.get("alarms", []))
        self._said = set(state_dict.get("said", []))
        self._alpha_cap = state_dict.get("alpha_cap")
        self._beta_cap = state_dict.get("beta_cap")
        self._governed = list(state_dict.get("governed", []))

    def plot(self) -> Any:
        """Draw the safe region with the path of ``(alpha, beta)`` in it.

        Returns:
            ``(fig, ax)`` of matplotlib.
        """
        from lightning_maml_guard.plots import safe_region

        return safe_region(self.history)

    def _state_problem(self, pl_module: Any, batch: Any, batch_idx: int) -> MetaProblem | PlainProblem:
        if self.problem is not None:
            return self.problem(pl_module, batch)
        if _has_meta_problem(pl_module):
            return pl_module.meta_problem(batch)
        return training_step_problem(pl_module, batch, batch_idx)

    def _measure(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, step: int) -> StabilityReport | None:
        try:
            with isolated(pl_module), _configured_inner_rate(pl_module):
                problem = self._state_problem(pl_module, batch, batch_idx)
                owners = _owners(problem, trainer.optimizers)
                report = measure(
                    problem,
                    optimizer=max((trainer.optimizers[index] for index in owners), key=scheduled_rate),
                    criterion=self.criterion,
                    estimator=self.estimator,
                    max_iter=self.max_iter,
                    tol=self.tol,
                    tasks=self.tasks,
                    data=self.data,
                    margin=self.margin,
                    step=step,
                    memory=self._memory,
                )
        except Exception as error:
            # Whatever goes wrong in a check, training goes on as if the guard were not there.
            self._say_once(
                f"ConvergenceGuard could not measure at step {step}; training goes on without this check. Cause: "
                f"{type(error).__name__}: {error} This is said once for each cause."
            )
            return None
        if self._governed != owners:
            self._governed = owners
            self._govern([trainer.optimizers[index] for index in owners])
        return report

    def _govern(self, optimizers: list[Any]) -> None:
        if self._governor is not None:
            self._governor.remove()
        active = self.action == "rescale" and not self._inert
        self._governor = RateGovernor(optimizers, self._beta_cap) if active else None

    def _say_once(self, message: str) -> None:
        """Warn, unless the same was said before with other numbers in it."""
        gist = re.sub(r"[-+]?[0-9]+[0-9.e+-]*", "#", message)
        if gist not in self._said:
            self._said.add(gist)
            warn(message)

    def _act(self, trainer: Any, pl_module: Any, report: StabilityReport, step: int) -> StabilityReport:
        status = {"alpha": report.alpha_status, "beta": report.beta_status}
        unsafe = {rate for rate in status if status[rate] == UNSAFE}
        self._unsafe_checks = self._unsafe_checks + 1 if unsafe else 0
        crossed = unsafe if self._unsafe_checks >= self.patience else set()
        if crossed - self._alarms:
            self._announce(report, step)
        if crossed and self.action == "stop":
            self.stopped_step, self.stopping_reason = step, " ".join(report.reasons)
            trainer.should_stop = True
        # A rate that is not resolved keeps its state: neither an all-clear nor a second alarm.
        remaining = (self._alarms | crossed) - {rate for rate in status if status[rate] == SAFE}
        if self._alarms and not remaining and self.action != "log":
            inform(f"ConvergenceGuard: step {step}: the rates are back in the safe region.")
        self._alarms = remaining
        if self.action != "log":
            for notice in report.notices:
                self._say_once(f"ConvergenceGuard: step {step}: {notice}")
        if self.action == "rescale" and (crossed or not unsafe):
            self._rescale(pl_module, report)
        return replace(
            report,
            alpha_applied=_capped(report.alpha, self._alpha_cap),
            beta_applied=_capped(report.beta, self._beta_cap),
        )

    def _announce(self, report: StabilityReport, step: int) -> None:
        if self.action == "log":
            return
        inner = "" if math.isnan(report.safe_alpha) else f"alpha = {report.safe_alpha:.3g}, "
        effect = {
            "warn": "",
            "stop": " Training stops after this step (action='stop').",
            "rescale": f" Applied from now on: {inner}beta = {report.safe_beta:.3g} (action='rescale').",
        }[self.action]
        reasons = " ".join(report.reasons)
        if self.action != "warn":
            reasons = reasons.replace(", or use action='rescale'", "")
        warn(f"ConvergenceGuard: the learning rates left the safe region at step {step}. {reasons}{effect}")

    def _rescale(self, pl_module: Any, report: StabilityReport) -> None:
        """Cap at ``margin`` times the limits just measured, also where the schedule is below them and may rise.

        What could not be measured stays capped as it was.
        """
        if hasattr(pl_module, "inner_lr_cap") and not math.isnan(report.alpha_c):
            self._alpha_cap = pl_module.inner_lr_cap = self.margin * report.alpha_c
        if not math.isnan(report.safe_beta_c):
            self._beta_cap = self.margin * report.safe_beta_c
        if self._governor is not None:
            self._governor.cap = self._beta_cap


def _capped(rate: float, cap: float | None) -> float:
    return rate if cap is None or not rate > cap else cap


@contextmanager
def _configured_inner_rate(pl_module: Any) -> Iterator[None]:
    """Measure at the inner rate as configured, not as capped by an earlier check."""
    if not hasattr(pl_module, "inner_lr_cap"):
        yield
        return
    cap, pl_module.inner_lr_cap = pl_module.inner_lr_cap, None
    try:
        yield
    finally:
        pl_module.inner_lr_cap = cap


def _has_meta_problem(pl_module: Any) -> bool:
    return callable(getattr(pl_module, "meta_problem", None))


def _owners(problem: MetaProblem | PlainProblem, optimizers: list[Any]) -> list[int]:
    """Find the optimizers that move the problem's parameters; all of them if none does (measure then says so)."""
    moved = {id(value) for value in problem.params.values()}
    owners = [
        index
        for index, optimizer in enumerate(optimizers)
        if any(id(parameter) in moved for group in optimizer.param_groups for parameter in group["params"])
    ]
    return owners or list(range(len(optimizers)))
