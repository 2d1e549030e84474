"""How far each optimizer of ``torch.optim`` can be pushed before an eigendirection grows.

With learning rate ``beta``, preconditioner ``P`` and the Jacobian ``J`` of the gradient field, the update
is stable iff ``beta * lambda_max(P^-1 J) < c``. Sources: the poster (SGD, ``c = 2``); Cohen et al. 2021,
"Gradient descent on neural networks typically occurs at the edge of stability", and 2022, "Adaptive
gradient methods at the edge of stability" (momentum, and Adam's ``38/eta``). The adaptive rows hold for a
frozen second moment ``v``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop


class UnknownOptimizerError(ValueError):
    """The optimizer's stability limit is not known here, and a guess would be worse than none."""


def _sgd(group: dict[str, Any]) -> float:
    momentum = float(group["momentum"])
    if group["nesterov"]:
        return 2 * (1 + momentum) / (1 + 2 * momentum)
    # torch applies dampening to the momentum buffer alone: without momentum it has no effect.
    dampening = float(group["dampening"]) if momentum else 0.0
    return 2 * (1 + momentum) / (1 - dampening)


def _adam(group: dict[str, Any]) -> float:
    beta1 = float(group["betas"][0])
    return 2 * (1 + beta1) / (1 - beta1)


def _nadam(group: dict[str, Any]) -> float:
    beta1 = float(group["betas"][0])
    return 2 * (1 + beta1) / ((1 - beta1) * (1 + 2 * beta1))


def _rmsprop(group: dict[str, Any]) -> float:
    return 2 * (1 + float(group["momentum"]))


def _bias_corrected(state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
    if "exp_avg_sq" not in state:
        return None
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    return (second / correction).sqrt() + group["eps"]


def _rms(state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
    if "square_avg" not in state:
        return None
    second = state["square_avg"]
    if group["centered"]:
        second = second - state["grad_avg"] ** 2
    return second.clamp(min=0).sqrt() + group["eps"]


def _adagrad(state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
    if "sum" not in state or float(state["step"]) == 0:
        return None
    return state["sum"].sqrt() + group["eps"]


@dataclass(frozen=True)
class _Row:
    limit: Callable[[dict[str, Any]], float]
    preconditioner: Callable[[dict[str, Any], dict[str, Any]], Tensor | None] | None = None


_TABLE: dict[type[Optimizer], _Row] = {
    SGD: _Row(_sgd),
    Adam: _Row(_adam, _bias_corrected),
    AdamW: _Row(_adam, _bias_corrected),
    NAdam: _Row(_nadam, _bias_corrected),
    RMSprop: _Row(_rmsprop, _rms),
    Adagrad: _Row(lambda group: 2.0, _adagrad),
}


def stability_limit(optimizer: Optimizer) -> float:
    """Look up the stability limit ``c`` of an optimizer: stable iff ``beta * lambda_max(P^-1 J) < c``.

    ====================================  ==========================================
    optimizer                             c
    ====================================  ==========================================
    SGD, momentum m, dampening d          2(1+m)/(1-d)
    SGD with Nesterov momentum m          2(1+m)/(1+2m)
    Adam, AMSGrad, AdamW                  2(1+b1)/(1-b1)       (38 at b1 = 0.9)
    NAdam                                 2(1+b1)/((1-b1)(1+2*b1))
    RMSprop with momentum m               2(1+m)
    Adagrad                               2
    ====================================  ==========================================

    Args:
        optimizer: An optimizer of ``torch.optim`` (Lightning's wrapper around one is looked through).

    Returns:
        The limit; with several parameter groups, the smallest of theirs.

    Raises:
        UnknownOptimizerError: If the optimizer is not in the table (a subclass may step differently, so it
            does not count), if it maximises, or if it decays
            its rate by itself (Adagrad's ``lr_decay``).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> stability_limit(torch.optim.SGD([weight], lr=0.1)), stability_limit(torch.optim.Adam([weight]))
        (2.0, 38.0)
    """
    optimizer = unwrap(optimizer)
    row = _row(optimizer)
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise UnknownOptimizerError(
            f"{type(optimizer).__name__}(maximize=True) climbs the loss: no learning rate is stable at a minimum. "
            "Minimise the negated objective instead."
        )
    if any(group.get("lr_decay") for group in optimizer.param_groups):
        raise UnknownOptimizerError(
            f"{type(optimizer).__name__} with lr_decay applies a rate that is not its `lr`, so nothing is said about "
            "it. Use lr_decay=0 with a scheduler; the inner rate is still checked."
        )
    return min(row.limit(group) for group in optimizer.param_groups)


def preconditioner(optimizer: Optimizer) -> dict[Tensor, Tensor | None]:
    """Read the diagonal preconditioner ``P`` an optimizer holds at this moment.

    ``P`` is ``sqrt(v_hat) + eps`` for Adam, AdamW, AMSGrad and NAdam (``v_hat`` the bias-corrected second
    moment, AMSGrad's maximum), ``sqrt(v) + eps`` for RMSprop and Adagrad, and 1 for SGD.

    Args:
        optimizer: An optimizer that :func:`stability_limit` knows.

    Returns:
        For each parameter a tensor of its shape, or ``None`` where the optimizer has no second moment yet
        (before its first step).

    Raises:
        UnknownOptimizerError: If the optimizer is not known.
    """
    optimizer = unwrap(optimizer)
    row = _row(optimizer)
    found: dict[Tensor, Tensor | None] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if row.preconditioner is None:
                found[parameter] = torch.ones_like(parameter)
            else:
                found[parameter] = row.preconditioner(optimizer.state.get(parameter, {}), group)
    return found


def is_preconditioned(optimizer: Optimizer) -> bool:
    """Say whether the optimizer scales each parameter by its own second moment (Adam and its like).

    Args:
        optimizer: An optimizer that :func:`stability_limit` knows.

    Returns:
        True for the adaptive optimizers, False for SGD.

    Raises:
        UnknownOptimizerError: If the optimizer is not known.
    """
    return _row(unwrap(optimizer)).preconditioner is not None


def decoupled_decay(group: dict[str, Any], optimizer: Optimizer) -> bool:
    """Say whether a group's weight decay acts on the weights directly (AdamW) and not through the gradient.

    Args:
        group: One of the optimizer's parameter groups.
        optimizer: The optimizer.

    Returns:
        True for AdamW and for ``decoupled_weight_decay=True``.
    """
    return type(unwrap(optimizer)) is AdamW or bool(group.get("decoupled_weight_decay", False))


def unwrap(optimizer: Any) -> Optimizer:
    """Look through wrappers such as Lightning's ``LightningOptimizer``.

    Args:
        optimizer: An optimizer or a wrapper that keeps one in ``.optimizer``.

    Returns:
        The innermost optimizer.
    """
    while type(optimizer) not in _TABLE and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _row(optimizer: Optimizer) -> _Row:
    row = _TABLE.get(type(optimizer))
    if row is None:
        names = ", ".join(known.__name__ for known in _TABLE)
        raise UnknownOptimizerError(
            f"The stability limit of {type(optimizer).__module__}.{type(optimizer).__qualname__} is not known "
            f"(known: {names} of torch.optim, not their subclasses). No statement about its learning rate can "
            "be made; the inner rate is still checked. To have both checked, train with one of the known."
        )
    return row
