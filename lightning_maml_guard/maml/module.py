"""MetaLearningModule: MAML as a LightningModule to subclass."""

from __future__ import annotations

from lightning_maml_guard.maml.meta_learning import MetaLearning
from lightning_maml_guard.utils.lightning_compat import LightningModule


class MetaLearningModule(MetaLearning, LightningModule):
    """Model-agnostic meta-learning (Finn et al. 2017) on the tasks of a batch.

    A batch is an ``EpisodeBatch(support=(x, y), query=(x, y))`` or a plain nested tuple of tensors with a
    leading task dimension. Each training step adapts to every task with ``inner_steps`` steps of gradient
    descent on its support set and hands Lightning the mean meta-gradient of the query losses. Batch norm
    uses the statistics of its batch, in training and evaluation. Training logs ``train/loss``;
    validation and test log ``{stage}/loss`` and every metric, each after adaptation, before it
    (``_before``), and with the 95 % half-width over the episodes (``_ci95``).

    Args:
        network: The network: ``x -> prediction``. Its trainable parameters are ``theta``.
        loss: ``(prediction, target) -> scalar`` of one task. Default: cross-entropy for integer targets,
            else the mean squared error.
        inner_lr: The inner rate ``alpha``.
        inner_steps: Number ``K`` of inner steps in training, at least 1.
        eval_inner_steps: Inner steps in validation and test (default: ``inner_steps``).
        order: Meta-gradient: ``"exact"`` (through the inner loop), ``"first"`` (FOMAML) or ``"simplified"``
            (the poster's ``g - alpha*H g``).
        optimizer: ``parameters -> optimizer``. Default: Adam with lr 1e-3.
        lr_scheduler: ``optimizer -> scheduler``, stepped every epoch.
        adapt: Names, shell patterns or prefixes of the parameters the inner loop moves (None: all; only
            the head: ANIL).
        learn_inner_lr: Learn one inner rate a parameter entry, started at ``inner_lr`` (Meta-SGD).
        task_chunk_size: Tasks vmapped at once; the same as a number for ``vectorize``. Lower it when memory runs out.
        metrics: A torchmetrics metric or collection, updated with the query set's predictions.
        vectorize: How to run over the tasks of a batch: ``"all"`` vmapped at once, a number of them at a time,
            ``"loop"``: one after another; the gradients are the same. ``"auto"`` tries these on the first batch of
            a fit (seconds), keeps the fastest, says so once, and keeps the choice in ``~/.cache`` so that the next
            run on this machine is the same to the last bit. The environment variable ``LMG_VECTORIZE`` decides
            instead of the trial (``rule``, ``loop``, ``all`` or a number). Large query sets of exact MAML go one
            after another on a CPU in any case.
        compile: Run the meta-gradient under ``torch.compile``: a minute or more at the start, then small networks
            take a fraction of the time. The guard measures without.
        keep_memory: During a fit on the CPU (glibc): keep freed memory in the process instead of mapping it anew in
            every step, which makes up to a third of a convolutional network's. Given back at the end of the fit; the
            environment's ``MALLOC_`` settings and preloaded allocators go first.

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
