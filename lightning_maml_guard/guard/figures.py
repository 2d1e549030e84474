"""Pictures for the loggers that can show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from lightning_maml_guard.plots.region import safe_region
from lightning_maml_guard.plots.spectrum import histogram, ritz_values
from lightning_maml_guard.plots.style import new_figure
from lightning_maml_guard.stability.report import StabilityReport

# A run whose state flaps would otherwise spend its time on drawing.
_CHECKS_BETWEEN = 10


class Figures:
    """Sends the safe region, the spectrum's picture and its histogram to TensorBoard, W&B and MLflow.

    A histogram is a handful of numbers and goes out with every check to the loggers that have histograms of their own.
    The two pictures take about a second to draw: they go out when the state changes, with at least ten checks
    between two of them, and at the end.

    Args:
        wanted: Whether to send anything.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._sent: StabilityReport | None = None
        self._quiet = 0

    def after_check(self, trainer: Any, history: Sequence[StabilityReport], *, changed: bool) -> None:
        """Send what belongs to a check.

        Args:
            trainer: The Trainer.
            history: The reports, that of the check last.
            changed: Whether the run's state changed.
        """
        report = history[-1]
        if not self._wanted or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            _send_histogram(logger, report)
        self._quiet -= 1
        if changed and self._quiet < 0:
            self._quiet = _CHECKS_BETWEEN
            self._send(trainer, history)

    def at_end(self, trainer: Any, history: Sequence[StabilityReport]) -> None:
        """Send the last pictures, unless they were sent.

        Args:
            trainer: The Trainer.
            history: The reports.
        """
        if self._wanted and trainer.is_global_zero and history and history[-1] is not self._sent:
            self._send(trainer, history)

    def _send(self, trainer: Any, history: Sequence[StabilityReport]) -> None:
        senders = [(logger, sender) for logger in trainer.loggers if (sender := _sender(logger)) is not None]
        if not senders or find_spec("matplotlib") is None:
            return
        self._sent = history[-1]
        for name, figure in _drawn(history).items():
            for logger, sender in senders:
                sender(logger, f"guard/{name}", figure, history[-1].step or 0)


def _drawn(history: Sequence[StabilityReport]) -> dict[str, Any]:
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


def _send_histogram(logger: Any, report: StabilityReport) -> None:
    tensorboard, wandb = _is(logger, "TensorBoardLogger"), _is(logger, "WandbLogger")
    values, weights = report.ritz() if tensorboard or wandb else ((), ())
    if not values:
        return
    counts, edges = histogram(values, weights)
    name, step = "guard/spectrum", report.step or 0
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
