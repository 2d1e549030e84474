"""Where a check's numbers go: loggers, progress bar, messages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_maml_guard.guard.messages import block
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.utils.lightning_compat import DummyLogger
from lightning_maml_guard.utils.warnings import GuardWarning

_SAFE = {"safe": 1.0, "edge": 0.5, "unsafe": 0.0}


def metrics(report: StabilityReport) -> dict[str, float]:
    """Name a report's numbers as they are logged.

    Args:
        report: The report.

    Returns:
        ``guard/...`` values; what is not finite (a limit that does not exist or was not measured) is left out.
    """
    values = {
        "alpha": report.alpha,
        "alpha_c": report.alpha_c,
        "beta": report.beta,
        "beta_c": report.beta_c,
        "poster_alpha_c": report.poster_alpha_c,
        "sgd_beta_c": report.sgd_beta_c,
        "exact_beta_c": report.exact_beta_c,
        "beta_c_noise": report.beta_c_noise,
        "mean_alpha_c": report.mean_alpha_c,
        "predicted_change": report.predicted_change,
        "lambda_max": report.lambda_max,
        "lambda_min": report.lambda_min,
        "alpha_ratio": report.alpha_ratio,
        "beta_ratio": report.beta_ratio,
        "alpha_applied": report.alpha_applied,
        "beta_applied": report.beta_applied,
        "safe": _SAFE.get(report.status, math.nan),
        "severity": report.severity,
        "growth": report.growth,
        "hvps": float(report.hvps),
        "seconds": report.seconds,
    }
    return {f"guard/{name}": value for name, value in values.items() if math.isfinite(value)}


def log_values(trainer: Any, pl_module: Any, values: dict[str, float], step: int) -> None:
    """Log a check's numbers at the step it was made, to every logger and the progress bar.

    Args:
        trainer: The Trainer.
        pl_module: The module, whose ``log`` fills the progress bar and ``callback_metrics``.
        values: The numbers.
        step: The loggers' step.
    """
    ratios = {name: value for name, value in values.items() if name in {"guard/alpha_ratio", "guard/beta_ratio"}}
    rest = {name: value for name, value in values.items() if name not in ratios}
    # Not through `self.log(logger=True)`: with log_every_n_steps it would write stale values on wrong steps.
    options: dict[str, Any] = {"logger": False, "on_step": True, "on_epoch": False, "batch_size": 1}
    if ratios:
        pl_module.log_dict(ratios, prog_bar=True, **options)
    pl_module.log_dict(rest, prog_bar=False, **options)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)


@contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """Keep what a measurement sends to the loggers themselves away from them.

    Args:
        trainer: The Trainer.

    Yields:
        Nothing.
    """
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def warn(message: str) -> None:
    """Warn the user once, on rank zero, in one readable block.

    Args:
        message: What happened, why, what to do, a line each.
    """
    rank_zero_warn(block(message), category=GuardWarning, stacklevel=6)


def inform(message: str) -> None:
    """Tell the user, on rank zero, without alarm.

    Args:
        message: What happened.
    """
    rank_zero_info(message)


def logger_step(trainer: Any) -> int:
    """Read the loggers' x-axis: optimizer steps taken so far, batches that did not step left out.

    Args:
        trainer: The Trainer.

    Returns:
        The step.
    """
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    stepped = getattr(loop, "_batches_that_stepped", None)
    return int(trainer.global_step if stepped is None else stepped)
