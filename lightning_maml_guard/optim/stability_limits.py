"""The largest stable learning rate of each optimizer of ``torch.optim``, in units of the curvature.

With learning rate ``beta``, preconditioner ``P`` and the Jacobian ``J`` of the gradient field, the update is stable
iff ``beta * lambda_max(P^-1 J) < c``. Sources: Takagi et al. (SGD, ``c = 2``); Cohen et al. 2021, "Gradient descent
on neural networks typically occurs at the edge of stability", and 2022, "Adaptive gradient methods at the edge of
stability" (momentum, and Adam's ``38/eta``). The limits of adaptive optimizers hold for a frozen second moment ``v``.

To add an optimizer, write its linear response and, if it has one, its preconditioner, and add a row to ``LIMITS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from lightning_maml_guard.linalg.layout import real_pairs
from lightning_maml_guard.theory.linear_response import Response
from lightning_maml_guard.utils.checks import shown

Group = dict[str, Any]
# One optimizer, or several that step together.
Optimizers = Optimizer | Sequence[Optimizer]
State = dict[str, Any]


class UnknownOptimizerError(ValueError):
    """The stability limit of an optimizer is not known."""


def sgd_response(momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> Response:
    """Linear response of SGD."""
    if nesterov:
        return Response(momentum, direct=1.0, buffered=momentum)
    if not momentum:
        return Response()  # torch applies dampening to the momentum buffer alone
    return Response(momentum, direct=0.0, buffered=1 - dampening)


def adam_response(beta1: float, step: float | None = None) -> Response:
    """Linear response of Adam, AdamW and AMSGrad in their ``step``-th step (None: bias correction settled)."""
    correction = 1.0 if step is None else 1 - beta1**step
    return Response(beta1, direct=0.0, buffered=(1 - beta1) / correction)


def nadam_response(beta1: float) -> Response:
    """Linear response of NAdam once its momentum and its bias correction have settled."""
    return Response(beta1, direct=1 - beta1, buffered=beta1 * (1 - beta1))


def rmsprop_response(momentum: float = 0.0) -> Response:
    """Linear response of RMSprop."""
    return Response(momentum, direct=0.0, buffered=1.0) if momentum else Response()


def _nadam_next(group: Group, state: State) -> Response:
    # torch's NAdam warms its momentum up over thousands of steps (momentum_decay).
    beta1, step = float(group["betas"][0]), float(state["step"]) + 1
    now, after = (beta1 * (1 - 0.5 * 0.96 ** (t * float(group["momentum_decay"]))) for t in (step, step + 1))
    product = float(state["mu_product"]) * now
    return Response(beta1, direct=(1 - now) / (1 - product), buffered=after * (1 - beta1) / (1 - product * after))


def _adam_preconditioner(group: Group, state: State) -> Tensor | None:
    """``sqrt(v_hat) + eps`` with the bias-corrected second moment ``v_hat``, AMSGrad's largest."""
    if "exp_avg_sq" not in state:
        return None
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    return (second / correction).sqrt() + group["eps"]


def _rmsprop_preconditioner(group: Group, state: State) -> Tensor | None:
    if "square_avg" not in state:
        return None
    second = state["square_avg"]
    if group["centered"]:
        second = second - state["grad_avg"] ** 2
    return second.clamp(min=0).sqrt() + group["eps"]


def _adagrad_preconditioner(group: Group, state: State) -> Tensor | None:
    if "sum" not in state or float(state["step"]) == 0:
        return None
    return state["sum"].sqrt() + group["eps"]


@dataclass(frozen=True)
class OptimizerLimit:
    """What decides the stability limit of one class of optimizers.

    Attributes:
        response: Linear response of a parameter group once bias corrections have settled.
        preconditioner: Diagonal ``P`` of a parameter, from its group and its state; None where ``P = 1``. It returns
            None while the state has no second moment.
        next_response: Response of the next step, from group and state; None where it is ``response`` at every step.
    """

    response: Callable[[Group], Response]
    preconditioner: Callable[[Group, State], Tensor | None] | None = None
    next_response: Callable[[Group, State], Response] | None = None


