"""A live optimizer as a linear map: how it turns a meta-gradient into a step, which decides stability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_maml_guard.linalg.layout import Params, real_pairs
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.stability_limits import (
    UnknownOptimizerError,
    decoupled_decay,
    is_preconditioned,
    preconditioner,
    responses,
    stability_limit,
    unwrap,
)
from lightning_maml_guard.theory.linear_response import Response


@dataclass(frozen=True)
class LinearizedStep:
    """How an optimizer turns a meta-gradient into a step.

    Attributes:
        responses: Its linear responses, the strictest settled one first; its limit lies between theirs.
        scale: Diagonal ``D = lr_g / (P * max lr)`` as tensors by parameter, or None where ``D = I``.
        coupled: Coupled weight decay by parameter group, expanded; or one number where it is uniform.
        decoupled: Largest decoupled weight decay.
        note: Why no statement can be made, if so.
        lasting: Whether that will stay so.
    """

    responses: tuple[Response, ...] = (Response(),)
    scale: Params | None = None
    coupled: Params | float = 0.0
    decoupled: float = 0.0
    note: str = ""
    lasting: bool = False

    @property
    def plain_sgd(self) -> bool:
        """Whether it is SGD without momentum and with one rate: the update of Takagi et al."""
        return self.responses == (Response(),) and self.scale is None

    def rates(self, curvature: float) -> tuple[float, float, float]:
        """Convert a curvature to the largest stable rate: by the settled response, and the range over all."""
        each = [response.largest_rate(complex(curvature), self.decoupled) for response in self.responses]
        return each[0], min(each), max(each)

    def unscaled(self, direction: Tensor) -> Tensor:
        """Take a direction of the scaled coordinates to parameter space: ``D^(1/2) u``, shape ``(n,)``."""
        if self.scale is None:
            return direction
        return _flat(self.scale).to(direction).sqrt() * direction

    def shift_along(self, direction: Tensor) -> Tensor:
        """Compute what coupled weight decay adds to the curvature along a direction: ``u . W u``, a scalar."""
        shift = self.coupled if isinstance(self.coupled, float) else _flat(self.coupled).to(direction)
        return (shift * direction * direction).sum()


def _flat(values: Params) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def linearized_step(optimizer: Optimizer | None, params: Params) -> LinearizedStep:
    """Read a live optimizer; None is plain SGD. ``params`` are the very tensors the optimizer holds.

    Raises a TypeError if it is no optimizer, a ValueError if it holds none of the parameters.
    """
    if optimizer is None:
        return LinearizedStep()
    optimizer = unwrap(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"Expected argument `optimizer` to be a torch.optim.Optimizer but got {type(optimizer).__name__}. Pass the "
            "one that trains `params`, or `beta` for plain SGD."
        )
    owners = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(value) in owners for value in params.values()):
        raise ValueError(
            "The optimizer holds none of the problem's `params`. Pass the module's own parameters "
            "(dict(module.named_parameters())), not copies."
        )
    try:
        stability_limit(optimizer)  # refuses what the table does not hold
        answers = responses(optimizer)
    except UnknownOptimizerError as error:
        return LinearizedStep(note=str(error), lasting=True)
    highest = scheduled_rate(optimizer)
    if highest == 0:
        return LinearizedStep(note="the optimizer's lr is 0 at this step.")
    groups = [owners.get(id(value)) for value in params.values()]
    decays = [0.0 if group is None else float(group["weight_decay"]) for group in groups]
    apart = [group is not None and decoupled_decay(group, optimizer) for group in groups]
    decoupled = max(decay if outside else 0.0 for decay, outside in zip(decays, apart, strict=True))
    coupled = [0.0 if outside else decay for decay, outside in zip(decays, apart, strict=True)]
    same_rate = all(group is not None and float(group["lr"]) == highest for group in groups)
    if not is_preconditioned(optimizer) and same_rate and len(set(coupled)) == 1:
        return LinearizedStep(answers, None, coupled[0], decoupled)
    diagonal = preconditioner(optimizer)
    scale: Params = {}
    seen = False
    pairs = real_pairs(params)
    for (name, value), group in zip(params.items(), groups, strict=True):
        entry = None if group is None else diagonal[value]
        if entry is None:
            scale[name] = torch.zeros_like(pairs[name])  # the optimizer does not move it, or has not yet
        else:
            seen = True
            scale[name] = float(group["lr"]) / highest / entry.detach() if group is not None else entry
    if not seen:
        return LinearizedStep(
            note=f"{type(optimizer).__name__} has no second moment before its first step, so its preconditioner is "
            "not known yet."
        )
    shift = {name: torch.full_like(value, decay) for (name, value), decay in zip(pairs.items(), coupled, strict=True)}
    return LinearizedStep(answers, scale, shift, decoupled)
