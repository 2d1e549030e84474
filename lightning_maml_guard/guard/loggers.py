"""Where a check's numbers, pictures and messages go: loggers, progress bar, terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from lightning_maml_guard.guard.report import CheckReport
from lightning_maml_guard.lookahead.divergence import RunningStatistics
from lightning_maml_guard.lookahead.learning import severity_at_hand
from lightning_maml_guard.plots.region import safe_region
from lightning_maml_guard.plots.spectrum import histogram, ritz_values
from lightning_maml_guard.plots.style import new_figure
from lightning_maml_guard.theory.limits import EDGE, SAFE, UNSAFE

# What cannot be done where a logger fails.
SEND = "send values to the loggers"
_SAFE = {SAFE: 1.0, EDGE: 0.5, UNSAFE: 0.0}


def metrics(report: CheckReport, *, caps_rates: bool) -> dict[str, float]:
    """Name a check's numbers as they are logged, ``guard/...``; what is not finite is left out.

    The applied rates are those of a guard that caps rates: of another they are the scheduled ones.
    """
    values = {
        "alpha": report.alpha,
        "alpha_c": report.alpha_c,
        "beta": report.beta,
        "beta_c": report.beta_c,
        "poster_alpha_c": report.simplified_alpha_c,
        "sgd_beta_c": report.sgd_beta_c,
        "exact_beta_c": report.exact_beta_c,
        "beta_c_noise": report.beta_c_noise,
        "mean_alpha_c": report.mean_alpha_c,
        "predicted_change": report.predicted_change,
        "lambda_max": report.lambda_max,
        "lambda_min": report.lambda_min,
        "alpha_applied": report.alpha_applied,
        "beta_applied": report.beta_applied,
        "safe": _SAFE.get(report.status, math.nan),
        "severity": report.severity,
        "growth": report.growth,
        "adaptation_gain": report.adaptation_gain,
        "hvps": float(report.hvps),
        "seconds": report.seconds,
        "limits_age": 0.0,
    }
    if not caps_rates:
        del values["alpha_applied"], values["beta_applied"]
    finite = {f"guard/{name}": value for name, value in values.items() if math.isfinite(value)}
    return finite | report.ratios(report.alpha_applied, report.beta_applied)


def log_check(trainer: Any, report: CheckReport, step: int, *, caps_rates: bool) -> None:
    """Log a check; ``trainer.callback_metrics`` has ``guard/unsafe`` too, which is always known, to be monitored."""
    _to_callbacks(trainer, {"guard/unsafe": float(report.status == UNSAFE)})
    log_values(trainer, metrics(report, caps_rates=caps_rates), step)


# Not through `self.log(logger=True)`: with log_every_n_steps it would write stale values on wrong steps.
def log_values(trainer: Any, values: dict[str, float], step: int) -> None:
    """Log numbers at the step they were found, to every logger and to ``trainer.callback_metrics``."""
    _to_callbacks(trainer, values)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)


def _to_callbacks(trainer: Any, values: dict[str, float]) -> None:
    """Let callbacks monitor numbers, as ``LearningRateMonitor`` does: Lightning goes over logged ones every step."""
    device = trainer.strategy.root_device
    trainer.callback_metrics.update({name: torch.tensor(value, device=device) for name, value in values.items()})


# Shares by which ratios have to move before they are logged again: where other values are logged too, and elsewhere.
_MOVED_BESIDE_OTHERS, _MOVED_ALONE = 1e-3, 0.1
_SHORT = {"guard/alpha_ratio": "a/ac", "guard/beta_ratio": "b/bc"}


class Ratios:
    """The latest ratios and severity: in the progress bar, and at the loggers as rates move between checks."""

    def __init__(self) -> None:
        self._report: CheckReport | None = None
        # The rates of the latest ratios, and of the last lookahead.
        self._logged_rates = self._lookahead_rates = math.nan, math.nan
        self._severity = self._logged_severity = math.nan  # of the last lookahead, and as it was logged last
        self._latest: dict[str, float] = {}
        self._shown: dict[str, float] = {}

    def _latest_report(self, history: Sequence[CheckReport]) -> CheckReport | None:
        """Go on from the last report; None before the first."""
        if history and history[-1] is not self._report:
            self._report = history[-1]
            self._logged_rates = self._report.alpha_applied, self._report.beta_applied
            self._latest = self._report.ratios(*self._logged_rates)
        return self._report

    def note_lookahead(self, severity: float, rates: tuple[float, float]) -> None:
        """Take in the severity of a lookahead, and the rates that it tried."""
        self._severity = self._logged_severity = severity
        self._lookahead_rates = rates

    def log_moved(
        self,
        trainer: Any,
        history: Sequence[CheckReport],
        losses: RunningStatistics,
        rates: tuple[float, float],
        coming: tuple[float, float],
        step: int,
    ) -> None:
        """Log ratios and severity at the rates of a coming step, with the age of the limits, where they moved.

        The severity is that of the last lookahead, plus the logarithm of the factor by which the rates have risen since
        or will have risen (``coming``), and no less than that of the latest ``losses``.
        """
        report = self._latest_report(history)
        if report is None:
            return
        least = _MOVED_BESIDE_OTHERS if step % trainer.log_every_n_steps == 0 else _MOVED_ALONE
        rises = [now / looked for now, looked in zip(coming, self._lookahead_rates, strict=True) if now > looked > 0]
        severity = self._severity + math.log(max([1.0, *rises]))
        at_hand = severity_at_hand(losses)
        severity = max(severity, at_hand) if math.isfinite(at_hand) else severity
        values = {}
        if any(abs(now - at) > least * at for now, at in zip(rates, self._logged_rates, strict=True)):
            self._logged_rates, self._latest = rates, report.ratios(*rates)
            values = self._latest | {"guard/limits_age": float(step - (report.step or 0))}
        if math.isfinite(severity) and (values or abs(severity - self._logged_severity) > least):
            self._logged_severity = values["guard/severity"] = severity
        if values:
            log_values(trainer, values, step)

    def show(self, trainer: Any, history: Sequence[CheckReport]) -> None:
        """Show them in the progress bar, if there is one, under short names that fit into 80 columns.

        To be called after the step, so that the user's loss comes first.
        """
        self._latest_report(history)
        if not self._latest or self._latest is self._shown:
            return
        self._shown = self._latest
        if trainer.progress_bar_callback is not None:
            short = {_SHORT[name]: ratio for name, ratio in self._latest.items()}
            options = {"prog_bar": True, "logger": False, "on_step": True, "on_epoch": False, "batch_size": 1}
            trainer.lightning_module.log_dict(short, **options)


def alert(trainer: Any, message: str) -> None:
    """Send a warning through the loggers that have alerts of their own: Weights & Biases mails or posts it."""
    title, _, text = message.partition("\n")
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if _is(logger, "WandbLogger"):
            logger.experiment.alert(title=title, text=text or title, level="WARN")


def logger_step(trainer: Any) -> int:
    """Read the loggers' x-axis: optimizer steps taken so far; batches that did not step do not count."""
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    stepped = getattr(loop, "_batches_that_stepped", None)
    return int(trainer.global_step if stepped is None else stepped)