_ADAM = OptimizerLimit(
    lambda group: adam_response(float(group["betas"][0])),
    _adam_preconditioner,
    lambda group, state: adam_response(float(group["betas"][0]), float(state["step"]) + 1),
)
LIMITS: dict[type[Optimizer], OptimizerLimit] = {
    SGD: OptimizerLimit(
        lambda group: sgd_response(float(group["momentum"]), float(group["dampening"]), group["nesterov"])
    ),
    Adam: _ADAM,
    AdamW: _ADAM,
    NAdam: OptimizerLimit(lambda group: nadam_response(float(group["betas"][0])), _adam_preconditioner, _nadam_next),
    RMSprop: OptimizerLimit(lambda group: rmsprop_response(float(group["momentum"])), _rmsprop_preconditioner),
    Adagrad: OptimizerLimit(lambda group: Response(), _adagrad_preconditioner),
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
        optimizer: An optimizer of ``torch.optim``, or Lightning's wrapper around one.

    Returns:
        The limit; with several parameter groups, the smallest of theirs.

    Raises:
        UnknownOptimizerError: If the optimizer is not in the table (nor are subclasses, which may step differently),
            if it maximises, or if it decays its rate by itself (Adagrad's ``lr_decay``).
        TypeError: If it is not an optimizer.

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
    limit = _limit_of(optimizer)
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise UnknownOptimizerError(
            f"{type(optimizer).__name__}(maximize=True) climbs the loss: no learning rate is stable at a minimum. "
            "Minimise the negated objective instead."
        )
    if any(group.get("lr_decay") for group in optimizer.param_groups):
        raise UnknownOptimizerError(
            f"{type(optimizer).__name__} with lr_decay applies a rate that is not its `lr`, so nothing is said about "
            "it. Use lr_decay=0 with a scheduler; an inner learning rate is still checked."
        )
    return min(limit.response(group).limit for group in optimizer.param_groups)


def responses(optimizers: Optimizers) -> tuple[Response, ...]:
    """Settled linear responses of the groups in ascending order of their limits, then those of the next step."""
    # Adam's and NAdam's gain is larger in their first steps: the limit starts at 2(1+b1) and rises as they settle.
    settled: set[Response] = set()
    following: set[Response] = set()
    for optimizer in listed(optimizers):
        limit = _limit_of(optimizer)
        settled |= {limit.response(group) for group in optimizer.param_groups}
        if limit.next_response is not None:
            for group in optimizer.param_groups:
                states = [optimizer.state[p] for p in group["params"] if "step" in optimizer.state.get(p, {})]
                # Parameters that took the same number of steps share one response.
                by_step = {float(state["step"]): state for state in states}
                following |= {limit.next_response(group, state) for state in by_step.values()}
    return (*sorted(settled, key=lambda each: each.limit), *following)


def preconditioner(optimizer: Optimizer) -> dict[Tensor, Tensor | None]:
    """Diagonal preconditioner ``P`` of each parameter; None where the optimizer has no second moment yet."""
    optimizer = unwrap(optimizer)
    limit = _limit_of(optimizer)
    found: dict[Tensor, Tensor | None] = {}
    # torch's optimizers step the real and imaginary parts of complex parameters like real ones.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if limit.preconditioner is None:
                found[parameter] = torch.ones_like(real_pairs({"": parameter})[""])
            else:
                state = optimizer.state.get(parameter, {})
                pairs = real_pairs({key: value for key, value in state.items() if isinstance(value, Tensor)})
                found[parameter] = limit.preconditioner(group, {**state, **pairs})
    return found


def is_preconditioned(optimizer: Optimizer) -> bool:
    """Return True if the optimizer divides each gradient by the root of a second moment, as Adam does."""
    return _limit_of(unwrap(optimizer)).preconditioner is not None


def is_memoryless(optimizer: Optimizer) -> bool:
    """Return True if a step depends on the gradient at hand alone: plain SGD."""
    optimizer = unwrap(optimizer)
    return type(optimizer) is SGD and not any(group["momentum"] for group in optimizer.param_groups)


def decoupled_decay(group: Group, optimizer: Optimizer) -> bool:
    """Return True if a group's weight decay acts on the weights directly (AdamW) and not through the gradient."""
    return type(unwrap(optimizer)) is AdamW or bool(group.get("decoupled_weight_decay", False))


def climbs(optimizer: Optimizer) -> bool:
    """Return True if an optimizer climbs its loss with all parameters; with some, it looks for a saddle."""
    return bool(optimizer.param_groups) and all(group.get("maximize") for group in optimizer.param_groups)


def unwrap(optimizer: Any) -> Optimizer:
    """Return the optimizer inside wrappers such as Lightning's ``LightningOptimizer``."""
    while type(optimizer) not in LIMITS and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def listed(optimizers: Optimizers) -> list[Optimizer]:
    """List the optimizers that step together, without their wrappers; of a single one, itself."""
    return [unwrap(each) for each in (optimizers if isinstance(optimizers, Sequence) else (optimizers,))]


def _limit_of(optimizer: Optimizer) -> OptimizerLimit:
    limit = LIMITS.get(type(optimizer))
    if limit is None:
        names = ", ".join(known.__name__ for known in LIMITS)
        raise UnknownOptimizerError(
            f"The stability limit of {type(optimizer).__module__}.{type(optimizer).__qualname__} is not known "
            f"(known: {names} of torch.optim, not their subclasses), so there is no critical value to compare its "
            "learning rate with; an inner learning rate is still compared. To have both, train with a known optimizer."
        )
    return limit
