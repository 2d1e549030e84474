"""Evaluation over episodes: the default loss, and means before and after adaptation, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from lightning_maml_guard.maml.batch_errors import explained
from lightning_maml_guard.maml.inner_loop import Params, adapted_loss
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.sharding.meta_gradient import ShardedMaml
from lightning_maml_guard.utils.checks import check_function
from lightning_maml_guard.utils.shards import any_split
from lightning_maml_guard.utils.task_map import TaskMap, each_task

Predict = Callable[[Params, Tensor], Tensor]


def default_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy for integer targets and the mean squared error otherwise.

    Raises if the shapes of prediction and target do not fit: broadcasting would hide it.
    """
    if not isinstance(prediction, Tensor):
        raise TypeError(
            f"Expected the network to return a tensor but got {type(prediction).__name__}. Return the prediction "
            "alone, or pass a `loss` of your own."
        )
    if not target.is_floating_point():
        expected = prediction.shape[:1] + prediction.shape[2:] if prediction.dim() > 1 else torch.Size()
        if target.shape != expected:
            raise ValueError(
                f"Expected class labels (integer targets) of shape {tuple(expected)} for a prediction of shape "
                f"{tuple(prediction.shape)} but got {tuple(target.shape)} for one task. Squeeze labels to that shape; "
                "for a regression make the targets floats, y.float()."
            )
        return F.cross_entropy(prediction, target)
    if prediction.shape != target.shape:
        raise ValueError(
            f"The network's prediction has shape {tuple(prediction.shape)} and the target {tuple(target.shape)} for "
            "one task; they must agree. Reshape the targets (class labels are integers: y.long()), or pass a `loss` "
            "of your own."
        )
    return F.mse_loss(prediction, target)


def loss_of_each(loss: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of every task; prediction and target have a leading task dimension."""
    if loss is default_loss and target.is_floating_point() and prediction.shape == target.shape:
        return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
    return torch.func.vmap(loss, randomness="different")(prediction, target)


def check_loss(loss: Any) -> None:
    """Raise if a ``loss`` that was given cannot be called on a prediction and a target."""
    if loss is None:
        return
    if isinstance(loss, type):
        raise TypeError(
            f"Expected argument `loss` to be callable, (prediction, target) -> scalar, but got the class "
            f"{loss.__name__}. Pass an instance: {loss.__name__}()."
        )
    check_function("loss", loss, "(prediction, target) -> scalar", "torch.nn.functional.mse_loss")


class EpisodeMean(Metric):
    """Mean of one value per episode, with the half-width of its 95 % confidence interval.

    The half-width is ``1.96 * s / sqrt(n)`` with the sample standard deviation ``s`` over ``n`` episodes, as few-shot
    papers report it.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add one value per episode, of any shape."""
        self.values.append(values.detach().flatten().float())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the half-width (``nan`` for a single episode)."""
        values = dim_zero_cat(self.values)
        if len(values) < 2:
            return values.mean(), torch.full_like(values.mean(), float("nan"))
        return values.mean(), 1.96 * values.std() / len(values) ** 0.5


class EpisodeEvaluation(nn.Module):
    """Accumulates losses and metrics of each stage, one value per episode; metrics are of the episode's query set."""

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

    def evaluate(self, stage: str, problem: MetaProblem, inner_steps: int, predict: Predict, tasks: TaskMap) -> None:
        """Evaluate a batch of episodes and add it to the stage's means."""
        with explained(problem):
            found = evaluate_tasks(problem, inner_steps, None if self.metrics is None else predict, tasks)
        self._mean(f"{stage}/loss", found["loss"]).update(found["loss"])
        self._mean(f"{stage}/loss_before", found["loss"]).update(found["loss_before"])
        if self.metrics is None:
            return
        for suffix in ("", "_before"):
            for prediction, (_, target) in zip(found[f"prediction{suffix}"], each_task(problem.query), strict=True):
                for name, value in self.metrics(prediction, target).items():
                    if value.numel() != 1:
                        raise ValueError(
                            f"The metric {name!r} gave {value.numel()} values for one episode; an interval over "
                            "episodes needs one. Choose an average, such as average='micro'."
                        )
                    self._mean(f"{stage}/{name}{suffix}", value).update(value)
                self.metrics.reset()

    def compute(self, stage: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Return ``(mean, half-width)`` by logged name, and start over."""
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
    problem: MetaProblem, inner_steps: int, predict: Predict | None, tasks: TaskMap
) -> dict[str, Tensor]:
    """Evaluate each task's query set: ``loss`` and ``prediction`` (unless None), after adaptation and ``_before``."""
    if any_split(problem.params.values()):
        return _evaluated_in_pieces(problem, inner_steps, predict)
    params = {name: value.detach() for name, value in problem.params.items()}
    rates = problem.rate_by_step()

    def one(support: Any, query: Any) -> dict[str, Tensor]:
        loss, adapted = adapted_loss(problem.loss, params, rates, support, query, inner_steps, problem.inner_update)
        found = {"loss": loss, "loss_before": problem.loss(params, query)}
        if predict is not None:
            found |= {"prediction": predict(adapted, query[0]), "prediction_before": predict(params, query[0])}
        return found

    return tasks(one, problem.support, problem.query, in_dims=(0, 0))


def _evaluated_in_pieces(problem: MetaProblem, inner_steps: int, predict: Predict | None) -> dict[str, Any]:
    """The same on sharded parameters, one task after another."""
    maml = ShardedMaml.of(problem)
    theta, rows = maml.own.point(), []
    for support, query in zip(each_task(problem.support), each_task(problem.query), strict=True):
        _, adapted = maml.adapt(theta, support, inner_steps)
        row: dict[str, Any] = {}
        for suffix, at in (("", adapted), ("_before", theta)):
            row[f"loss{suffix}"] = maml.value(query, at)
            if predict is not None:
                x = query[0]
                row[f"prediction{suffix}"] = maml.own.call(lambda live, x=x: predict(live, x), at)  # type: ignore[misc]
        rows.append(row)
    found: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: torch.stack(each) if name.startswith("loss") else each for name, each in found.items()}


def _short_name(metric: Metric) -> str:
    name = type(metric).__name__
    for prefix in ("Multiclass", "Binary", "Multilabel"):
        name = name.removeprefix(prefix)
    return name.lower()
