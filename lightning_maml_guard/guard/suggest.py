"""suggest_rates: measure before training, in the habit of Lightning's learning-rate finder."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_maml_guard._checks import check_count, check_number, shown
from lightning_maml_guard._lightning import Callback, inform_less, tools_for
from lightning_maml_guard.guard.caps import Caps
from lightning_maml_guard.guard.coming import ClosureError
from lightning_maml_guard.guard.estimate import Estimator
from lightning_maml_guard.guard.governor import scheduled_rate
from lightning_maml_guard.guard.isolation import isolated, preserved_randomness
from lightning_maml_guard.guard.messages import tried
from lightning_maml_guard.guard.monitor import check_options, measure
from lightning_maml_guard.guard.probe import Attempts, Problem, attempts, has_meta_problem, owners, state_problem
from lightning_maml_guard.guard.products import Memory
from lightning_maml_guard.guard.report import StabilityReport
from lightning_maml_guard.guard.suggestion import RateSuggestion
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.theory.verdict import UNSAFE, Watch, advance, fails, severity

_HALVINGS = 10


def suggest_rates(
    module: Any,
    datamodule: Any = None,
    *,
    batches: int = 4,
    margin: float = 0.5,
    problem: Callable[[Any, Any], MetaProblem] | None = None,
    criterion: str = "exact",
    estimator: Estimator = "lanczos",
    max_iter: int = 20,
    tol: float = 1e-2,
    tasks: str = "mean",
    data: str = "support",
    trial_steps: int = 10,
    alarm: float = 3.0,
    accelerator: str = "auto",
) -> RateSuggestion:
    """Measure the critical rates before training, and suggest a pair inside them.

    Works on a copy of the module: a Trainer of its own prepares and sets up the data, moves the copy to the device,
    builds its optimizer and draws the first training batches; nothing is trained, and module, random states and data
    stay as they were. Each batch is measured as :class:`~lightning_maml_guard.ConvergenceGuard` does before its first
    step. ``alpha`` is suggested at ``margin`` times the smallest ``alpha_c`` over the batches, ``beta`` at ``margin``
    times the smallest ``beta_c`` *at that* ``alpha``. The smallest and not the median, because one batch beyond its
    limit can end a run. The pair is then tried for ``trial_steps`` steps on copies, and ``beta`` halved until
    the loss survives.

    The numbers are those of the initialisation: curvature often grows while the network trains, which is what the
    margin is for (runs rescued by the guard end a little lower at half of their limits than at the limits
    themselves), and what a guard then watches.

    Adam, AdamW, NAdam, RMSprop and Adagrad have no second moment before their first step, hence no preconditioned
    Jacobian and no ``beta_c``: no meta rate is suggested for them. The trial takes the configured one instead.

    Args:
        module: A ``MetaLearningModule``, another LightningModule with ``meta_problem`` or ``problem``, or any with
            automatic optimisation, whose ``training_step`` is then plain training: ``beta`` only.
        datamodule: A LightningDataModule, a dataloader, or None for the module's own ``train_dataloader``.
        batches: Training batches to measure.
        margin: Fraction of the critical values to suggest, above 0.
        problem: ``(module, batch) -> MetaProblem``, for modules that have no ``meta_problem``.
        criterion: ``"exact"``: the Jacobian of the update as configured. ``"simplified"``: the poster's conditions.
        estimator: ``"lanczos"``, ``"pyhessian"`` or ``(matvec, start vector) -> eigenvalues``.
        max_iter: Lanczos steps at most.
        tol: Relative residual at which Lanczos stops.
        tasks: Curvature of the ``"mean"`` task loss, or of the ``"worst"`` (sharpest) task.
        data: The loss whose Hessian is measured: ``"support"``, ``"query"`` or ``"both"``.
        trial_steps: Steps a trial takes; 0 for none.
        alarm: Factor over the loss at the start that counts as dying, above 1.
        accelerator: Lightning's name of the accelerator.

    Returns:
        The suggestion, with ``.suggestion()``, ``.plot()`` and a readable ``str``.

    Raises:
        TypeError: If ``module`` is no LightningModule or cannot be copied, or if ``datamodule`` gives no batches.
        ValueError: If another argument is not allowed, or if there is nothing to measure: no batch, no optimizer, or
            manual optimisation without a problem.

    Example:
        >>> from lightning_maml_guard import MetaLearningModule, TaskDataModule, suggest_rates
        >>> from lightning_maml_guard.networks import mlp
        >>> from lightning_maml_guard.tasks.regression import Sinusoid
        >>> sgd = lambda parameters: torch.optim.SGD(parameters, lr=1.0)
        >>> found = suggest_rates(MetaLearningModule(mlp(), optimizer=sgd), TaskDataModule(Sinusoid()))
        >>> alpha, beta = found.suggestion()
    """
    check_count("batches", batches)
    check_count("trial_steps", trial_steps, 0)
    check_number("margin", margin, above=0)
    check_number("alarm", alarm, above=1)
    check_options(criterion=criterion, estimator=estimator, max_iter=max_iter, tol=tol, tasks=tasks, data=data)
    trainer_class, combined_loader = tools_for(module, "module")
    _check_sources(module, datamodule, problem)
    options = {
        "criterion": criterion,
        "estimator": estimator,
        "max_iter": max_iter,
        "tol": tol,
        "tasks": tasks,
        "data": data,
    }
    with preserved_randomness(), inform_less(), _kept_trainer(datamodule):
        start = _Start(lambda trainer: _batches(trainer, combined_loader, batches), problem, options, margin)
        start.trial_steps, start.alarm = trial_steps, alarm
        trainer = trainer_class(
            max_epochs=1,
            accelerator=accelerator,
            devices=1,
            callbacks=[start],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(_copied(module), datamodule)
    assert start.found is not None
    return start.found


class _Start(Callback):
    """Measures where training would begin, and lets it end there."""

    def __init__(
        self,
        draw: Callable[[Any], Iterator[Any]],
        problem: Callable[[Any, Any], MetaProblem] | None,
        options: dict[str, Any],
        margin: float,
    ) -> None:
        super().__init__()
        self.draw, self.problem, self.options, self.margin = draw, problem, options, margin
        self.trial_steps, self.alarm = 0, 3.0
        self.found: RateSuggestion | None = None
        self.memory = Memory()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure.

        Args:
            trainer: The Trainer.
            pl_module: The copy of the module.

        Raises:
            ValueError: If there is no batch or no optimizer.
        """
        trainer.should_stop = True
        optimizers = [each for each in trainer.optimizers if any(group["params"] for group in each.param_groups)]
        kind = type(pl_module).__name__
        if not optimizers:
            raise ValueError(
                f"Expected configure_optimizers of {kind} to return an optimizer but got none: there is no rate to "
                "judge. Return one, such as torch.optim.SGD(self.parameters(), lr=0.1)."
            )
        for group in itertools.chain.from_iterable(each.param_groups for each in optimizers):
            # A scheduler that warms up has put its first, low rate there already.
            group["lr"] = group.get("initial_lr", group["lr"])
        with isolated(pl_module):
            problems = [state_problem(self.problem, pl_module, b, i) for i, b in enumerate(self.draw(trainer))]
            if not problems:
                raise ValueError(
                    "Expected argument `datamodule` to give at least one training batch but got none. Check the "
                    "length of its data set and drop_last."
                )
            owned = owners(problems[0], optimizers)
            optimizer = max((optimizers[index] for index in owned), key=scheduled_rate)
            self.found = self._suggest(problems, optimizer, trainer)

    def _suggest(self, problems: Sequence[Problem], optimizer: Optimizer, trainer: Any) -> RateSuggestion:
        reports = self._measured(problems, optimizer)
        judged = max(reports, key=_ratio)
        attempt, notes = self._attempts(problems, optimizer, trainer)
        status, reasons = judged.status, judged.reasons
        if attempt is not None:
            present, reference, severe = attempt.judged(Caps(), math.nan, self.alarm)
            status = advance(Watch(), judged.status, severe, alarm=self.alarm).state
            if fails(severe, self.alarm):
                reasons = (*reasons, tried(present, reference, judged.alpha, judged.beta, judged.status == UNSAFE))
        alpha_c = _smallest(report.alpha_c for report in reports)
        alpha = self._alpha(judged.alpha, alpha_c, notes)
        at = reports
        if alpha != judged.alpha and not math.isnan(alpha):
            at = self._measured([_at(problem, alpha) for problem in problems], optimizer)
        beta_c = _smallest(report.beta_c for report in at)
        beta = self.margin * beta_c if 0 < beta_c < math.inf else math.nan
        if math.isnan(beta):
            notes += list(dict.fromkeys(_why_no_beta(report) for report in at))
        trial = (math.nan, math.nan)
        if attempt is not None:
            beta, trial = self._tried(attempt, alpha, beta, notes)
        return RateSuggestion(
            alpha=alpha,
            beta=beta,
            alpha_c=alpha_c,
            beta_c=beta_c,
            configured_alpha=judged.alpha,
            configured_beta=judged.beta,
            status=status,
            reasons=reasons,
            margin=self.margin,
            notes=tuple(notes),
            reports=tuple(reports),
            suggested_reports=tuple(at),
            trial=trial,
            trial_steps=self.trial_steps,
        )

    def _measured(self, problems: Sequence[Problem], optimizer: Optimizer) -> list[StabilityReport]:
        found = [measure(each, optimizer=optimizer, memory=self.memory, **self.options) for each in problems]
        return [replace(report, step=index) for index, report in enumerate(found)]

    def _attempts(
        self, problems: Sequence[Problem], optimizer: Optimizer, trainer: Any
    ) -> tuple[Attempts | None, list[str]]:
        if not self.trial_steps:
            return None, []
        try:
            return attempts(problems, optimizer, self.trial_steps, trainer, self.memory), []
        except ClosureError as error:
            return None, [f"The coming steps cannot be tried. {error}"]

    def _alpha(self, configured: float, alpha_c: float, notes: list[str]) -> float:
        if math.isnan(configured) or 0 < alpha_c < math.inf:
            return self.margin * alpha_c
        notes.append("No finite alpha_c was measured, so the configured inner rate stays.")
        return configured

    def _tried(
        self, attempt: Attempts, alpha: float, beta: float, notes: list[str]
    ) -> tuple[float, tuple[float, float]]:
        inner = alpha / attempt.alpha if attempt.alpha > 0 else 1.0
        given = attempt.beta if math.isnan(beta) else beta
        tries = 1 if math.isnan(beta) else _HALVINGS
        for halved in range(tries):
            trial = attempt.runner.run(inner, given * 0.5**halved / attempt.beta if attempt.beta > 0 else 1.0)
            if not fails(severity(trial.end, trial.begin), self.alarm):
                break
        else:
            if not math.isnan(beta):
                notes.append(f"No beta from {beta:.3g} down to {beta * 0.5**halved:.3g} survives the coming steps.")
            return math.nan, (trial.begin, trial.end)
        if halved:
            notes.append(
                f"beta = {beta:.3g}, {self.margin:g} of its critical value, does not survive the coming steps: it was "
                f"halved {halved} times."
            )
        return beta * 0.5**halved, (trial.begin, trial.end)


