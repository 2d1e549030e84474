"""The step an optimizer is about to take, without taking it."""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.linalg.operators import Operator
from lightning_maml_guard.optim.stability_limits import unwrap

Clip = Callable[[list[nn.Parameter]], None]


class Twin:
    """An optimizer's double: it steps copies of parameters and state, and leaves the live ones as they are.

    Args:
        optimizer: The live optimizer.
        params: Its parameters, by name.
        factor: Factor on its learning rates.

    Raises:
        ClosureError: If the optimizer needs a closure, so that one gradient does not make a step.
    """

    def __init__(self, optimizer: Optimizer, params: Params, factor: float = 1.0) -> None:
        optimizer = unwrap(optimizer)
        refuse_closures(optimizer)
        names = {id(value): name for name, value in params.items()}
        self.params = {name: value.detach().clone() for name, value in params.items()}
        self._optimizer = twin = object.__new__(type(optimizer))
        twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        twin.state, twin.param_groups = defaultdict(dict), []
        self._moved: dict[str, nn.Parameter] = {}
        for group in optimizer.param_groups:
            moved = []
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    continue
                replica = nn.Parameter(parameter.detach().clone())
                self.params[name] = replica.detach()
                self._moved[name] = replica
                moved.append(replica)
                if parameter in optimizer.state:
                    twin.state[replica] = {key: _cloned(value) for key, value in optimizer.state[parameter].items()}
            rest = {key: _cloned(value) for key, value in group.items() if key != "params"}
            twin.param_groups.append({**rest, "lr": rest["lr"] * factor, "params": moved})
        replicas: dict[int, Tensor] = {id(params[name]): replica for name, replica in self._moved.items()}
        # The instance's own `step` (a scheduler's counter) and hooks (a governor's) belong to the live one; whatever
        # else a step may write into is doubled.
        rest = {key: value for key, value in optimizer.__dict__.items() if key != "step" and key not in twin.__dict__}
        twin.__dict__.update(tree_map(lambda leaf: _doubled(leaf, replicas), rest))

    def step(self, gradient: Params, clip: Clip | None = None) -> None:
        """Step.

        Args:
            gradient: The gradient, by name.
            clip: Clips the ``.grad`` of a list of parameters in place, as the run does.
        """
        for name, replica in self._moved.items():
            replica.grad = gradient[name].to(replica.dtype).clone()
        if clip is not None:
            clip(list(self._moved.values()))
        type(self._optimizer).step(self._optimizer)


class ClosureError(TypeError):
    """The optimizer's step evaluates the loss itself."""


def refuse_closures(optimizer: Optimizer) -> None:
    """Refuse an optimizer of which one gradient does not make a step.

    Args:
        optimizer: The optimizer.

    Raises:
        ClosureError: If its step needs a closure.
    """
    closure = inspect.signature(type(unwrap(optimizer)).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ClosureError(f"{type(unwrap(optimizer)).__name__} needs a closure for a step.")


def coming_update(optimizer: Optimizer, params: Params, gradient: Params) -> Params | None:
    """Compute the update ``u`` of the coming step, ``theta <- theta - u``, on copies of parameters and state.

    The gradient is the one given: neither accumulated nor clipped.

    Args:
        optimizer: The live optimizer; left as it is.
        params: Its parameters, by name.
        gradient: Their gradient, by name.

    Returns:
        ``u`` by name, 0 for parameters the optimizer does not hold; None for an optimizer that needs a closure.
    """
    try:
        twin = Twin(optimizer, params)
    except ClosureError:
        return None
    twin.step(gradient)
    return {name: value.detach() - twin.params[name] for name, value in params.items()}


def predicted_change(
    jacobian: Operator | None, optimizer: Optimizer | None, beta: float, params: Params
) -> Tensor | None:
    """Predict the change of the loss over the coming step, ``-g.u + 1/2 u.J.u``, with one product.

    Args:
        jacobian: The operator ``J``, which holds the gradient ``g``; None where it could not be measured.
        optimizer: The live optimizer; None for plain SGD.
        beta: Its rate, or that of plain SGD; ``nan`` if none was given.
        params: The live parameters, by name.

    Returns:
        The change, a scalar on the device; None where the coming update is not known.
    """
    if jacobian is None or math.isnan(beta) or jacobian.batch:
        return None
    gradient = jacobian.gradient
    update: Tensor = beta * gradient
    if optimizer is not None:
        found = coming_update(optimizer, params, jacobian.layout.split(gradient))
        if found is None:
            return None
        update = jacobian.layout.flatten(found).to(gradient)
    return -(gradient @ update) + 0.5 * (update @ jacobian(update))


def _doubled(leaf: Any, replicas: dict[int, Tensor]) -> Any:
    if isinstance(leaf, Tensor):
        return replicas[id(leaf)] if id(leaf) in replicas else leaf.detach().clone()
    if isinstance(leaf, torch.Generator):
        return leaf.clone_state()
    states = (set, random.Random, np.random.Generator, np.random.RandomState)
    return copy.deepcopy(leaf) if isinstance(leaf, states) else leaf


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
