"""How a message reaches the terminal: on lines of its own, without a file of ours in front."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_maml_guard.messages.spelling import block
from lightning_maml_guard.utils.warnings import GuardWarning


def warn(message: str) -> None:
    """Warn the user once, on rank zero, in one readable block: what happened, why, what to do, a line each."""
    with _between_bars(), _without_place():
        rank_zero_warn(block(message), category=GuardWarning, stacklevel=6)


def inform(message: str) -> None:
    """Tell the user, on rank zero, without alarm."""
    with _between_bars():
        rank_zero_info(block(message))


def _between_bars() -> AbstractContextManager[None]:
    """Take tqdm's bars away and draw them again below what is written. Rich does that by itself."""
    tqdm = sys.modules.get("tqdm")
    return nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode()


@contextmanager
def _without_place() -> Iterator[None]:
    """Let a warning that is shown be shown without the line of code that gave it."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
