"""suggest_rates: learning rates before training, in the manner of Lightning's learning-rate finder."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.lookahead.lookahead import LookaheadOptions, check_lookahead
from lightning_maml_guard.stability.options import CurvatureOptions, check_curvature
from lightning_maml_guard.stability.problems import ProblemSource, check_source, has_meta_problem
from lightning_maml_guard.tuner.at_start import Finder
from lightning_maml_guard.tuner.ladder import LadderOptions, check_ladder
from lightning_maml_guard.tuner.suggestion import RateSuggestion
from lightning_maml_guard.utils.checks import check_count, check_number, shown
from lightning_maml_guard.utils.lightning_compat import Callback, quiet_lightning, trainer_and_loader_of
from lightning_maml_guard.utils.random_state import preserved_randomness

# The sharpest task and not the mean: one task beyond its limit can end a run.
WORST_TASK = CurvatureOptions(tasks="worst")


def suggest_rates(
    module: Any,
    datamodule: Any = None,
    *,
    batches: int = 4,
    margin: float = 0.25,
    problem: ProblemSource | None = None,
    curvature: CurvatureOptions = WORST_TASK,
    lookahead: LookaheadOptions = LookaheadOptions(),  # noqa: B008 (frozen)
    ladder: LadderOptions = LadderOptions(),  # noqa: B008 (frozen)
    accelerator: str = "auto",
    precision: str | int | None = None,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
    accumulate_grad_batches: int = 1,
) -> RateSuggestion:
    """Try rates before training, on copies, and suggest a pair that trains.

    Works on a copy of the module: a Trainer of its own prepares and sets up the data, moves the copy to the device and
    builds its optimizer; module, random states and data stay as they were. Pairs of an inner rate ``alpha`` and a meta
    rate ``beta`` are trained side by side for ``ladder.steps`` steps, each from the initial parameters with the run's
    own optimizer, its groups, weight decay and clipping, at constant rates (under a schedule: where it peaks), on
    batches as the data gives them. Losses are those of batches that no pair has trained on. Pairs whose loss diverges
    are dropped. At the better half of the inner rates, training starts anew on other batches, with outer rates from
    around the best to above the largest that trains; half of these inner rates go on twice as long, then half of those,
    up to ``ladder.longest`` steps. Suggested is the pair whose loss is lowest, with ``beta`` at most ``margin`` times
    the largest that trains with all below it.

    The loss decides, because the best rates of Adam are far below the largest that train, and by no fixed share. At
    most a quarter, because a rate that trains for so few steps can be up to four times too high for a whole run, where
    losses spike. The critical rates at the initialisation are measured and reported as well. They explain why a rate
    diverges at once, and bound neither rate: training itself lowers the curvature.

    Args:
        module: A ``MetaLearningModule``, another LightningModule with ``meta_problem`` or ``problem``, or any with
            automatic optimisation, whose ``training_step`` is then plain training: ``beta`` only.
        datamodule: A LightningDataModule, a dataloader, or None for the module's own ``train_dataloader``.
        batches: Optimizer steps whose batches are measured.
        margin: Share of the largest outer rate that trains above which none is suggested, between 0 and 1.
        problem: ``(module, batch) -> MetaProblem``, for modules that have no ``meta_problem``.
        curvature: How to measure; by default that of the sharpest (``"worst"``) task of a batch.
        lookahead: How the configured pair is judged; ``steps=0``: by its limits alone. ``batches`` and ``triggers`` do
            not apply.
        ladder: How rates are tried.
        accelerator: Lightning's name of the accelerator.
        precision: The run's, as its Trainer takes it.
        gradient_clip_val: The run's, as its Trainer takes it. The critical rates are those of unclipped gradients.
        gradient_clip_algorithm: The run's, as its Trainer takes it.
        accumulate_grad_batches: The run's, as its Trainer takes it: every step averages so many batches.

    Returns:
        The suggestion, with ``.suggestion()``, ``.plot()``, ``.apply(module)`` and a readable ``str``.

    Raises:
        TypeError: If ``module`` is no LightningModule or cannot be copied, or if ``datamodule`` gives no batches.
        ValueError: If another argument is not allowed, or if there is nothing to measure: no batch, no optimizer, or
            manual optimisation without a problem.

    Example:
        >>> import torch
        >>> from lightning_maml_guard import LadderOptions, MetaLearningModule, TaskDataModule, suggest_rates
        >>> from lightning_maml_guard.networks import mlp
        >>> from lightning_maml_guard.tasks.regression import Sinusoid
        >>> sgd = lambda parameters: torch.optim.SGD(parameters, lr=1.0)
        >>> quick = LadderOptions(steps=10, alphas=(0.01, 0.02), progress=False)
        >>> found = suggest_rates(MetaLearningModule(mlp(), optimizer=sgd), TaskDataModule(Sinusoid()), ladder=quick)
        >>> alpha, beta = found.suggestion()
        >>> alpha in (0.01, 0.02), 0 < beta < 1
        (True, True)
    """
    check_count("batches", batches)
    check_count("accumulate_grad_batches", accumulate_grad_batches)
    check_number("margin", margin, above=0, below=1)
    check_curvature(curvature)
    check_lookahead(lookahead)
    check_ladder(ladder)
    trainer_class, combined_loader = trainer_and_loader_of(module, "module")
    _check_sources(module, datamodule, problem)
    with preserved_randomness(), quiet_lightning(), data_kept(datamodule):
        draw = partial(training_batches, combined_loader)
        start = _FindAtStart(Finder(draw, problem, curvature, lookahead, ladder, margin, batches))
        trainer = trainer_class(
            max_epochs=1,
            accelerator=accelerator,
            devices=1,
            precision=precision,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            accumulate_grad_batches=accumulate_grad_batches,
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


class _FindAtStart(Callback):
    """Finds rates where training would start, and lets it end there."""

    def __init__(self, finder: Finder) -> None:
        super().__init__()
        self._finder = finder
        self.found: RateSuggestion | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True
        self.found = self._finder.find(trainer, pl_module)


def training_batches(combined_loader: Any, trainer: Any) -> Iterator[Any]:
    """Yield a Trainer's training batches on its device, epoch after epoch; nothing if there is none."""
    loaders = combined_loader(trainer.train_dataloader, "max_size_cycle")
    samplers: list[Any] = [getattr(loader, "sampler", None) for loader in tree_leaves(trainer.train_dataloader)]
    try:
        for epoch in itertools.count():
            for sampler in samplers:
                if callable(getattr(sampler, "set_epoch", None)):
                    sampler.set_epoch(epoch)
            drawn = 0
            for batch, _, _ in iter(loaders):
                drawn += 1
                _check_values(batch)
                yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
            if not drawn:
                return
    finally:
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
def data_kept(datamodule: Any) -> Iterator[None]:
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
    check_source(problem)
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
