"""Live optimizers as a linear map: how it turns a meta-gradient into a step, which decides stability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_maml_guard.linalg.layout import Params, real_pairs
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.stability_limits import (
    Group,
    Optimizers,
    UnknownOptimizerError,
    decoupled_decay,
    is_preconditioned,
    listed,
    preconditioner,
    responses,
    stability_limit,
)
from lightning_maml_guard.theory.linear_response import Response
from lightning_maml_guard.utils.shards import local


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
    return torch.cat([local(value).flatten() for value in values.values()])


def linearized_step(optimizers: Optimizers | None, params: Params) -> LinearizedStep:
    """Read a live optimizer, or several that step together; None is plain SGD.

    ``params`` are the very tensors they hold. Several are one diagonal ``D`` over all parameters, relative to the
    largest rate; of their responses the strictest decides. Raises a TypeError if one is no optimizer, a ValueError if
    they hold none of the parameters.
    """
    if optimizers is None:
        return LinearizedStep()
    each = listed(optimizers)
    strangers = [type(one).__name__ for one in each if not isinstance(one, Optimizer)]
    if strangers or not each:
        raise TypeError(
            "Expected argument `optimizer` to be a torch.optim.Optimizer but got "
            f"{strangers[0] if strangers else 'an empty list'}. Pass the one that trains `params`, or `beta` for plain "
            "SGD."
        )
    owners: dict[int, tuple[Optimizer, Group]] = {
        id(parameter): (one, group) for one in each for group in one.param_groups for parameter in group["params"]
    }
    found = [owners.get(id(value)) for value in params.values()]
    if not any(found):
        raise ValueError(
            "The optimizer holds none of the problem's `params`. Pass the module's own parameters "
            "(dict(module.named_parameters())), not copies."
        )
    try:
        for one in each:
            stability_limit(one)  # refuses what the table does not hold
        answers = responses(each)
    except UnknownOptimizerError as error:
        return LinearizedStep(note=str(error), lasting=True)
    highest = scheduled_rate(each)
    if highest == 0:
        return LinearizedStep(note="the optimizer's lr is 0 at this step.")
    decays = [0.0 if owner is None else float(owner[1]["weight_decay"]) for owner in found]
    apart = [owner is not None and decoupled_decay(owner[1], owner[0]) for owner in found]
    decoupled = max(decay if outside else 0.0 for decay, outside in zip(decays, apart, strict=True))
    coupled = [0.0 if outside else decay for decay, outside in zip(decays, apart, strict=True)]
    same_rate = all(owner is not None and float(owner[1]["lr"]) == highest for owner in found)
    if not any(map(is_preconditioned, each)) and same_rate and len(set(coupled)) == 1:
        return LinearizedStep(answers, None, coupled[0], decoupled)
    diagonal = {parameter: entry for one in each for parameter, entry in preconditioner(one).items()}
    scale: Params = {}
    seen: set[Optimizer] = set()
    pairs = real_pairs(params)
    for (name, value), owner in zip(params.items(), found, strict=True):
        entry = None if owner is None else diagonal[value]
        if entry is None or owner is None:
            scale[name] = torch.zeros_like(pairs[name])  # the optimizer does not move it, or has not yet
        else:
            seen.add(owner[0])
            scale[name] = float(owner[1]["lr"]) / highest / entry.detach()
    unseen = [owner[0] for owner in found if owner is not None and owner[0] not in seen]
    if unseen:
        return LinearizedStep(
            note=f"{type(unseen[0]).__name__} has no second moment before its first step, so its preconditioner is "
            "not known yet."
        )
    shift = {name: torch.full_like(value, decay) for (name, value), decay in zip(pairs.items(), coupled, strict=True)}
    return LinearizedStep(answers, scale, shift, decoupled)