def _smallest(limits: Any) -> float:
    known = [limit for limit in limits if not math.isnan(limit)]
    return min(known) if known else math.nan


def _ratio(report: StabilityReport) -> float:
    return max(ratio if not math.isnan(ratio) else -1.0 for ratio in (report.alpha_ratio, report.beta_ratio))


def _at(problem: Problem, alpha: float) -> Problem:
    if not isinstance(problem, MetaProblem):
        return problem
    if not isinstance(problem.inner_lr, dict):
        return replace(problem, inner_lr=alpha)
    factor = alpha / problem.alpha if problem.alpha > 0 else 1.0
    return replace(problem, inner_lr={name: rate * factor for name, rate in problem.inner_lr.items()})


def _why_no_beta(report: StabilityReport) -> str:
    if report.beta_c == 0:
        return "No meta rate is suggested: none is stable at this inner rate."
    if report.beta_c == math.inf:
        return "No meta rate is suggested: no curvature limits it."
    why = [reason for reason in report.reasons if reason.startswith("beta ")] or [*report.reasons, "it is not known."]
    return f"No meta rate is suggested: {why[0].removeprefix('beta is not judged: ')}"


def _batches(trainer: Any, combined_loader: Any, count: int) -> Iterator[Any]:
    loaders = combined_loader(trainer.train_dataloader, "max_size_cycle")
    generators = [
        found
        for loader in loaders.flattened
        for holder in (loader, getattr(loader, "sampler", None))
        if isinstance(found := getattr(holder, "generator", None), torch.Generator)
    ]
    states = [generator.get_state() for generator in generators]
    try:
        for batch, _, _ in itertools.islice(iter(loaders), count):
            yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
    finally:
        loaders.reset()
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _copied(module: Any) -> Any:
    kind = type(module).__name__
    try:
        copied = copy.deepcopy(module)
    except Exception as error:
        raise TypeError(
            f"Expected argument `module` to be one that copy.deepcopy copies, so that nothing of it changes, but got "
            f"a {kind} that it does not: {type(error).__name__}: {error}. Give the class a __deepcopy__, or keep what "
            "cannot be copied (open files, locks, tensors with a graph) out of its attributes."
        ) from error
    copied.configure_callbacks = list  # the run's own callbacks have nothing to do here
    return copied


