"""Pictures; each function returns ``(fig, ax)``."""

from lightning_maml_guard.plots.phase_diagram import phase_diagram
from lightning_maml_guard.plots.region import safe_region
from lightning_maml_guard.plots.run import course
from lightning_maml_guard.plots.spectrum import ritz, spectrum

__all__ = ["course", "phase_diagram", "ritz", "safe_region", "spectrum"]
