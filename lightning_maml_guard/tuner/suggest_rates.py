"""suggest_rates: learning rates before training, in the manner of Lightning's learning-rate finder."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.lookahead.lookahead import LookaheadOptions, check_lookahead
from lightning_maml_guard.stability.options import CurvatureOptions, check_curvature
from lightning_maml_guard.stability.problems import ProblemSource, has_meta_problem
from lightning_maml_guard.tuner.at_start import MeasureAtStart
from lightning_maml_guard.tuner.suggestion import RateSuggestion
from lightning_maml_guard.utils.checks import check_count, check_number, shown
from lightning_maml_guard.utils.lightning_compat import inform_less, tools_for
from lightning_maml_guard.utils.random_state import preserved_randomness

# The sharpest task and not the mean: one task beyond its limit can end a run.
_WORST_TASK = CurvatureOptions(tasks="worst")


def suggest_rates(
    module: Any,
    datamodule: Any = None,
    *,
    batches: int = 4,
    margin: float = 0.5,
    problem: ProblemSource | None = None,
    curvature: CurvatureOptions = _WORST_TASK,
    lookahead: LookaheadOptions = LookaheadOptions(),  # noqa: B008 (frozen)
    accelerator: str = "auto",
    precision: str | int | None = None,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
) -> RateSuggestion:
    """Measure the critical rates before training, and suggest a pair inside them.

    Works on a copy of the module: a Trainer of its own prepares and sets up the data, moves the copy to the device,
    builds its optimizer and draws the first training batches; nothing is trained, and module, random states and data
    stay as they were. Each batch is measured as :class:`~lightning_maml_guard.ConvergenceGuard` does before its first
    step. ``alpha`` is suggested at ``margin`` times the smallest ``alpha_c`` over the batches, ``beta`` at ``margin``
    times the smallest ``beta_c`` *at that* ``alpha``; where batches bring new tasks, at ``margin`` times the
    mean-square limit ``beta_c_noise`` if that is smaller. The pair is then tried for ``lookahead.steps`` steps on
    copies, and ``beta`` halved until the loss survives.

    The smallest limit and not the median, and the sharpest task's ``alpha_c`` and not the mean's, because one task
    beyond its limit can end a run: of 8 sinusoid runs (4 tasks per step, 300 steps of SGD, 4 seeds without and 4 with
    momentum 0.9) 7 stayed finite at the suggested pairs; at half of the mean task loss's limits all 3 that were tried
    with momentum diverged. The numbers are those of the initialisation: curvature often grows while the network trains;
    that is what the margin is for, and what a guard then watches.

    Adam, AdamW, NAdam, RMSprop and Adagrad have no second moment before their first step, hence no preconditioned
    Jacobian and no ``beta_c``: no meta rate is suggested for them. The lookahead takes the configured one instead.

    Args:
        module: A ``MetaLearningModule``, another LightningModule with ``meta_problem`` or ``problem``, or any with
            automatic optimisation, whose ``training_step`` is then plain training: ``beta`` only.
        datamodule: A LightningDataModule, a dataloader, or None for the module's own ``train_dataloader``.
        batches: Training batches to measure.
        margin: Fraction of the critical values to suggest, between 0 and 1.
        problem: ``(module, batch) -> MetaProblem``, for modules that have no ``meta_problem``.
        curvature: How to measure; by default that of the sharpest (``"worst"``) task of a batch.
        lookahead: How the pair is tried; ``steps=0``: not at all. ``batches`` and ``triggers`` do not apply.
        accelerator: Lightning's name of the accelerator.
        precision: The run's, as its Trainer takes it.
        gradient_clip_val: The run's, as its Trainer takes it; the lookahead clips with it. The limits are those of
            unclipped gradients, and those of a single batch where the run accumulates several.
        gradient_clip_algorithm: The run's, as its Trainer takes it.

    Returns:
        The suggestion, with ``.suggestion()``, ``.plot()`` and a readable ``str``.

    Raises:
        TypeError: If ``module`` is no LightningModule or cannot be copied, or if ``datamodule`` gives no batches.
        ValueError: If another argument is not allowed, or if there is nothing to measure: no batch, no optimizer, or
            manual optimisation without a problem.

    Example:
        >>> import torch
        >>> from lightning_maml_guard import MetaLearningModule, TaskDataModule, suggest_rates
        >>> from lightning_maml_guard.networks import mlp
        >>> from lightning_maml_guard.tasks.regression import Sinusoid
        >>> sgd = lambda parameters: torch.optim.SGD(parameters, lr=1.0)
        >>> found = suggest_rates(MetaLearningModule(mlp(), optimizer=sgd), TaskDataModule(Sinusoid()))
        >>> alpha, beta = found.suggestion()
        >>> 0 < alpha < found.alpha_c, 0 < beta < found.beta_c
        (True, True)
    """
    check_count("batches", batches)
    check_number("margin", margin, above=0, below=1)
    check_curvature(curvature)
    check_lookahead(lookahead)
    trainer_class, combined_loader = tools_for(module, "module")
    _check_sources(module, datamodule, problem)
    with preserved_randomness(), inform_less(), _kept(datamodule):
        start = MeasureAtStart(
            lambda trainer: _batches(trainer, combined_loader, batches), problem, curvature, lookahead, margin
        )
        trainer = trainer_class(
            max_epochs=1,
            accelerator=accelerator,
            devices=1,
            precision=precision,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            callbacks=[start],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(_copied(module), datamodule)
    if start.found is None:
        raise ValueError(
            "Expected argument `datamodule` to give at least one training batch but got none. Check the length of its "
            "data set and drop_last."
        )
    return start.found


def _batches(trainer: Any, combined_loader: Any, count: int) -> Iterator[Any]:
    loaders = combined_loader(trainer.train_dataloader, "max_size_cycle")
    for batch, _, _ in itertools.islice(iter(loaders), count):
        _check_values(batch)
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
    loaders.reset()


def _check_values(batch: Any) -> None:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
            raise ValueError(
                "Expected argument `datamodule` to give batches that hold values but got a tensor of shape "
                f"{tuple(leaf.shape)} on the meta device. Build the data on a device such as 'cpu'."
            )


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
def _kept(datamodule: Any) -> Iterator[None]:
    """Put a datamodule's Trainer and the generators of loaders back on leaving."""
    attached = getattr(datamodule, "trainer", None)
    # Before the Trainer sees them: it draws from a loader's generator when it checks that it can be iterated.
    generators = [
        found
        for loader in tree_leaves(datamodule)
        for holder in (loader, getattr(loader, "sampler", None))
        if isinstance(found := getattr(holder, "generator", None), torch.Generator)
    ]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        if hasattr(datamodule, "trainer"):
            datamodule.trainer = attached
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


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
