"""Pictures; each function returns ``(fig, ax)``."""

from lightning_maml_guard.plots.ladder import rate_ladder
from lightning_maml_guard.plots.near_minimum import near_minimum
from lightning_maml_guard.plots.phase_diagram import phase_diagram
from lightning_maml_guard.plots.region import safe_region
from lightning_maml_guard.plots.run import run_history
from lightning_maml_guard.plots.spectrum import ritz_values, spectrum
from lightning_maml_guard.plots.start_and_end import start_and_end

__all__ = [
    "near_minimum",
    "phase_diagram",
    "rate_ladder",
    "ritz_values",
    "run_history",
    "safe_region",
    "spectrum",
    "start_and_end",
]
