"""MAML as a LightningModule: MetaLearningModule to subclass, MetaLearning as a mixin for either Lightning package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torchmetrics import Metric, MetricCollection

from lightning_maml_guard.maml.batch_errors import FirstBatch, check_batch, check_task_data, explained
from lightning_maml_guard.maml.compiled import CompiledMetaGradient
from lightning_maml_guard.maml.evaluation import EpisodeEvaluation, check_loss, default_loss
from lightning_maml_guard.maml.inner_loop import InnerUpdate, Params
from lightning_maml_guard.maml.inner_rates import InnerRates, checked_rate
from lightning_maml_guard.maml.inner_updates import checked_update
from lightning_maml_guard.maml.kept_memory import KeptMemory
from lightning_maml_guard.maml.meta_gradient import Auxiliary, meta_gradient, nothing
from lightning_maml_guard.maml.outer_optimizer import AttachGradient, check_factories, make_optimizer
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.maml.stateless_call import NOTHING_TO_TRAIN, StatelessCall, check_network, trainable
from lightning_maml_guard.maml.vectorization import Vectorization, check_strategy
from lightning_maml_guard.sharding.meta_gradient import check_in_pieces
from lightning_maml_guard.theory.multiplier import check_order
from lightning_maml_guard.utils.checks import check_count, check_flag
from lightning_maml_guard.utils.lightning_compat import LightningModule, MixinBase, check_module, hyperparameters_given
from lightning_maml_guard.utils.task_map import TaskMap, each_task

# A checkpoint that holds modules or functions would not load with weights_only.
_NO_HYPERPARAMETERS = ("network", "loss", "optimizer", "lr_scheduler", "metrics", "inner_update")


class MetaLearning(MixinBase):
    """The algorithm of :class:`~lightning_maml_guard.MetaLearningModule`, which lists the arguments, as a mixin.

    Put it before a LightningModule of the package whose Trainer you use; the two packages' modules do not mix.

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
        inner_lr: float | list[float] = 0.01,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        order: str = "exact",
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], Any] | None = None,
        adapt: str | Sequence[str] | None = None,
        learn_inner_lr: bool | str = False,
        inner_update: InnerUpdate = None,
        task_chunk_size: int | None = None,
        metrics: Metric | MetricCollection | None = None,
        vectorize: int | str = "auto",  # LightningCLI tries the types in this order
        compile: bool = False,
        keep_memory: bool = True,
        batched: bool = True,
    ) -> None:
        super().__init__()
        check_module(self, self._package_was_chosen)
        check_network(network, self)
        check_order(order, inner_steps)
        inner_lr = checked_rate(inner_lr, inner_steps, learn_inner_lr)
        check_count("eval_inner_steps", 0 if eval_inner_steps is None else eval_inner_steps, 0)
        for name, value in {"compile": compile, "keep_memory": keep_memory, "batched": batched}.items():
            check_flag(name, value)
        check_loss(loss)
        check_factories(optimizer, lr_scheduler)
        if hyperparameters_given():
            self.save_hyperparameters()  # LightningCLI's configuration: plain values, the network's included
        elif type(self).__init__ is MetaLearning.__init__:  # a subclass with its own arguments saves those
            self.save_hyperparameters(ignore=_NO_HYPERPARAMETERS)
        self.network, self.loss, self.order, self.inner_steps = network, loss or default_loss, order, inner_steps
        self.inner_lr, self.inner_update = inner_lr, checked_update(inner_update)
        self.eval_inner_steps = inner_steps if eval_inner_steps is None else eval_inner_steps
        self.inner_lr_cap: float | None = None  # set by a guard that rescales
        self.outer_lr: float | None = None  # set by a RateSuggestion: the optimizer's rate, whatever its function says
        self.inner_rates = InnerRates(trainable(network), inner_lr, adapt, learn_inner_lr, inner_steps)
        self.learned_rates = self.inner_rates.learned  # registered here, for the optimizer and checkpoints
        self.vectorization = Vectorization(check_strategy(vectorize, task_chunk_size), network, batched)
        self.compiled = CompiledMetaGradient() if compile else None
        self.episodes = EpisodeEvaluation(metrics)
        self.train_metrics = self.episodes.metrics and self.episodes.metrics.clone(prefix="train/")
        self._optimizer, self._lr_scheduler, self._first_batch = optimizer, lr_scheduler, FirstBatch()
        self._call, self._memory = StatelessCall(network), KeptMemory(keep_memory)

    def forward(self, x: Tensor) -> Tensor:
        """Predict one task's outputs from its inputs, without adaptation."""
        return self.predict(self.theta(), x)

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Predict one task's outputs with given parameters, without touching the network's own state."""
        return self._call(self.network, params, x)

    def task_loss(self, params: Params, batch: Any) -> Tensor:
        """Compute the loss of ONE task. Override this for a loss of your own; write it without in-place state.

        Args:
            params: Parameters by name; compute the loss from these, not from the network's own.
            batch: One task's ``(x, y)``.

        Returns:
            The scalar loss.
        """
        check_task_data(batch)
        x, y = batch
        prediction = self.predict(params, x)
        if self.loss is default_loss:
            self._first_batch.check_prediction(prediction)
        return self.loss(prediction, y)

    @property
    def task_map(self) -> TaskMap:
        """How the module runs over the tasks of a batch."""
        return self.vectorization.tasks

    def theta(self) -> Params:
        """Return the network's trainable parameters by name (the live tensors, not copies)."""
        return trainable(self.network)

    def rates(self) -> float | Tensor | Params:
        """Return the inner rates as applied under the guard's cap, as :class:`MetaProblem` takes them."""
        return self.inner_rates.applied(self.theta(), self.inner_lr, self.inner_lr_cap)

    def meta_problem(self, batch: Any) -> MetaProblem:
        """State the problem of the next step, which training and the guard share.

        Args:
            batch: ``(support, query)``, each a pytree of tensors with a leading task dimension, or a list of tasks.

        Returns:
            The problem.

        Raises:
            ValueError: If the batch is no pair.
        """
        check_batch(batch)
        theta = self.theta()
        own = (type(self).task_loss, type(self).predict) == (MetaLearning.task_loss, MetaLearning.predict)
        problem = MetaProblem(
            params=theta,
            task_loss=self.task_loss,
            support=batch[0],
            query=batch[1],
            inner_lr=self.inner_rates.applied(theta, self.inner_lr, self.inner_lr_cap),
            inner_steps=self.inner_steps,
            order=self.order,
            task_chunk_size=self.task_map.chunk_size,
            looped=self.task_map.looped,
            inner_update=self.inner_update,
            task_losses=self.vectorization.task_losses(self.network, self.loss, batch) if own else None,
        )
        self._first_batch.read((problem.support, problem.query))
        return self.vectorization.compared(self.vectorization.sized(problem))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean query loss after adaptation; its backward is the configured meta-gradient."""
        self._memory.step()
        problem = self.meta_problem(batch)
        # The first step, which also checks the batch, is not compiled.
        compute = self.compiled if self.compiled and self._first_batch.passed else meta_gradient
        with explained(problem):
            learned = self.learned_rates is not None
            result = compute(problem, tasks=self.task_map, learn_rates=learned, auxiliary=self._auxiliary())
        self._first_batch.check_losses(problem, result.losses)
        trained = [(parameter, result.gradients[name]) for name, parameter in problem.params.items()]
        trained += self.inner_rates.with_gradients(result.rate_gradients or {}, self.inner_lr_cap)
        loss = result.losses.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=problem.tasks)
        if self.train_metrics is not None:
            self.train_metrics(torch.cat(list(result.auxiliary)), torch.cat([y for _, y in each_task(problem.query)]))
            self.log_dict(self.train_metrics, batch_size=problem.tasks)
        return AttachGradient.apply(loss, [gradient for _, gradient in trained], *(each for each, _ in trained))

    def _auxiliary(self) -> Auxiliary:
        return nothing if self.train_metrics is None else lambda params, query: self.predict(params, query[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate the episodes of a batch before and after adaptation."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Do the same in a test."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Any) -> None:
        # Lightning validates in inference mode, whose tensors cannot be differentiated: leave it, and clone the batch.
        with torch.inference_mode(False), torch.no_grad():
            problem = self.meta_problem(tree_map(torch.clone, batch))
            self.episodes.evaluate(stage, problem, self.eval_inner_steps, self.predict, self.task_map)

    def on_validation_epoch_end(self) -> None:
        """Log means and confidence intervals over the validation episodes."""
        self._log_episodes("val")

    def on_test_epoch_end(self) -> None:
        """Log means and confidence intervals over the test episodes."""
        self._log_episodes("test")

    def _log_episodes(self, stage: str) -> None:
        for key, (mean, half_width) in self.episodes.compute(stage).items():
            self.log(key, mean, prog_bar=key == f"{stage}/loss")
            self.log(f"{key}_ci95", half_width)

    def on_fit_start(self) -> None:
        """Forget the cap a checkpoint held (a guard that rescales sets its own), and keep the memory of the steps."""
        self.inner_lr_cap = None
        check_in_pieces(self.theta(), self.compiled, self.learned_rates, self.inner_update)
        self.vectorization.choose(self.device)
        self._memory.start(self, self.device.type == "cpu")

    def on_fit_end(self) -> None:
        """Give the memory back."""
        self._memory.end(self)

    def configure_optimizers(self) -> Any:
        """Return the optimizer over ``theta`` and the learned inner rates, with the scheduler if there is one."""
        if not self.theta():
            raise ValueError(NOTHING_TO_TRAIN)
        trained = [*self.theta().values(), *(self.learned_rates or [])]
        precision = str(getattr(self._trainer, "precision", ""))
        named = dict(self.named_parameters())
        return make_optimizer(named, trained, self._optimizer, self._lr_scheduler, precision, self.outer_lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the cap a guard holds the inner rate at, so that evaluation adapts as training did."""
        checkpoint["inner_lr_cap"] = self.inner_lr_cap

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the cap of the inner rate."""
        self.inner_lr_cap = checkpoint.get("inner_lr_cap")


class MetaLearningModule(MetaLearning, LightningModule):
    """Model-agnostic meta-learning (Finn et al. 2017) on the tasks of a batch.

    A batch is an ``EpisodeBatch(support=(x, y), query=(x, y))`` or a plain nested tuple of tensors with a leading task
    dimension; where tasks differ in size, each set is a list of tasks, ``[(x_1, y_1), (x_2, y_2), ...]``, over which a
    loop goes. Each training step adapts to every task with ``inner_steps`` steps of gradient descent on its support
    set and hands Lightning the mean meta-gradient of the query losses. Batch norm uses the statistics of its batch, in
    training and evaluation. Training logs ``train/loss``; validation and test log ``{stage}/loss`` and every metric,
    each after adaptation, before it (``_before``), and with the 95 % half-width over the episodes (``_ci95``).

    Args:
        network: The network: ``x -> prediction``. Its trainable parameters are ``theta``.
        loss: ``(prediction, target) -> scalar`` of one task. Default: cross-entropy for integer targets, else MSE.
        inner_lr: The inner learning rate ``alpha``, or a list of one for each inner step.
        inner_steps: Number ``K`` of inner steps in training, at least 1.
        eval_inner_steps: Inner steps in validation and test (default: ``inner_steps``).
        order: Meta-gradient: ``"exact"`` (through the inner loop), ``"first"`` (FOMAML) or ``"simplified"``
            (``g - alpha*H g``, of Takagi et al.).
        optimizer: ``parameters -> optimizer``. Default: Adam with lr 1e-3.
        lr_scheduler: ``optimizer -> scheduler``, stepped every epoch.
        adapt: Names, shell patterns or prefixes of the parameters the inner loop moves (None: all; head only: ANIL).
        learn_inner_lr: Learn inner rates, started at ``inner_lr``: True for one per parameter entry (Meta-SGD),
            ``"per_step"`` for one per parameter and inner step (MAML++; further steps of an evaluation use the last).
        inner_update: The inner loop's optimizer in place of gradient descent: ``(params, grads, state) -> (params,
            state)``, such as ``maml.inner_updates.Adam()``; ``inner_lr`` multiplies its movement.
        task_chunk_size: Tasks vmapped at once; the same as a number for ``vectorize``. Lower it when memory runs out.
        metrics: A torchmetrics metric or collection, updated with the query set's predictions.
        vectorize: How to run over the tasks of a batch: ``"all"`` vmapped at once, a number of them at a time,
            ``"loop"``: one after another; equal up to rounding. ``"auto"`` is ``"all"``, but on a CPU ``"loop"`` for a
            network with a layer of 200,000 weights or more, and else as many tasks as keep 64 MiB for their backward
            (a conv4: 9 of one shot and query); ``LMG_VECTORIZE`` overrides it.
        compile: Run the meta-gradient under ``torch.compile``: a minute or more at the start. Not in a guard's checks.
        keep_memory: During a fit on the CPU (glibc): keep freed memory instead of mapping it anew in every step. The
            environment's ``MALLOC_`` settings go first.
        batched: Run the tasks through stacks of linear layers, layer norms and activations by batched matrix products
            instead of vmap, if the first batch agrees. With few shots exact MAML on a CPU then loops over no tasks.

    Raises:
        TypeError: If the network is not a module, or a function not callable.
        ValueError: If another argument is not allowed, or if the network has nothing to train.

    Example:
        >>> import torch
        >>> from lightning_maml_guard import MetaLearningModule
        >>> from lightning_maml_guard.networks import mlp
        >>> module = MetaLearningModule(mlp(), inner_lr=0.01, order="exact")
        >>> module.meta_problem(((torch.zeros(4, 10, 1),) * 2,) * 2).tasks
        4
    """

    _package_was_chosen = True
