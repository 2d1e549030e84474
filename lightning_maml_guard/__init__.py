"""Knows, from theory and measurement, whether the learning rates of a MAML run can converge."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_maml_guard._warnings import GuardWarning

if TYPE_CHECKING:
    from lightning_maml_guard.guard.callback import ConvergenceGuard
    from lightning_maml_guard.guard.monitor import measure
    from lightning_maml_guard.guard.report import StabilityReport
    from lightning_maml_guard.guard.suggest import suggest_rates
    from lightning_maml_guard.guard.suggestion import RateSuggestion
    from lightning_maml_guard.maml.learning import MetaLearning
    from lightning_maml_guard.maml.module import MetaLearningModule
    from lightning_maml_guard.maml.problem import MetaProblem
    from lightning_maml_guard.phase_diagram import PhaseDiagram, phase_diagram
    from lightning_maml_guard.tasks.datamodule import TaskDataModule
    from lightning_maml_guard.tasks.episodes import EpisodeBatch
    from lightning_maml_guard.theory.rates import CriticalRates, critical_rates
    from lightning_maml_guard.theory.stability import stability_limit

__version__ = "0.1.0"

# Imported on first use: the mathematics must not cost Lightning's import.
_HOMES = {
    "ConvergenceGuard": "guard.callback",
    "CriticalRates": "theory.rates",
    "EpisodeBatch": "tasks.episodes",
    "MetaLearning": "maml.learning",
    "MetaLearningModule": "maml.module",
    "MetaProblem": "maml.problem",
    "PhaseDiagram": "grid.diagram",
    "RateSuggestion": "guard.suggestion",
    "StabilityReport": "guard.report",
    "TaskDataModule": "tasks.datamodule",
    "critical_rates": "theory.rates",
    "measure": "guard.monitor",
    "phase_diagram": "phase_diagram",
    "stability_limit": "theory.stability",
    "suggest_rates": "guard.suggest",
}

__all__ = [
    "ConvergenceGuard",
    "CriticalRates",
    "EpisodeBatch",
    "GuardWarning",
    "MetaLearning",
    "MetaLearningModule",
    "MetaProblem",
    "PhaseDiagram",
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
