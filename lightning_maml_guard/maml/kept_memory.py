"""The memory a fit on a CPU keeps between its steps."""

from __future__ import annotations

from typing import Any

from lightning_maml_guard.kernels.allocator import hold, release, settle

# Steps of a fit after which its memory has the size it keeps.
_SETTLED_AFTER = 3


class KeptMemory:
    """Keeps freed memory in the process from the start of a fit to its end, and asks for huge pages under it."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._steps_left = 0

    def start(self, holder: Any, on_cpu: bool) -> None:
        """Keep memory on behalf of ``holder``, the module."""
        kept = self._enabled and on_cpu and hold(holder)
        self._steps_left = _SETTLED_AFTER if kept else 0

    def step(self) -> None:
        """Count a training step; once the memory has its size, ask for huge pages."""
        if self._steps_left:
            self._steps_left -= 1
            if not self._steps_left:
                settle()

    def end(self, holder: Any) -> None:
        """Give the memory back."""
        release(holder)
