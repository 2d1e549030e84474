"""Random states that are restored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch


def seed_generators() -> None:
    """Start torch's generators from one state, so that the same dropout masks are drawn."""
    if _only_cpu():  # torch.manual_seed takes a third of a small network's training step to note it for later devices
        torch.default_generator.manual_seed(0)
    else:
        torch.manual_seed(0)


@cache
def _only_cpu() -> bool:
    return not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available())


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch (every device in use) on leaving."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
