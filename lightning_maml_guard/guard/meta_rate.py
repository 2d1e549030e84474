"""The largest stable meta rate for the optimizer as it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_maml_guard.curvature.operators import Hessian, Params, scaled, simplified
from lightning_maml_guard.guard.estimate import Spectrum, top_eigenvalue
from lightning_maml_guard.guard.governor import scheduled_rate
from lightning_maml_guard.theory.multiplier import Interval
from lightning_maml_guard.theory.rates import CriticalRates
from lightning_maml_guard.theory.stability import (
    UnknownOptimizerError,
    decoupled_decay,
    is_preconditioned,
    preconditioner,
    stability_limit,
    unwrap,
)


@dataclass(frozen=True)
class OuterStep:
    """How an optimizer turns a meta-gradient into a step.

    Attributes:
        limit: Its stability limit ``c``.
        scale: Diagonal ``D = lr_g / (P * max lr)`` as tensors by parameter, or None where ``D = I``.
        coupled: Coupled weight decay by parameter group, expanded; or one number where it is uniform.
        decoupled: Largest decoupled weight decay.
        note: Why no statement can be made, if so.
        lasting: Whether that will stay so.
    """

    limit: float = 2.0
    scale: Params | None = None
    coupled: Params | float = 0.0
    decoupled: float = 0.0
    note: str = ""
    lasting: bool = False


def outer_step(optimizer: Optimizer | None, params: Params) -> OuterStep:
    """Read the live optimizer.

    Args:
        optimizer: The optimizer; None for plain SGD.
        params: The parameters the problem is about: the very tensors the optimizer holds.

    Returns:
        What decides stability.

    Raises:
        TypeError: If it is not an optimizer.
        ValueError: If the optimizer holds none of the parameters.
    """
    if optimizer is None:
        return OuterStep()
    optimizer = unwrap(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"Expected argument `optimizer` to be a torch.optim.Optimizer but got {type(optimizer).__name__}."
        )
    owners = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(value) in owners for value in params.values()):
        raise ValueError(
            "The optimizer holds none of the problem's `params`. Pass the module's own parameters "
            "(dict(module.named_parameters())), not copies."
        )
    try:
        limit = stability_limit(optimizer)
    except UnknownOptimizerError as error:
        return OuterStep(note=str(error), lasting=True)
    highest = scheduled_rate(optimizer)
    if highest == 0:
        return OuterStep(note="the optimizer's lr is 0 at this step.")
    groups = [owners.get(id(value)) for value in params.values()]
    decays = [0.0 if group is None else float(group["weight_decay"]) for group in groups]
    apart = [group is not None and decoupled_decay(group, optimizer) for group in groups]
    decoupled = max(decay if outside else 0.0 for decay, outside in zip(decays, apart, strict=True))
    coupled = [0.0 if outside else decay for decay, outside in zip(decays, apart, strict=True)]
    same_rate = all(group is not None and float(group["lr"]) == highest for group in groups)
    if not is_preconditioned(optimizer) and same_rate and len(set(coupled)) == 1:
        return OuterStep(limit, None, coupled[0], decoupled)
    diagonal = preconditioner(optimizer)
    scale: Params = {}
    seen = False
    for (name, value), group in zip(params.items(), groups, strict=True):
        entry = None if group is None else diagonal[value]
        if entry is None:
            scale[name] = torch.zeros_like(value)  # the optimizer does not move it, or has not yet
        else:
            seen = True
            scale[name] = float(group["lr"]) / highest / entry.detach() if group is not None else entry
    if not seen:
        return OuterStep(
            note=f"{type(optimizer).__name__} has no second moment before its first step, so its preconditioner is "
            "not known yet."
        )
    shift = {name: torch.full_like(value, decay) for (name, value), decay in zip(params.items(), coupled, strict=True)}
    return OuterStep(limit, scale, shift, decoupled)


@dataclass(frozen=True)
class MetaRateLimit:
    """Largest stable meta rate.

    Attributes:
        beta_c: The rate; ``nan`` when no statement can be made, ``inf`` when there is no finite limit.
        interval: Where it lies.
        hvps: Hessian-vector products used beyond the spectrum's.
    """

    beta_c: float
    interval: Interval
    hvps: int = 0


def meta_rate_limit(
    hessian: Hessian,
    spectrum: Spectrum,
    step: OuterStep,
    like: Tensor,
    *,
    alpha: float,
    rates: Params | None,
    inner_steps: int,
    collapsed: bool,
    blocks: int | None,
    max_iter: int,
    tol: float,
) -> MetaRateLimit:
    """Compute ``beta_c`` of the simplified update: stable iff ``beta * lambda_max(D (H - HAH + W)) < c``.

    With plain SGD and one inner rate the spectrum of ``H`` already answers; otherwise a second Lanczos run
    on the scaled operator does.

    Args:
        hessian: Product with ``H``.
        spectrum: Spectrum of ``H``.
        step: The optimizer.
        like: Tensor whose dtype and device vectors take.
        alpha: The inner rate (the largest, if there are several).
        rates: Inner rates by parameter, where there are several; None for one.
        inner_steps: Number of simplified inner steps.
        collapsed: Whether the inner rate exceeds its own limit, so that no meta rate is stable.
        blocks: Number of blocks of the operator.
        max_iter: Products at most.
        tol: Relative residual at which to stop.

    Returns:
        The limit.
    """
    if step.note:
        return MetaRateLimit(math.nan, (math.nan, math.nan))
    known: CriticalRates = spectrum.rates(alpha, inner_steps)
    if step.scale is None and rates is None and isinstance(step.coupled, float):
        if collapsed:
            return MetaRateLimit(0.0, known.beta_c_interval)
        low, high = known.curvature_interval
        ends = (_limit(high + step.coupled, step), _limit(low + step.coupled, step))
        low_end = 0.0 if known.beta_c_interval[0] == 0 else ends[0]
        return MetaRateLimit(_limit(known.curvature + step.coupled, step), (low_end, ends[1]))
    if collapsed:
        return MetaRateLimit(0.0, (0.0, 0.0))
    layout = hessian.layout
    flat_rates: Tensor | float = inner_steps * (alpha if rates is None else layout.flatten(rates).to(like))
    ones = like.new_ones(layout.size)
    scale = ones if step.scale is None else layout.flatten(step.scale).to(like)
    shift: Tensor | float = step.coupled if isinstance(step.coupled, float) else layout.flatten(step.coupled).to(like)
    before = hessian.matvecs
    operator = scaled(simplified(hessian, flat_rates), scale, shift)
    top, (low, high), _ = top_eigenvalue(operator, layout.size, like, blocks, max_iter=max_iter, tol=tol)
    return MetaRateLimit(_limit(top, step), (_limit(high, step), _limit(low, step)), hessian.matvecs - before)


def _limit(curvature: float, step: OuterStep) -> float:
    """``c/s``; with decoupled weight decay ``w``: ``2 / (w + 2*s/c)`` (THEORY: AdamW)."""
    if step.decoupled:
        return 2.0 / (step.decoupled + 2.0 * max(curvature, 0.0) / step.limit)
    return step.limit / curvature if curvature > 0 else math.inf
