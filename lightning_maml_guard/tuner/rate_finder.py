"""RateFinder: the callback that finds rates where a run starts, and trains with them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from lightning_maml_guard.lookahead.lookahead import LookaheadOptions
from lightning_maml_guard.stability.options import CurvatureOptions, check_curvature
from lightning_maml_guard.stability.problems import ProblemSource, check_source
from lightning_maml_guard.tuner.at_start import Finder
from lightning_maml_guard.tuner.ladder import LadderOptions, check_ladder
from lightning_maml_guard.tuner.suggest_rates import WORST_TASK, data_kept, training_batches
from lightning_maml_guard.tuner.suggestion import RateSuggestion
from lightning_maml_guard.utils.checks import check_attribute, check_count, check_number
from lightning_maml_guard.utils.lightning_compat import (
    Callback,
    MisconfigurationException,
    inform,
    trainer_and_loader_of,
)
from lightning_maml_guard.utils.random_state import preserved_randomness


class RateFinder(Callback):
    """Finds the inner and the outer rate where ``fit`` starts, as ``suggest_rates`` does, and trains with them.

    The pair is set in the module as :meth:`RateSuggestion.apply` does, the optimizers are made anew, and ``hparams``
    hold it, so that loggers and checkpoints do. Where no pair is suggested the configured one stays, and why is said. A
    run that is resumed, ``fast_dev_run`` and barebones runs keep their rates. A callback of its own and no argument of
    the guard: its work ends where the guard's begins, and either is of use without the other.

    Args:
        batches: Optimizer steps whose batches are measured.
        margin: Share of the largest outer rate that trains above which none is suggested.
        problem: ``(module, batch) -> MetaProblem``, for modules that have no ``meta_problem``.
        ladder: How rates are tried.
        curvature: How the critical rates are measured.
        alpha: Name of the module's inner rate; see :meth:`RateSuggestion.apply`.
        beta: Name of its learning rate.

    Attributes:
        found: The suggestion; None before ``fit``, and where the rates were kept.

    Raises:
        ValueError: If an argument is not allowed.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from lightning_maml_guard import LadderOptions, MetaLearningModule, RateFinder, TaskDataModule
        >>> from lightning_maml_guard.networks import mlp
        >>> from lightning_maml_guard.tasks.regression import Sinusoid
        >>> finder = RateFinder(ladder=LadderOptions(steps=10, alphas=(0.01, 0.02), progress=False))
        >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        >>> trainer = Trainer(max_steps=2, accelerator="cpu", callbacks=[finder], logger=False, **quiet)
        >>> trainer.fit(MetaLearningModule(mlp()), TaskDataModule(Sinusoid(), val_episodes=0))
        >>> trainer.optimizers[0].param_groups[0]["lr"] == finder.found.beta
        True
    """

    def __init__(
        self,
        batches: int = 4,
        margin: float = 0.25,
        problem: ProblemSource | None = None,
        ladder: LadderOptions = LadderOptions(),  # noqa: B008 (frozen)
        curvature: CurvatureOptions = WORST_TASK,
        alpha: str | None = None,
        beta: str | None = None,
    ) -> None:
        super().__init__()
        check_count("batches", batches)
        check_number("margin", margin, above=0, below=1)
        check_source(problem)
        check_ladder(ladder)
        check_curvature(curvature)
        check_attribute("alpha", alpha)
        check_attribute("beta", beta)
        self.batches, self.margin, self.problem = batches, margin, problem
        self.ladder, self.curvature, self.alpha, self.beta = ladder, curvature, alpha, beta
        self.found: RateSuggestion | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the rates and set them."""
        if trainer.ckpt_path is not None or trainer.fast_dev_run or getattr(trainer, "barebones", False):
            return
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"RateFinder tries rates in one process, on that one's batches, but {trainer.world_size} train "
                "together. Call suggest_rates before the run, with as large a batch as all of them see together."
            )
        trainer.fit_loop.setup_data()
        draw = partial(training_batches, trainer_and_loader_of(pl_module, "module")[1])
        judged = LookaheadOptions(steps=0)
        finder = Finder(draw, self.problem, self.curvature, judged, self.ladder, self.margin, self.batches)
        with preserved_randomness(), data_kept(trainer.train_dataloader):
            found = finder.find(trainer, pl_module)
        if found is None:
            return
        self.found = found
        if math.isnan(found.beta):
            inform(f"RateFinder: the configured rates stay. {' '.join(found.notices)}")
            return
        found.apply(pl_module, self.alpha, self.beta)
        trainer.strategy.setup_optimizers(trainer)
        pair = {} if math.isnan(found.alpha) else {self.alpha or "inner_lr": found.alpha}
        hparams = getattr(pl_module, "hparams", None)
        if hparams is not None and "_instantiator" not in hparams:
            hparams.update({**pair, self.beta or "lr": found.beta})
        inform(f"RateFinder: {found!s}")
