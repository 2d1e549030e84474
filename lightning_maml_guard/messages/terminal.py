"""How a message reaches the terminal: on lines of its own, beside progress bars, without a file name in front."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from lightning_utilities.core import rank_zero
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


@contextmanager
def _between_bars() -> Iterator[None]:
    """Take tqdm's bars away and draw them again below what is written; let rich draw its own below what is logged."""
    tqdm = sys.modules.get("tqdm")
    with nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(), _logged_above_rich():
        yield


@contextmanager
def _logged_above_rich() -> Iterator[None]:
    """Let log handlers write where rich, while it draws a bar, has put a stream of its own in place of stderr.

    They keep the stream that was there when they were made. What they write to it moves the bar, and the bar's next
    drawing wipes out the last line of it where the bar has two.
    """
    written = getattr(sys.stderr, "rich_proxied_file", None)
    handlers = [each for each in _handlers(rank_zero.log) if written is not None and each.stream is written]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(written)


def _handlers(logger: logging.Logger | None) -> Iterator[Any]:
    """Go through the handlers that write what this logger logs to a stream."""
    while logger is not None:
        yield from (each for each in logger.handlers if isinstance(each, logging.StreamHandler))
        logger = logger.parent if logger.propagate else None


@contextmanager
def _without_place() -> Iterator[None]:
    """Let a warning that is shown be shown without the line of code that gave it."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
