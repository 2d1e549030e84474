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

from lightning_maml_guard.theory.linear_response import Response
from lightning_maml_guard.utils.checks import shown


class UnknownOptimizerError(ValueError):
    """The optimizer's stability limit is not known here, and a guess would be worse than none."""


def _sgd(group: dict[str, Any]) -> Response:
    momentum = float(group["momentum"])
    if group["nesterov"]:
        return Response(momentum, direct=1.0, buffered=momentum)
    if not momentum:
        return Response()  # torch applies dampening to the momentum buffer alone
    return Response(momentum, direct=0.0, buffered=1 - float(group["dampening"]))


def _adam(group: dict[str, Any]) -> Response:
    beta1 = float(group["betas"][0])
    return Response(beta1, direct=0.0, buffered=1 - beta1)


def _adam_now(group: dict[str, Any], state: dict[str, Any]) -> Response:
    beta1 = float(group["betas"][0])
    return Response(beta1, direct=0.0, buffered=(1 - beta1) / (1 - beta1 ** (float(state["step"]) + 1)))


def _nadam(group: dict[str, Any]) -> Response:
    beta1 = float(group["betas"][0])
    return Response(beta1, direct=1 - beta1, buffered=beta1 * (1 - beta1))


def _nadam_now(group: dict[str, Any], state: dict[str, Any]) -> Response:
    # torch's NAdam warms its momentum up over thousands of steps (momentum_decay).
    beta1, step = float(group["betas"][0]), float(state["step"]) + 1
    now, after = (beta1 * (1 - 0.5 * 0.96 ** (t * float(group["momentum_decay"]))) for t in (step, step + 1))
    product = float(state["mu_product"]) * now
    return Response(beta1, direct=(1 - now) / (1 - product), buffered=after * (1 - beta1) / (1 - product * after))


def _rmsprop(group: dict[str, Any]) -> Response:
    momentum = float(group["momentum"])
    return Response(momentum, direct=0.0, buffered=1.0) if momentum else Response()


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
    response: Callable[[dict[str, Any]], Response]
    preconditioner: Callable[[dict[str, Any], dict[str, Any]], Tensor | None] | None = None
    now: Callable[[dict[str, Any], dict[str, Any]], Response] | None = None


_TABLE: dict[type[Optimizer], _Row] = {
    SGD: _Row(_sgd),
    Adam: _Row(_adam, _bias_corrected, _adam_now),
    AdamW: _Row(_adam, _bias_corrected, _adam_now),
    NAdam: _Row(_nadam, _bias_corrected, _nadam_now),
    RMSprop: _Row(_rmsprop, _rms),
    Adagrad: _Row(lambda group: Response(), _adagrad),
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
        TypeError: If it is not an optimizer at all.

    Example:
        >>> import torch
        >>> from lightning_maml_guard import stability_limit
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> stability_limit(torch.optim.SGD([weight], lr=0.1))
        2.0
        >>> round(stability_limit(torch.optim.Adam([weight])), 6)
        38.0
    """
    optimizer = unwrap(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"Expected argument `optimizer` to be a torch.optim.Optimizer but got {shown(optimizer)}. Pass the "
            "optimizer that trains, such as torch.optim.SGD(module.parameters(), lr=0.1)."
        )
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
    return min(row.response(group).limit for group in optimizer.param_groups)


def responses(optimizer: Optimizer) -> tuple[Response, ...]:
    """Collect the linear responses between which the optimizer's lies, the strictest settled one first.

    Groups may differ in momentum, and Adam and NAdam answer otherwise in their first steps than once their bias
    corrections have settled (a larger gain: the limit starts at 2(1+b1) and rises to its settled value).

    Args:
        optimizer: An optimizer that :func:`stability_limit` knows.

    Returns:
        The settled response of every group, in ascending order of their limits, then those of the coming step.

    Raises:
        UnknownOptimizerError: If the optimizer is not known.
    """
    optimizer = unwrap(optimizer)
    row = _row(optimizer)
    settled = sorted({row.response(group) for group in optimizer.param_groups}, key=lambda each: each.limit)
    coming: set[Response] = set()
    for group in optimizer.param_groups if row.now is not None else ():
        states = [optimizer.state[p] for p in group["params"] if "step" in optimizer.state.get(p, {})]
        # Parameters that took the same number of steps share one response.
        by_step = {float(state["step"]): state for state in states}
        coming |= {row.now(group, state) for state in by_step.values() if row.now is not None}
    return (*settled, *coming)


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
