"""MetaLearning: MAML for a LightningModule of either Lightning package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from lightning_maml_guard.kernels.allocator import hold, release, settle, trim
from lightning_maml_guard.maml.batch_errors import (
    LabelRange,
    check_finite_start,
    check_labels,
    check_pair,
    explained,
    label_range,
)
from lightning_maml_guard.maml.compiled import CompiledMetaGradient
from lightning_maml_guard.maml.evaluation import EpisodeEvaluation, EpisodeHooks
from lightning_maml_guard.maml.losses import check_loss, default_loss
from lightning_maml_guard.maml.meta_gradient import AttachGradient, Auxiliary, meta_gradient, nothing
from lightning_maml_guard.maml.optimizers import check_factories, make_optimizer
from lightning_maml_guard.maml.parameter_selection import select
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.maml.vectorization import Vectorization, check_strategy
from lightning_maml_guard.theory.multiplier import check_order, check_rate
from lightning_maml_guard.utils.checks import check_count, check_flag
from lightning_maml_guard.utils.double_backward import BatchStatistics
from lightning_maml_guard.utils.lightning_compat import check_module, hyperparameters_given, inform
from lightning_maml_guard.utils.task_map import TaskMap

Params = dict[str, Tensor]

_PLAIN_ARGUMENTS = (
    "inner_lr",
    "inner_steps",
    "eval_inner_steps",
    "order",
    "adapt",
    "learn_inner_lr",
    "task_chunk_size",
    "vectorize",
    "compile",
    "keep_memory",
)

# Steps of a fit after which its memory has the size it keeps.
_SETTLED_AFTER = 3

_NOTHING_TO_TRAIN = (
    "The network has no parameter to train: it has none at all, or all of them are frozen (requires_grad=False). "
    "Unfreeze at least one."
)


if TYPE_CHECKING:
    from lightning_maml_guard.utils.lightning_compat import LightningModule as _Base
else:
    _Base = object


class MetaLearning(EpisodeHooks, _Base):
    """The algorithm of :class:`~lightning_maml_guard.MetaLearningModule`, which lists the arguments, as a mixin.

    Comes before a LightningModule of the package whose Trainer is used; the two packages' modules do not mix.

    Raises:
        TypeError: If the network is not a module, or a function not callable.
        ValueError: If another argument is not allowed, or if the network has nothing to train.

    Example:
        >>> from pytorch_lightning import LightningModule
        >>> from lightning_maml_guard import MetaLearning
        >>> from lightning_maml_guard.networks import mlp
        >>> class Mine(MetaLearning, LightningModule):
        ...     def on_train_epoch_end(self):
        ...         self.log("epochs", 1.0, reduce_fx="sum")
        >>> Mine(mlp(), inner_lr=0.02).hparams.inner_lr
        0.02
    """

    _package_was_chosen = False

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        order: str = "exact",
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], Any] | None = None,
        adapt: str | Sequence[str] | None = None,
        learn_inner_lr: bool = False,
        task_chunk_size: int | None = None,
        metrics: Metric | MetricCollection | None = None,
        vectorize: int | str = "auto",  # LightningCLI tries the types in this order
        compile: bool = False,
        keep_memory: bool = True,
    ) -> None:
        super().__init__()
        check_module(self, self._package_was_chosen)
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"Expected argument `network` to be a torch.nn.Module but got {type(network).__name__}. Pass an "
                "instance, such as mlp()."
            )
        check_rate(inner_lr, "inner_lr")
        inner_lr = float(inner_lr)  # a NumPy number in a checkpoint would not load with weights_only
        check_order(order, inner_steps)
        if eval_inner_steps is not None:
            check_count("eval_inner_steps", eval_inner_steps, 0)
        check_flag("learn_inner_lr", learn_inner_lr)
        strategy = check_strategy(vectorize, task_chunk_size)
        check_flag("compile", compile)
        check_flag("keep_memory", keep_memory)
        if loss is not None:
            check_loss(loss)
        check_factories(optimizer, lr_scheduler)
        theta = [name for name, value in network.named_parameters() if value.requires_grad]
        if not theta:
            raise ValueError(_NOTHING_TO_TRAIN)
        empty = [name for name, value in network.named_parameters() if value.is_meta]
        if empty:
            raise ValueError(
                f"Expected argument `network` to hold values but got parameters on the meta device: {empty}. Build it "
                "on the CPU, or use network.to_empty(device='cpu') and initialise it."
            )
        if hyperparameters_given():
            self.save_hyperparameters()  # LightningCLI's configuration: plain values, the network's included
        elif type(self).__init__ is MetaLearning.__init__:  # one with arguments of its own saves those
            # Modules and callables stay out: a checkpoint of them would not load with weights_only.
            self.save_hyperparameters(*_PLAIN_ARGUMENTS)
        self.network = network
        self.loss = loss or default_loss
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.eval_inner_steps = inner_steps if eval_inner_steps is None else eval_inner_steps
        self.order = order
        self.adapted_names = select(theta, adapt)
        self.partial = adapt is not None and len(self.adapted_names) < len(theta)
        self.inner_lr_cap: float | None = None
        self.learned_rates: nn.ParameterList | None = None
        if learn_inner_lr:
            values = dict(network.named_parameters())
            self.learned_rates = nn.ParameterList(
                [nn.Parameter(torch.full_like(values[name], inner_lr)) for name in self.adapted_names]
            )
        self.vectorization = Vectorization(strategy, network, f"{type(self).__qualname__}/{type(network).__qualname__}")
        self.compiled = CompiledMetaGradient() if compile else None
        self._keep_memory, self._unsettled = keep_memory, 0
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._has_buffers = next(network.buffers(), None) is not None
        norms = [part for part in network.modules() if isinstance(part, _BatchNorm)]
        self._has_norms, self._norms_track = bool(norms), any(norm.track_running_stats for norm in norms)
        self._started = False
        self._labels: LabelRange | None = None
        self.episodes = EpisodeEvaluation(metrics)
        self.train_metrics = self.episodes.metrics and self.episodes.metrics.clone(prefix="train/")

    def forward(self, x: Tensor) -> Tensor:
        """Predict without adaptation.

        Args:
            x: One task's inputs.

        Returns:
            The network's prediction.
        """
        return self.predict(self.theta(), x)

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Predict with given parameters, without touching the network's own state.

        Args:
            params: Parameters by name.
            x: One task's inputs.

        Returns:
            The prediction.
        """
        buffers = {name: value.clone() for name, value in self.network.named_buffers()} if self._has_buffers else {}
        stateless = self._norms_track or (self._has_norms and torch.is_autocast_enabled(x.device.type))
        with BatchStatistics() if stateless else nullcontext():
            return torch.func.functional_call(self.network, {**params, **buffers}, (x,))

    def task_loss(self, params: Params, batch: Any) -> Tensor:
        """Compute the loss of ONE task: the point to override, written without in-place state.

        Args:
            params: Parameters by name; compute the loss from these, not from the network's own.
            batch: One task's ``(x, y)``.

        Returns:
            The scalar loss.
        """
        check_pair(
            "one task's `support` and `query`",
            batch,
            "the pair (x, y)",
            "Bring the batch into that form, or override `task_loss` for other data.",
        )
        x, y = batch
        prediction = self.predict(params, x)
        if self._labels is not None and self.loss is default_loss and isinstance(prediction, Tensor):
            check_labels(self._labels, prediction.shape[min(1, prediction.dim() - 1)])
        return self.loss(prediction, y)

    @property
    def task_map(self) -> TaskMap:
        """How the tasks of a batch are run over."""
        return self.vectorization.tasks

    def theta(self) -> Params:
        """Collect the network's trainable parameters.

        Returns:
            The live parameters by name.
        """
        return {name: value for name, value in self.network.named_parameters() if value.requires_grad}

    def rates(self) -> float | Params:
        """Read the inner rates as they are applied.

        Returns:
            ``alpha``, or one tensor an adapted parameter.
        """
        if self.learned_rates is not None:
            theta, factor = self.theta(), self._rate_factor()
            learned = zip(self.adapted_names, self.learned_rates, strict=True)
            return {name: rate * factor for name, rate in learned if name in theta}
        alpha = self.inner_lr if self.inner_lr_cap is None else min(self.inner_lr, self.inner_lr_cap)
        if self.partial:
            theta = self.theta()
            return {name: theta[name].new_tensor(alpha) for name in self.adapted_names if name in theta}
        return alpha

    def _rate_factor(self) -> float:
        """One factor brings the largest learned rate down to the cap."""
        if self.inner_lr_cap is None or self.learned_rates is None:
            return 1.0
        highest = max(float(rate.detach().max()) for rate in self.learned_rates)
        return min(1.0, self.inner_lr_cap / highest) if highest > 0 else 1.0

    def meta_problem(self, batch: Any) -> MetaProblem:
        """State the coming step's problem; what training and the guard share.

        Args:
            batch: ``(support, query)``, each a pytree of tensors with a leading task dimension.

        Returns:
            The problem.

        Raises:
            ValueError: If the batch is not a pair.
        """
        check_pair(
            "a batch",
            batch,
            "an EpisodeBatch(support=(x, y), query=(x, y)) or such a nested tuple",
            "Let the loader (its collate_fn) return that; TaskDataModule does.",
        )
        support, query = batch
        # Read once, before the first step: on a GPU a label out of range would end the process's CUDA context.
        self._labels = None if self._started else label_range(batch)
        return MetaProblem(
            params=self.theta(),
            task_loss=self.task_loss,
            support=support,
            query=query,
            inner_lr=self.rates(),
            inner_steps=self.inner_steps,
            order=self.order,
            task_chunk_size=self.task_map.chunk_size,
            looped=self.task_map.looped,
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the mean query loss; its backward is the configured meta-gradient.

        Args:
            batch: The episodes.
            batch_idx: Index of the batch.

        Returns:
            The mean query loss after adaptation.
        """
        if self._unsettled:
            self._unsettled -= 1
            if not self._unsettled:
                settle()
        problem = self.meta_problem(batch)
        learned = self.learned_rates is not None
        with explained(problem):
            chosen = self.vectorization.decide(
                problem, lambda tasks: meta_gradient(problem, tasks=tasks, learn_rates=learned).gradients
            )
            # Compiled from the second step on: the first one also checks the batch.
            compute = self.compiled if self.compiled is not None and self._started else meta_gradient
            result = compute(problem, tasks=self.task_map, learn_rates=learned, auxiliary=self._auxiliary())
        if chosen is not None:
            trim()  # some strategies take more than the one that was chosen
            inform(chosen)
        if not self._started:
            check_finite_start(problem, result.losses)
            self._started = True
        parameters, gradients = list(problem.params.values()), list(result.gradients.values())
        if self.learned_rates is not None and result.rate_gradients is not None:
            factor = self._rate_factor()
            for name, rate in zip(self.adapted_names, self.learned_rates, strict=True):
                if name in result.rate_gradients:
                    parameters.append(rate)
                    gradients.append(factor * result.rate_gradients[name])
        loss = result.losses.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=problem.tasks)
        if self.train_metrics is not None:
            self.train_metrics(result.auxiliary.flatten(0, 1), problem.query[1].flatten(0, 1))
            self.log_dict(self.train_metrics, batch_size=problem.tasks)
        return AttachGradient.apply(loss, gradients, *parameters)

    def _auxiliary(self) -> Auxiliary:
        return nothing if self.train_metrics is None else self._query_predictions

    def _query_predictions(self, params: Params, query: Any) -> Tensor:
        return self.predict(params, query[0])

    def on_fit_start(self) -> None:
        """Forget a cap that a checkpoint held: a guard that rescales sets its own. Keep the memory of the steps."""
        self.inner_lr_cap = None
        self.vectorization.reopen()
        kept = self._keep_memory and self.device.type == "cpu" and hold(self)
        self._unsettled = _SETTLED_AFTER if kept else 0

    def on_fit_end(self) -> None:
        """Give the memory back."""
        release(self)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over ``theta`` and the learned inner rates.

        Returns:
            The optimizer, or what Lightning takes for an optimizer with a scheduler.

        Raises:
            ValueError: If everything was frozen.
            TypeError: If ``optimizer`` or ``lr_scheduler`` returned something else.
        """
        if not self.theta():
            raise ValueError(_NOTHING_TO_TRAIN)
        trained = [*self.theta().values(), *(self.learned_rates or [])]
        precision = str(getattr(self._trainer, "precision", ""))
        return make_optimizer(dict(self.named_parameters()), trained, self._optimizer, self._lr_scheduler, precision)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the cap a guard holds the inner rate at, so that evaluation adapts as training did, and the strategy.

        Args:
            checkpoint: The checkpoint to write to.
        """
        checkpoint["inner_lr_cap"] = self.inner_lr_cap
        checkpoint["vectorize"] = self.vectorization.chosen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the cap of the inner rate, and the strategy.

        Args:
            checkpoint: The checkpoint to read from.
        """
        self.inner_lr_cap = checkpoint.get("inner_lr_cap")
        self.vectorization.chosen = checkpoint.get("vectorize")
