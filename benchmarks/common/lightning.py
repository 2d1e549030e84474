"""A Trainer that neither writes nor says anything."""

from __future__ import annotations

import logging
from typing import Any

TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def quiet() -> None:
    """Silence Lightning and the guard's own log in this process."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_maml_guard"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
