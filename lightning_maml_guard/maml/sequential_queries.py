"""Exact meta-gradients whose query sets run one after another, behind inner loops that are vmapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.maml.inner_loop import InnerRate, InnerUpdate, Params, TaskLoss, adapt, gradient
from lightning_maml_guard.utils.functorch import inside_transform
from lightning_maml_guard.utils.task_map import TaskMap

# Entries of a task's query set from which a CPU gains nothing by running several at once.
_LARGE = 2**15


def is_worthwhile(params: Params, query: Any) -> bool:
    """Return True if the query sets are large and on a CPU, and the result is not differentiated again.

    One after another, their activations stay in the CPU's caches and are freed before the next set's.
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
    update: InnerUpdate = None,
) -> tuple[tuple[Params, Any], tuple[Tensor, Any]]:
    """Return what ``task_meta_gradient`` does, of several tasks: the query gradients, pulled back through all loops.

    ``task_loss`` is of one task, ``losses`` of several; parameters, rates and data have a leading task dimension.
    """

    def pulled(theta: Params, alphas: InnerRate) -> tuple[Tensor, tuple[Tensor, Any]]:
        adapted = adapt(losses, theta, support, alphas, inner_steps, update)
        constant = {name: value.detach() for name, value in adapted.items()}
        gradients, report = TaskMap(looped=True)(at_query, constant, query, in_dims=(0, 0))
        return torch.stack([(value * gradients[name]).sum() for name, value in adapted.items()]).sum(), report

    def at_query(own: Params, data: Any) -> tuple[Params, tuple[Tensor, Any]]:
        def loss(point: Params) -> tuple[Tensor, tuple[Tensor, Any]]:
            value = task_loss(point, data)
            return value, (value, auxiliary(point, data))

        return gradient(loss, own)

    if learn_rates:
        return gradient(lambda point: pulled(*point), (params, cast(Any, rates)))
    found, report = gradient(lambda theta: pulled(theta, rates), params)
    return (found, {}), report
