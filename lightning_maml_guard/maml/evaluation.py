"""Evaluation over episodes: before and after adaptation, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from lightning_maml_guard.maml.batch_errors import explained
from lightning_maml_guard.maml.inner_loop import Params, adapted_loss, detached
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.maml.vectorization import Vectorization
from lightning_maml_guard.utils.task_map import TaskMap


class EpisodeMean(Metric):
    """Mean of one value an episode, with the half-width of its 95 % confidence interval.

    The half-width is ``1.96 * s / sqrt(n)`` with the sample standard deviation ``s`` over ``n`` episodes,
    the form few-shot papers report.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add episodes.

        Args:
            values: One value an episode, any shape.
        """
        self.values.append(values.detach().flatten().float())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Compute the mean and the half-width (``nan`` for a single episode).

        Returns:
            Mean and half-width, scalars.
        """
        values = dim_zero_cat(self.values)
        if len(values) < 2:
            return values.mean(), torch.full_like(values.mean(), float("nan"))
        return values.mean(), 1.96 * values.std() / len(values) ** 0.5


class EpisodeEvaluation(nn.Module):
    """Accumulates losses and metrics of each stage, one value an episode.

    Args:
        metrics: A torchmetrics metric or collection, computed on each episode's query set.

    Raises:
        TypeError: If ``metrics`` is something else.
    """

    def __init__(self, metrics: Metric | MetricCollection | None) -> None:
        super().__init__()
        if isinstance(metrics, Metric):
            metrics = MetricCollection({_short_name(metrics): metrics})
        if metrics is not None and not isinstance(metrics, MetricCollection):
            raise TypeError(
                "Expected argument `metrics` to be a torchmetrics Metric or MetricCollection but got "
                f"{type(metrics).__name__}. Pass one of torchmetrics, such as MulticlassAccuracy(num_classes=5)."
            )
        self.metrics = metrics
        self.means = nn.ModuleDict()

    def update(self, stage: str, found: dict[str, Tensor], query: Any) -> None:
        """Add a batch of episodes.

        Args:
            stage: Prefix of the logged names.
            found: What :func:`evaluate_tasks` found.
            query: The episodes' query sets ``(x, y)``; read only where there are metrics.

        Raises:
            ValueError: If a metric gives more than one value an episode.
        """
        self._mean(f"{stage}/loss", found["loss"]).update(found["loss"])
        self._mean(f"{stage}/loss_before", found["loss"]).update(found["loss_before"])
        if self.metrics is None:
            return
        for suffix in ("", "_before"):
            for prediction, target in zip(found[f"prediction{suffix}"], query[1], strict=True):
                for name, value in self.metrics(prediction, target).items():
                    if value.numel() != 1:
                        raise ValueError(
                            f"The metric {name!r} gave {value.numel()} values for one episode; an interval over "
                            "episodes needs one. Choose an average, such as average='micro'."
                        )
                    self._mean(f"{stage}/{name}{suffix}", value).update(value)
                self.metrics.reset()

    def compute(self, stage: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute a stage's means and half-widths, and start over.

        Args:
            stage: The stage.

        Returns:
            ``(mean, half-width)`` by logged name.
        """
        found = {}
        for key, metric in self.means.items():
            if key.startswith(f"{stage}/") and isinstance(metric, EpisodeMean):
                found[key] = metric.compute()
                metric.reset()
        return found

    def _mean(self, key: str, like: Tensor) -> EpisodeMean:
        if key not in self.means:
            self.means[key] = EpisodeMean().to(like.device)
        return self.means[key]  # type: ignore[return-value]


def evaluate_tasks(
    problem: MetaProblem, inner_steps: int, predict: Callable[[Params, Tensor], Tensor] | None, tasks: TaskMap
) -> dict[str, Tensor]:
    """Evaluate each task's query set before and after adaptation.

    Args:
        problem: The problem.
        inner_steps: Number of inner steps.
        predict: ``(params, x) -> prediction``; None to leave predictions out.
        tasks: How to run over the tasks.

    Returns:
        ``loss``, ``loss_before`` and, with ``predict``, ``prediction`` and ``prediction_before``; each with a
        leading task dimension.
    """
    params = {name: value.detach() for name, value in problem.params.items()}
    rates = detached(problem.inner_lr)

    def one(support: Any, query: Any) -> dict[str, Tensor]:
        loss, adapted = adapted_loss(problem.loss, params, rates, support, query, inner_steps)
        found = {"loss": loss, "loss_before": problem.loss(params, query)}
        if predict is not None:
            found |= {"prediction": predict(adapted, query[0]), "prediction_before": predict(params, query[0])}
        return found

    return tasks(one, problem.support, problem.query, in_dims=(0, 0))


class EpisodeHooks:
    """A LightningModule's validation and test: every episode before and after adaptation."""

    episodes: EpisodeEvaluation
    eval_inner_steps: int
    vectorization: Vectorization
    meta_problem: Callable[[Any], MetaProblem]
    predict: Callable[[Params, Tensor], Tensor]
    log: Callable[..., None]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate the episodes of a batch before and after adaptation.

        Args:
            batch: The episodes.
            batch_idx: Index of the batch.
        """
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate the episodes of a batch before and after adaptation.

        Args:
            batch: The episodes.
            batch_idx: Index of the batch.
        """
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log means and confidence intervals over the validation episodes."""
        self._log_episodes("val")

    def on_test_epoch_end(self) -> None:
        """Log means and confidence intervals over the test episodes."""
        self._log_episodes("test")

    def _evaluate(self, stage: str, batch: Any) -> None:
        # Lightning validates in inference mode, whose tensors cannot be differentiated: leave it, and clone
        # the batch, which was made under it.
        with torch.inference_mode(False), torch.no_grad():
            problem = self.meta_problem(tree_map(torch.clone, batch))
            predict = self.predict if self.episodes.metrics is not None else None
            with explained(problem):
                found = evaluate_tasks(problem, self.eval_inner_steps, predict, self.vectorization.tasks)
            self.episodes.update(stage, found, problem.query)

    def _log_episodes(self, stage: str) -> None:
        for key, (mean, half_width) in self.episodes.compute(stage).items():
            self.log(key, mean, prog_bar=key == f"{stage}/loss")
            self.log(f"{key}_ci95", half_width)


def _short_name(metric: Metric) -> str:
    name = type(metric).__name__
    for prefix in ("Multiclass", "Binary", "Multilabel"):
        name = name.removeprefix(prefix)
    return name.lower()