@contextmanager
def _kept_trainer(datamodule: Any) -> Iterator[None]:
    attached = getattr(datamodule, "trainer", None)
    try:
        yield
    finally:
        if hasattr(datamodule, "trainer"):
            datamodule.trainer = attached


def _check_sources(module: Any, datamodule: Any, problem: Any) -> None:
    kind = type(module).__name__
    if problem is not None and not callable(problem):
        raise ValueError(
            f"Expected argument `problem` to be a function (module, batch) -> MetaProblem but got {shown(problem)}. "
            "Pass such a function, or None for the module's own `meta_problem`."
        )
    if problem is None and not has_meta_problem(module) and not module.automatic_optimization:
        raise ValueError(
            f"Expected {kind} to state its problem, for with manual optimisation its training_step takes optimizer "
            "steps of its own, but got neither `problem` nor a method meta_problem(batch) -> MetaProblem. Add one of "
            "them."
        )
    if datamodule is None:
        own = getattr(type(module), "train_dataloader", None)
        if own is not None and not own.__module__.endswith("core.hooks"):
            return
        raise TypeError(
            f"Expected argument `datamodule` to be a LightningDataModule or a dataloader but got None, and {kind} has "
            "no train_dataloader of its own. Pass what you would give to trainer.fit."
        )
    if callable(getattr(datamodule, "train_dataloader", None)):
        return
    if isinstance(datamodule, (torch.Tensor, str, bytes)) or not hasattr(datamodule, "__iter__"):
        raise TypeError(
            f"Expected argument `datamodule` to be a LightningDataModule or a dataloader but got {shown(datamodule)}. "
            "Pass what you would give to trainer.fit."
        )
    if hasattr(datamodule, "__next__"):
        raise TypeError(
            f"Expected argument `datamodule` to be something that can be gone through again but got an iterator, "
            f"{shown(datamodule)}: measuring would use its batches up. Pass the loader itself, or a list."
        )
