"""Large query sets one after another, behind inner loops that run side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.maml.gradient import gradient
from lightning_maml_guard.maml.inner_loop import InnerRate, Params, TaskLoss, adapt
from lightning_maml_guard.utils.functorch import inside_transform
from lightning_maml_guard.utils.task_map import TaskMap

# Entries of a task's query set from which on a CPU gains nothing from having several at once.
_LARGE = 2**15


def pays(params: Params, query: Any) -> bool:
    """Say whether the query sets of several tasks should go one after another.

    Their activations then stay in a CPU's caches, and are freed before the next set's.

    Args:
        params: Parameters by name.
        query: Several tasks' query data.

    Returns:
        Whether they are large and on a CPU, and nobody differentiates what comes of them.
    """
    leaves = tree_leaves(query)
    if sum(leaf.numel() for leaf in leaves) < _LARGE * len(leaves[0]) or inside_transform():
        return False
    if torch.is_grad_enabled() and any(value.requires_grad for value in params.values()):
        return False
    return all(leaf.device.type == "cpu" for leaf in leaves)


def exact_gradients(
    task_loss: TaskLoss,
    losses: TaskLoss,
    params: Params,
    rates: InnerRate,
    support: Any,
    query: Any,
    *,
    inner_steps: int,
    learn_rates: bool,
    auxiliary: Callable[[Params, Any], Any],
) -> tuple[tuple[Params, Params], tuple[Tensor, Any]]:
    """Compute several tasks' exact meta-gradients: the query sets' gradients, pulled back through all inner loops.

    Args:
        task_loss: Loss of one task.
        losses: The same of several.
        params: ``theta`` of each, shapes ``(tasks, ...)``; not differentiated again.
        rates: Inner rates of each.
        support: Their support data.
        query: Their query data.
        inner_steps: Number of inner steps.
        learn_rates: Also differentiate towards the inner rates (a dict then).
        auxiliary: ``(adapted params, query) -> pytree of tensors`` of one task, passed through.

    Returns:
        What :func:`~lightning_maml_guard.maml.meta_gradient.task_meta_gradient` returns, with a leading task dimension.
    """

    def pulled(theta: Params, alphas: InnerRate) -> tuple[Tensor, tuple[Tensor, Any]]:
        adapted = adapt(losses, theta, support, alphas, inner_steps)
        constant = {name: value.detach() for name, value in adapted.items()}
        gradients, report = TaskMap(looped=True)(at_query, constant, query, in_dims=(0, 0))
        return torch.stack([(value * gradients[name]).sum() for name, value in adapted.items()]).sum(), report

    def at_query(own: Params, data: Any) -> tuple[Params, tuple[Tensor, Any]]:
        def loss(point: Params) -> tuple[Tensor, tuple[Tensor, Any]]:
            value = task_loss(point, data)
            return value, (value, auxiliary(point, data))

        return gradient(loss, own)

    if learn_rates:
        return gradient(lambda point: pulled(*point), (params, cast(Params, rates)))
    found, report = gradient(lambda theta: pulled(theta, rates), params)
    return (found, {}), report
