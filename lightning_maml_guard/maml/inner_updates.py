"""Optimizers of the inner loop, as differentiable functions ``(params, grads, state) -> (params, state)``.

An update moves the parameters as its optimizer does with learning rate 1; the inner loop takes ``inner_lr`` times that
movement. The state is None before a task's first step. The formulas are those of ``torch.optim``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_maml_guard.maml.inner_loop import InnerUpdate, Params
from lightning_maml_guard.utils.checks import check_flag, check_function, check_number, shown


@dataclass(frozen=True)
class Momentum:
    """Gradient descent with (Nesterov) momentum ``m``: ``v <- m*v + g``; the step is ``v``, or ``g + m*v``.

    Args:
        momentum: ``m``, the share of the buffer that is kept, at least 0 and below 1.
        nesterov: Whether the gradient is taken ahead of the step.

    Raises:
        ValueError: If an argument is not allowed.

    Example:
        >>> import torch
        >>> from lightning_maml_guard.maml.inner_updates import Momentum
        >>> update, params, state = Momentum(0.5), {"w": torch.ones(1)}, None
        >>> for _ in range(2):
        ...     params, state = update(params, {"w": torch.full((1,), 0.1)}, state)
        >>> params["w"]
        tensor([0.7500])
    """

    momentum: float = 0.9
    nesterov: bool = False
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share("momentum", self.momentum)
        check_flag("nesterov", self.nesterov)

    def __call__(self, params: Params, grads: Params, state: Params | None) -> tuple[Params, Params]:
        """Take a step."""
        m = self.momentum
        buffer = grads if state is None else {name: m * state[name] + grad for name, grad in grads.items()}
        step = {name: grads[name] + m * each for name, each in buffer.items()} if self.nesterov else buffer
        return {name: value - step[name] for name, value in params.items()}, buffer


@dataclass(frozen=True)
class Adam:
    """Adam with bias correction: the step is ``m_hat / (sqrt(v_hat) + eps)``.

    Args:
        betas: Shares of the first and second moment that are kept, at least 0 and below 1.
        eps: What is added to the root of the second moment, above 0.

    Raises:
        ValueError: If an argument is not allowed.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(
                f"Expected argument `betas` to be two numbers but got {shown(self.betas)}. Pass (0.9, 0.999), say."
            )
        for index, beta in enumerate(self.betas):
            _check_share(f"betas[{index}]", beta)
        check_number("eps", self.eps, above=0)

    def __call__(self, params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        """Take a step."""
        none: tuple[Params, Params, int] = ({}, {}, 0)
        (keep, keep_square), (first, second, taken) = self.betas, state or none
        taken += 1
        first = {name: _kept(keep, first.get(name), grad) for name, grad in grads.items()}
        second = {name: _kept(keep_square, second.get(name), grad * grad) for name, grad in grads.items()}
        mean, square = 1 - keep**taken, 1 - keep_square**taken
        moved = {
            name: value - first[name] / mean / (root(second[name] / square) + self.eps)
            for name, value in params.items()
        }
        return moved, (first, second, taken)


@dataclass(frozen=True)
class RMSprop:
    """RMSprop: the step is ``g / (sqrt(v) + eps)``, or a momentum buffer of these.

    Args:
        alpha: Share of the second moment that is kept, at least 0 and below 1.
        eps: What is added to its root, above 0.
        momentum: Share of the buffer that is kept, at least 0 and below 1.

    Raises:
        ValueError: If an argument is not allowed.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share("alpha", self.alpha)
        check_number("eps", self.eps, above=0)
        _check_share("momentum", self.momentum)

    def __call__(self, params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        """Take a step."""
        none: tuple[Params, Params] = ({}, {})
        second, buffer = state or none
        second = {name: _kept(self.alpha, second.get(name), grad * grad) for name, grad in grads.items()}
        step = {name: grad / (root(second[name]) + self.eps) for name, grad in grads.items()}
        if self.momentum:
            step = {name: each + self.momentum * buffer[name] if buffer else each for name, each in step.items()}
        return {name: value - step[name] for name, value in params.items()}, (second, step)


def _kept(share: float, average: Tensor | None, value: Tensor) -> Tensor:
    added = (1 - share) * value
    return added if average is None else share * average + added


def root(value: Tensor) -> Tensor:
    """Return the square root of a second moment, with derivative 0 where it is 0: a unit that no example reaches.

    There torch's own derivatives are inf times 0. Below the smallest number whose cube a derivative can divide by it
    counts as 0 as well; ``eps`` is far above it.
    """
    seen = value > torch.finfo(value.dtype).tiny ** (2 / 3)
    return torch.where(seen, torch.where(seen, value, torch.ones_like(value)).sqrt(), torch.zeros_like(value))


def _check_share(name: str, value: float) -> None:
    check_number(name, value, least=0, below=1)


def checked_update(update: Any) -> InnerUpdate:
    """Return an inner optimizer's function, or None; raise a TypeError if a value is neither."""
    if update is not None:
        signature, example = "(params, grads, state) -> (params, state)", f"{__name__}.Adam()"
        check_function("inner_update", update, signature, example)
    return update


def beside(update: InnerUpdate) -> InnerUpdate:
    """Make an update of several tasks in a leading dimension: of itself if it is elementwise, else vmapped."""
    return update if update is None or getattr(update, "elementwise", False) else _vmapped(update)


def _vmapped(update: Callable[..., tuple[Params, Any]]) -> InnerUpdate:
    def together(params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        given, spec = tree_flatten(state)
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        left: dict[str, Any] = {}

        def one(params: Params, grads: Params, tensors: list[Tensor]) -> tuple[Params, list[Tensor]]:
            rest = iter(tensors)
            own = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in given]
            moved, after = update(params, grads, tree_unflatten(own, spec))
            leaves, left["spec"] = tree_flatten(after)
            left["leaves"] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            left["is"] = [isinstance(leaf, Tensor) for leaf in leaves]
            return moved, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        moved, kept = torch.func.vmap(one, randomness="different")(params, grads, tensors)
        # A count of steps and the like is the same for all tasks, and no tensor.
        rest = iter(kept)
        leaves = [next(rest) if here else leaf for here, leaf in zip(left["is"], left["leaves"], strict=True)]
        return moved, tree_unflatten(leaves, left["spec"])

    return together
