"""Plain training: a LightningModule's own ``training_step`` as a loss of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.utils.task_map import as_float32


@dataclass(frozen=True)
class PlainProblem:
    """A loss and its parameters, without an inner loop: only the meta rate, here the learning rate, has a limit.

    Args:
        params: The parameters training moves, by name; the module's own tensors.
        loss: Function from such a dict to the scalar loss.
    """

    params: Params
    loss: Callable[[Params], Tensor]


class _Step(nn.Module):
    def __init__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self) -> Tensor:
        # The parameters come in float32, also those of a run in half precision.
        arguments = tree_map(lambda x: as_float32(x.clone()) if isinstance(x, Tensor) else x, self.arguments)
        output = self.module.training_step(*arguments)  # type: ignore[operator]
        loss = output["loss"] if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise ValueError(
                "Expected training_step to return a loss tensor or a dict with a 'loss' but got "
                f"{type(output).__name__}: there is nothing to measure at this step."
            )
        return loss


def training_step_problem(module: nn.Module, batch: Any, batch_idx: int) -> PlainProblem:
    """State the loss of the coming ``training_step``.

    Args:
        module: The LightningModule, with automatic optimisation.
        batch: The batch of the coming step.
        batch_idx: Its index.

    Returns:
        The problem. Its loss runs ``training_step`` on copies of the batch and the buffers, in float32 instead of half
        precision.
    """
    signature = inspect.signature(module.training_step)  # type: ignore[arg-type]
    arguments = (batch, batch_idx) if len(signature.parameters) > 1 else (batch,)
    step = _Step(module, arguments)
    params: Params = {name: value for name, value in module.named_parameters() if value.requires_grad}
    names = {id(value): name for name, value in params.items()}
    # Every place a parameter is registered at, so that tied parameters and shared submodules get one tensor without
    # functional_call's own tying, which replaces a shared submodule's live parameters (pytorch#164759).
    places = {
        f"module.{prefix}{'.' if prefix else ''}{name}": names[id(value)]
        for prefix, part in module.named_modules()
        for name, value in part._parameters.items()
        if value is not None and id(value) in names
    }

    def loss(at: Params) -> Tensor:
        buffers = as_float32({f"module.{name}": value.clone() for name, value in module.named_buffers()})
        swapped = {place: at[name] for place, name in places.items()}
        return torch.func.functional_call(step, {**buffers, **swapped}, (), tie_weights=False)

    return PlainProblem(params, loss)