def takes_no_steps(trainer: Any) -> bool:
    """Return True if the epoch only runs forward, as StochasticWeightAveraging's pass for batch norm does."""
    return bool(getattr(getattr(trainer, "fit_loop", None), "_skip_backward", False))


# A run whose state changes often would otherwise spend its time on drawing.
_CHECKS_BETWEEN = 10


class Figures:
    """Sends the safe region, the spectrum's picture and its histogram to TensorBoard, W&B and MLflow.

    A histogram is a handful of numbers and goes out with every check to the loggers that have histograms of their own.
    The two pictures take about a second to draw: they go out when the state changes, with at least ten checks between
    two of them, and at the end.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._sent: CheckReport | None = None
        self._checks_to_wait = 0

    def after_check(self, trainer: Any, history: Sequence[CheckReport], *, changed: bool) -> None:
        """Send what belongs to a check, that of the last report; ``changed``: whether the run's state did."""
        report = history[-1]
        if not self._wanted or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            _send_histogram(logger, report)
        self._checks_to_wait -= 1
        if changed and self._checks_to_wait < 0:
            self._checks_to_wait = _CHECKS_BETWEEN
            self._send(trainer, history)

    def at_end(self, trainer: Any, history: Sequence[CheckReport]) -> None:
        """Send the last pictures, unless they were sent."""
        if self._wanted and trainer.is_global_zero and history and history[-1] is not self._sent:
            self._send(trainer, history)

    def _send(self, trainer: Any, history: Sequence[CheckReport]) -> None:
        senders = [(logger, sender) for logger in trainer.loggers if (sender := _sender(logger)) is not None]
        if not senders or find_spec("matplotlib") is None:
            return
        self._sent = history[-1]
        for name, figure in _drawn(history).items():
            for logger, sender in senders:
                sender(logger, f"guard/{name}", figure, history[-1].step or 0)


def _drawn(history: Sequence[CheckReport]) -> dict[str, Any]:
    figures = {}
    if any(report.lambda_max > 0 for report in history):
        figure = new_figure()
        safe_region(history, ax=figure.subplots())
        figures["safe_region"] = figure
    seen = next((report for report in reversed(history) if report.ritz()[0]), None)
    if seen is not None:
        figures["spectrum"], _ = ritz_values(seen)
    return figures


def _is(logger: Any, name: str) -> bool:
    # By name, because the two Lightning packages have a class each and neither may be imported for the asking.
    return any(kind.__name__ == name for kind in type(logger).__mro__)


def _sender(logger: Any) -> Callable[[Any, str, Any, int], None] | None:
    senders = {"TensorBoardLogger": _to_tensorboard, "WandbLogger": _to_wandb, "MLFlowLogger": _to_mlflow}
    return next((sender for name, sender in senders.items() if _is(logger, name)), None)


def _pixels(figure: Any) -> Any:
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _to_tensorboard(logger: Any, name: str, figure: Any, step: int) -> None:
    # Not add_figure, which imports pyplot.
    logger.experiment.add_image(name, _pixels(figure), step, dataformats="HWC")


def _to_wandb(logger: Any, name: str, figure: Any, step: int) -> None:
    logger.log_image(name, [_pixels(figure)], step=step)


def _to_mlflow(logger: Any, name: str, figure: Any, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"{name}_step_{step:08d}.png")


def _send_histogram(logger: Any, report: CheckReport) -> None:
    tensorboard, wandb = _is(logger, "TensorBoardLogger"), _is(logger, "WandbLogger")
    values, weights = report.ritz() if tensorboard or wandb else ((), ())
    if not values:
        return
    counts, edges = histogram(values, weights)
    # Not the name of the picture: Weights & Biases keeps one value of a name for each step.
    name, step = "guard/eigenvalues", report.step or 0
    if wandb:
        import numpy as np
        from wandb import Histogram

        logger.log_metrics({name: Histogram(np_histogram=(np.array(counts), np.array(edges)))}, step=step)
    else:
        logger.experiment.add_histogram_raw(
            name,
            min=values[0],
            max=values[-1],
            num=1.0,
            sum=sum(v * w for v, w in zip(values, weights, strict=True)),
            sum_squares=sum(v * v * w for v, w in zip(values, weights, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )
