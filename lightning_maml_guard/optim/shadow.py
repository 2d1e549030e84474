"""An optimizer's step on copies of its parameters and state: the live ones stay as they are."""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, SparseAdam

from lightning_maml_guard.linalg.layout import Params, real_pairs, unpaired
from lightning_maml_guard.linalg.operators import Operator
from lightning_maml_guard.optim.stability_limits import Optimizers, listed, unwrap
from lightning_maml_guard.utils.shards import split_like

# Clips the `.grad` of a copy's parameters in place; a hook gets the copy itself and, beside each of its parameters, the
# live one it stands for.
Clip = Callable[[list[nn.Parameter]], None]
ClipHook = Callable[[Optimizer, list[tuple[nn.Parameter, Tensor]]], None]


class ShadowOptimizer:
    """A copy of an optimizer that steps copies of its parameters, at ``factor`` times its learning rates.

    Of several optimizers each is copied, and they step one after another on the same copies. With ``runs``, every copy
    has that many entries in a leading dimension, which suits optimizers that step each entry by itself (``BY_ENTRY``).
    Raises a ClosureError if an optimizer needs a closure, so that one gradient does not make a step.
    """

    def __init__(self, optimizers: Optimizers, params: Params, factor: float = 1.0, runs: int | None = None) -> None:
        self._live, self._runs = params, runs
        self.params = {name: self._spread(value, value) for name, value in params.items()}
        self._moved: dict[str, nn.Parameter] = {}
        self._copies = [self._copy(each, factor) for each in listed(optimizers)]

    def _copy(self, optimizer: Optimizer, factor: float) -> tuple[Optimizer, list[str]]:
        """Copy one optimizer; returns the copy and the names of the parameters it moves."""
        check_no_closure(optimizer)
        names, twins = {id(value): name for name, value in self._live.items()}, dict[int, Any]()
        own: list[str] = []
        for group in optimizer.param_groups:
            own += [names[id(each)] for each in group["params"] if id(each) in names]
            self._group(group, names, factor, twins)
        return self._twin(optimizer, names, twins), own

    def _group(self, group: dict[str, Any], names: dict[int, str], factor: float, twins: dict[int, Any]) -> None:
        """Copy a parameter group, at a factor on its rate, and the parameters in it that are known by name."""
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is not None and name not in self._moved:
                self._moved[name] = nn.Parameter(self._spread(parameter, parameter))
                self.params[name] = self._moved[name].detach()
            if name is not None:
                twins[id(parameter)] = self._moved[name]
        moved = [twins[id(each)] for each in group["params"] if id(each) in names]
        rest = {key: _cloned(value) for key, value in group.items() if key != "params"}
        twins[id(group)] = {**rest, "lr": rest["lr"] * factor, "params": moved}

    def _twin(self, optimizer: Optimizer, names: dict[int, str], twins: dict[int, Any]) -> Optimizer:
        """Copy an optimizer whose groups may have twins, and those that it steps: of what they share there is one twin.

        The instance's own `step` (a scheduler's counter) and hooks (an LR cap's) belong to the live one; whatever else
        a step may write into is copied.
        """
        shadow = twins[id(optimizer)] = object.__new__(type(optimizer))
        shadow._optimizer_step_pre_hooks, shadow._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        for group in optimizer.param_groups:
            if id(group) not in twins:  # of a wrapped optimizer: the rate of the one that wraps it is another
                self._group(group, names, 1.0, twins)
        held = vars(optimizer)
        if "param_groups" in held and id(held["param_groups"]) not in twins:
            twins[id(held["param_groups"])] = [twins[id(each)] for each in optimizer.param_groups]
        if "state" in held and id(held["state"]) not in twins:
            twins[id(held["state"])] = self._state(held["state"], names, twins)
        for key, value in held.items():
            if key != "step" and key not in vars(shadow):
                vars(shadow)[key] = self._within(value, names, twins)
        return shadow

    def _state(self, live: dict[Any, Any], names: dict[int, str], twins: dict[int, Any]) -> dict[Any, Any]:
        """Copy an optimizer's state: of the parameters that are known by name, and of what is none."""
        state = defaultdict[Any, Any](dict)
        for key, known in live.items():
            if not isinstance(key, Tensor):
                state[key] = self._within(known, names, twins)
            elif id(key) in names:
                state[twins[id(key)]] = {
                    name: _cloned(value) if name in _COUNTERS else self._spread(_cloned(value), key)
                    for name, value in known.items()
                }
        return state

    def _within(self, value: Any, names: dict[int, str], twins: dict[int, Any]) -> Any:
        """Copy what an optimizer holds."""
        if id(value) in twins:
            return twins[id(value)]
        if isinstance(value, Optimizer):
            return self._twin(value, names, twins)
        if type(value) in _CONTAINERS:
            twin = twins[id(value)] = copy.copy(value)
            twin.clear()
            if isinstance(value, dict):
                twin.update((self._within(k, names, twins), self._within(v, names, twins)) for k, v in value.items())
            else:
                twin.extend(self._within(each, names, twins) for each in value)
            return twin
        if isinstance(value, tuple):
            held = [self._within(each, names, twins) for each in value]
            return type(value)(*held) if hasattr(value, "_fields") else tuple(held)
        return _copied(value)

    def _spread(self, value: Any, parameter: Tensor) -> Any:
        """Copy a parameter, or a state of its shape, for every run."""
        if not isinstance(value, Tensor) or value.shape != parameter.shape or self._runs is None:
            return value.detach().clone() if value is parameter else value
        return value.detach().expand(self._runs, *value.shape).clone()

    def keep(self, runs: Tensor) -> None:
        """Go on with some of the runs, by their indices."""
        for name, value in self.params.items():
            if name not in self._moved:
                self.params[name] = value[runs]
        for name, replica in self._moved.items():
            shape = replica.shape
            replica.data = replica.data[runs]
            replica.grad = None
            self.params[name] = replica.detach()
            for shadow, _ in self._copies:
                for key, value in shadow.state.get(replica, {}).items():
                    if isinstance(value, Tensor) and value.shape == shape:
                        shadow.state[replica][key] = value[runs]

    def set_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Step with other settings, by parameter group, of one optimizer after another."""
        own = [group for shadow, _ in self._copies for group in shadow.param_groups]
        for group, settings in zip(own, groups, strict=True):
            group.update(settings)

    def owned(self) -> list[tuple[Optimizer, list[str]]]:
        """List the copies with the names of the parameters that each moves."""
        return self._copies

    def step(self, gradient: Params, clip: Clip | None = None, hook: ClipHook | None = None) -> None:
        """Step along a gradient, by name; ``clip`` and ``hook`` clip the parameters' ``.grad``, as the run does."""
        for name, replica in self._moved.items():
            replica.grad = split_like(gradient[name].to(replica.dtype).clone(), replica)
        for shadow, own in self._copies:
            for name in own if isinstance(shadow, SparseAdam) else ():
                dense = self._moved[name].grad
                self._moved[name].grad = None if dense is None else dense.to_sparse(1)
            if clip is not None:
                clip([self._moved[name] for name in own])
            if hook is not None:
                hook(shadow, [(self._moved[name], self._live[name]) for name in own])
            try:
                type(shadow).step(shadow)
            except Exception:
                if _asks_for_closure(shadow):
                    _ASKING.add(type(shadow))
                    check_no_closure(shadow)
                raise


# Entries of an optimizer's state that are one number, also of a parameter that is one number.
_COUNTERS = frozenset({"step", "mu_product"})
# Kinds whose steps were seen to need a closure although it is None by default.
_ASKING: WeakSet[type[Optimizer]] = WeakSet()
# What is copied with all that it holds.
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, Counter, list, deque})
# Optimizers whose step treats every entry by itself, and whose movement is in proportion to their rate.
BY_ENTRY = (SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta)


class ClosureError(TypeError):
    """The optimizer's step evaluates the loss itself."""


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether a step of an optimizer evaluates the loss itself, as LBFGS does."""
    kind = type(unwrap(optimizer))
    closure = inspect.signature(kind.step).parameters.get("closure")
    return kind in _ASKING or (closure is not None and closure.default is inspect.Parameter.empty)


def _asks_for_closure(shadow: Optimizer) -> bool:
    """Whether a step that failed without a closure fails so again, and not with one; None is torch's default for it."""
    calls = []

    def closure() -> Any:
        calls.append(1)
        return torch.zeros(())

    with suppress(Exception):  # the step's own error is raised by the caller
        type(shadow).step(shadow)
        return False  # what failed has passed, as a lack of memory may
    with suppress(Exception):
        type(shadow).step(shadow, closure)
        return bool(calls)
    return False


def check_no_closure(optimizer: Optimizer) -> None:
    """Raise a ClosureError if one gradient does not make a step of this optimizer."""
    if needs_closure(optimizer):
        raise ClosureError(f"{type(unwrap(optimizer)).__name__} needs a closure for a step.")


def next_update(optimizers: Optimizers, params: Params, gradient: Params) -> Params | None:
    """Compute the update ``u`` of the next step, ``theta <- theta - u``, on copies of parameters and state.

    The gradient is the one given: neither accumulated nor clipped. ``u`` is 0 for parameters the optimizer does not
    hold; None for an optimizer that needs a closure.
    """
    try:
        shadow = ShadowOptimizer(optimizers, params)
        shadow.step(gradient)
    except ClosureError:
        return None
    return {name: value.detach() - shadow.params[name] for name, value in params.items()}


def predicted_change(
    jacobian: Operator | None, optimizers: Optimizers | None, beta: float, params: Params
) -> Tensor | None:
    """Predict the change of the loss over the next step ``u``, ``-1/2 (g + g').u``, with one gradient; None if unknown.

    The operator holds the gradient ``g`` and can evaluate the one after the step, ``g'``. Without an optimizer the step
    is plain SGD's at ``beta``.
    """
    if jacobian is None or math.isnan(beta) or jacobian.batch:
        return None
    gradient = jacobian.gradient
    update: Tensor = beta * gradient
    if optimizers is not None:
        found = next_update(optimizers, params, unpaired(jacobian.layout.split(gradient), params))
        if found is None:
            return None
        update = jacobian.layout.flatten(real_pairs(found)).to(gradient)
    return jacobian.layout.space.total(-0.5 * ((gradient + jacobian.gradient_after(update)) @ update))


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    if isinstance(leaf, torch.Generator):
        return leaf.clone_state()
    states = (set, random.Random, np.random.Generator, np.random.RandomState)
    return copy.deepcopy(leaf) if isinstance(leaf, states) else leaf


def _cloned(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return copy.copy(value)
    # The momentum of sparse gradients is sparse; those of a shadow are dense.
    return value.detach().to_dense() if value.is_sparse else value.detach().clone()
