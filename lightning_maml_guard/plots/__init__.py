"""Pictures; each function returns ``(fig, ax)``."""

from lightning_maml_guard.plots.ladder import rate_ladder
from lightning_maml_guard.plots.phase_diagram import phase_diagram
from lightning_maml_guard.plots.region import safe_region
from lightning_maml_guard.plots.run import run_history
from lightning_maml_guard.plots.spectrum import ritz_values, spectrum

__all__ = ["phase_diagram", "rate_ladder", "ritz_values", "run_history", "safe_region", "spectrum"]
