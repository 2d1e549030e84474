"""Measures whether the learning rates of a MAML run can converge, and says which one to lower, and to what."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_maml_guard.utils.warnings import GuardWarning

if TYPE_CHECKING:
    from lightning_maml_guard.guard.convergence_guard import ConvergenceGuard
    from lightning_maml_guard.guard.report import CheckReport
    from lightning_maml_guard.lookahead.lookahead import LookaheadOptions
    from lightning_maml_guard.maml.meta_learning import MetaLearning, MetaLearningModule
    from lightning_maml_guard.maml.problem import MetaProblem
    from lightning_maml_guard.optim.stability_limits import stability_limit
    from lightning_maml_guard.phase.diagram import PhaseDiagram, phase_diagram
    from lightning_maml_guard.stability.hvp import MeasurementCache
    from lightning_maml_guard.stability.measure import measure
    from lightning_maml_guard.stability.options import CurvatureOptions
    from lightning_maml_guard.stability.report import StabilityReport
    from lightning_maml_guard.tasks.datamodule import TaskDataModule
    from lightning_maml_guard.tasks.episodes import EpisodeBatch
    from lightning_maml_guard.theory.critical_rates import CriticalRates, critical_rates
    from lightning_maml_guard.tuner.ladder import LadderOptions
    from lightning_maml_guard.tuner.rate_finder import RateFinder
    from lightning_maml_guard.tuner.suggest_rates import suggest_rates
    from lightning_maml_guard.tuner.suggestion import RateSuggestion

__version__ = "0.1.0"

# Imported on first use: the mathematics must not cost Lightning's import.
_HOMES = {
    "CheckReport": "guard.report",
    "ConvergenceGuard": "guard.convergence_guard",
    "CriticalRates": "theory.critical_rates",
    "CurvatureOptions": "stability.options",
    "EpisodeBatch": "tasks.episodes",
    "LadderOptions": "tuner.ladder",
    "LookaheadOptions": "lookahead.lookahead",
    "MeasurementCache": "stability.hvp",
    "MetaLearning": "maml.meta_learning",
    "MetaLearningModule": "maml.meta_learning",
    "MetaProblem": "maml.problem",
    "PhaseDiagram": "phase.result",
    "RateFinder": "tuner.rate_finder",
    "RateSuggestion": "tuner.suggestion",
    "StabilityReport": "stability.report",
    "TaskDataModule": "tasks.datamodule",
    "critical_rates": "theory.critical_rates",
    "measure": "stability.measure",
    "phase_diagram": "phase.diagram",
    "stability_limit": "optim.stability_limits",
    "suggest_rates": "tuner.suggest_rates",
}

__all__ = [
    "CheckReport",
    "ConvergenceGuard",
    "CriticalRates",
    "CurvatureOptions",
    "EpisodeBatch",
    "GuardWarning",
    "LadderOptions",
    "LookaheadOptions",
    "MeasurementCache",
    "MetaLearning",
    "MetaLearningModule",
    "MetaProblem",
    "PhaseDiagram",
    "RateFinder",
    "RateSuggestion",
    "StabilityReport",
    "TaskDataModule",
    "critical_rates",
    "measure",
    "phase_diagram",
    "stability_limit",
    "suggest_rates",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
