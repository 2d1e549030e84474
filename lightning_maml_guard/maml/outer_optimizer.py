"""The outer optimizer and its learning-rate schedule, made by the functions that users pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_maml_guard.utils.checks import check_function, shown
from lightning_maml_guard.utils.warnings import GuardWarning

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], Any]


def check_factories(optimizer: OptimizerFactory | None, lr_scheduler: SchedulerFactory | None) -> None:
    """Raise if one of them cannot be called to make an optimizer or a scheduler."""
    if optimizer is not None:
        check_function("optimizer", optimizer, "parameters -> optimizer", "lambda params: SGD(params, lr=0.1)")
    if lr_scheduler is not None:
        check_function(
            "lr_scheduler", lr_scheduler, "optimizer -> scheduler", "lambda optimizer: StepLR(optimizer, 10)"
        )


def make_optimizer(
    named: dict[str, nn.Parameter],
    trained: Sequence[Any],
    optimizer: OptimizerFactory | None,
    lr_scheduler: SchedulerFactory | None,
    precision: str = "",
    lr: float | None = None,
) -> Any:
    """Return the optimizer, or what Lightning takes for an optimizer with a scheduler.

    The optimizer gets all ``named`` parameters that require a gradient; the meta-gradient moves only the ``trained``.
    Where ``lr`` is given, it is the largest rate over the optimizer's groups, which keep their proportions.
    """
    known = {id(value) for value in trained}
    parameters = [value for value in named.values() if value.requires_grad]
    others = [name for name, value in named.items() if value.requires_grad and id(value) not in known]
    if others:
        warnings.warn(
            f"The parameters {others} lie outside `network`, and MAML's meta-gradient is taken towards the "
            "network's parameters alone: they get no gradient. Move them into the network, or freeze them.",
            GuardWarning,
            stacklevel=3,
        )
    if optimizer is None:
        # One kernel per step instead of a dozen per parameter: a fifth of a small network's step. In mixed precision
        # Lightning does not clip the gradients of an optimizer that unscales them itself, as a fused one would.
        fused = "mixed" not in precision and all(
            each.device.type in {"cpu", "cuda"} and each.is_floating_point() for each in parameters
        )
        made: Any = Adam(parameters, lr=1e-3, fused=fused or None)  # None: torch chooses among the others
    else:
        made = optimizer(parameters)
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"Expected argument `optimizer` to return a torch.optim.Optimizer but got {shown(made)}. Return "
            "one, as lambda params: SGD(params, lr=0.1) does."
        )
    if lr is not None:
        highest = max(float(group["lr"]) for group in made.param_groups)
        for group in made.param_groups:
            group["lr"] = group["lr"] * (lr / highest)  # not in place: groups can share one tensor
    if lr_scheduler is None:
        return made
    scheduler = lr_scheduler(made)
    if not callable(getattr(scheduler, "step", None)):
        raise TypeError(
            f"Expected argument `lr_scheduler` to return a learning-rate scheduler but got {shown(scheduler)}. "
            "Return one, as lambda optimizer: StepLR(optimizer, 10) does."
        )
    return {"optimizer": made, "lr_scheduler": scheduler}


class AttachGradient(torch.autograd.Function):
    """A loss whose backward is a gradient that is already known.

    Lightning's automatic optimisation (precision, accumulation, clipping, DDP) then works also for the orders whose
    meta-gradient is not the gradient of a loss.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        scale = outputs[0]
        return None, None, *(scale.to(gradient.dtype) * gradient for gradient in ctx.gradients)
