"""A guard's arguments, and what is checked of them before a run."""

from __future__ import annotations

from inspect import signature
from typing import Any, Protocol

import torch

from lightning_maml_guard.guard.actions import ACTIONS, Action
from lightning_maml_guard.lookahead.lookahead import LookaheadOptions, check_lookahead
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.messages.spelling import Spelling
from lightning_maml_guard.messages.training_sentences import take_turns
from lightning_maml_guard.optim.stability_limits import climbs
from lightning_maml_guard.sharding.space import Split
from lightning_maml_guard.stability.options import CurvatureOptions, check_curvature
from lightning_maml_guard.stability.problems import ProblemSource, check_source, has_meta_problem
from lightning_maml_guard.theory.limits import check_margin
from lightning_maml_guard.utils.checks import check_choice, check_count, check_device, check_flag, check_number
from lightning_maml_guard.utils.lightning_compat import MisconfigurationException, is_sharded
from lightning_maml_guard.utils.shards import any_split, reshard


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


def identity(settings: Any) -> dict[str, Any]:
    """What tells guards apart that run side by side."""
    curvature, estimator = settings.curvature, settings.curvature.estimator
    return {
        "every_n_steps": settings.every_n_steps,
        "action": settings.action,
        "criterion": curvature.criterion,
        "tasks": curvature.tasks,
        "data": curvature.data,
        "margin": settings.margin,
        "patience": settings.patience,
        "estimator": estimator if isinstance(estimator, str) else getattr(estimator, "__name__", "callable"),
        "problem": getattr(settings.problem, "__qualname__", None),
    }


def check_settings(guard: Any) -> None:
    """Raise a ValueError or TypeError if an argument of a guard is not allowed, or if two do not go together."""
    for name in ("every_n_steps", "patience", "max_rollbacks", "history_size"):
        check_count(name, getattr(guard, name))
    check_number("max_cost", guard.max_cost, above=0, below=1)
    check_choice("action", guard.action, tuple(ACTIONS))
    for name in ("rollback", "figures", "allow_untested"):
        check_flag(name, getattr(guard, name))
    check_device("snapshot_device", guard.snapshot_device)
    check_source(guard.problem)
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
            "MetaProblem, or pass ConvergenceGuard(problem=lambda module, batch: MetaProblem(...)). "
            f"{take_turns()}"
        )
    if trainer.world_size > 1 and settings.curvature.estimator == "pyhessian":
        raise MisconfigurationException(
            f"ConvergenceGuard(estimator='pyhessian') measures one process's loss, but {trainer.world_size} train "
            "together. Use estimator='lanczos', whose products are averaged over them."
        )
    if is_sharded(trainer) and settings.curvature.estimator != "lanczos":
        raise MisconfigurationException(
            "ConvergenceGuard takes no estimator but 'lanczos' under ModelParallelStrategy: each process holds a piece "
            "of every vector, and products of vectors are sums over all processes. Use estimator='lanczos'."
        )


def idle_because(trainer: Any, pl_module: Any) -> Reason | None:
    """Why a guard does nothing in a run; None if it works."""
    climbing = next((each for each in trainer.optimizers if climbs(each)), None)
    if getattr(trainer, "barebones", False):
        return Reason(Kind.BAREBONES)
    if not any(each.param_groups for each in trainer.optimizers):
        return Reason(Kind.NO_OPTIMIZER)
    if "dataloader_iter" in signature(pl_module.training_step).parameters:
        return Reason(Kind.OWN_BATCHES)
    return None if climbing is None else Reason(Kind.MAXIMIZES, what=type(climbing).__name__)


def check_pieces(trainer: Any, pl_module: Any) -> None:
    """Raise a MisconfigurationException where a model's parameters are not split in a way that can be measured."""
    if not is_sharded(trainer):
        return
    reshard(pl_module)
    trained = {name: value for name, value in pl_module.named_parameters() if value.requires_grad}
    split = {name: value for name, value in trained.items() if any_split([value])}
    half = sorted({str(value.dtype) for value in split.values() if value.dtype in (torch.float16, torch.bfloat16)})
    try:
        Split(split or trained)
        if half:
            raise ValueError(
                f"Expected parameters in float32 or float64 but got {half}: differences of gradients in half precision "
                "are noise. Use precision='bf16-mixed', which keeps the parameters in float32."
            )
    except ValueError as error:
        raise MisconfigurationException(f"ConvergenceGuard cannot watch this model. {error}") from error
