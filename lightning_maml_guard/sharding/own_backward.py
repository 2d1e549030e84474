"""Gradients of a loss that calls a sharded module, by the module's own backward, at any point.

A module that ``fully_shard`` split gathers each layer's parameters when it is called, and its backward scatters their
gradients; neither can be differentiated again. So the point is written into the module's pieces, the loss is evaluated,
and the pieces of its gradient are read: no process ever holds more than a layer. Derivatives of gradients are finite
differences. The gradient is the mean over the processes of the gradients of their losses, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.linalg.operators import Field, FieldValue
from lightning_maml_guard.sharding.space import Split
from lightning_maml_guard.utils.reachable import modules_of
from lightning_maml_guard.utils.shards import all_reduced, local, reshard, sharded_parts

T = TypeVar("T")
# A function of the live parameters, whose values are those of the point.
Loss = Callable[[Params], Tensor]


class OwnBackward:
    """Evaluates losses of the live parameters ``live`` at other points; ``functions`` lead to the modules they call.

    Raises a ValueError if they lead to no module that is split, or if its parameters are not split alike.
    """

    def __init__(self, live: Params, *functions: Any) -> None:
        self.live, self.space = live, Split(live)
        self._modules: list[nn.Module] = [each for each in modules_of(*functions) if sharded_parts(each)]
        if not self._modules:
            raise ValueError(
                "Expected the loss to call the module whose parameters are split, but it leads to none: name the "
                "module in the loss's own code, as in functional_call(network, params, (x,))."
            )

    def point(self) -> Params:
        """Copy the pieces of the parameters."""
        return {name: local(value).clone() for name, value in self.live.items()}

    def field(self, loss: Loss) -> Field:
        """Make the gradient field of a loss."""

        def field(params: Params, differentiable: bool) -> FieldValue:
            assert not differentiable, "a sharded module has no double backward"
            value, gradients = self.gradient(loss, params)
            return FieldValue(value, dict(gradients))

        return field

    def gradient(self, loss: Loss, at: Params) -> tuple[Tensor, Params]:
        """Compute a loss and its gradient at a point, both of them means over the processes."""
        with self._moved_to(at):
            kept = {name: value.grad for name, value in self.live.items()}
            try:
                for value in self.live.values():
                    value.grad = None
                with torch.enable_grad():
                    found = loss(dict(self.live))  # functional_call writes into the dict it is given
                found.backward()
                gradients = {
                    name: torch.zeros_like(local(value)) if value.grad is None else local(value.grad)
                    for name, value in self.live.items()
                }
            finally:
                for name, value in self.live.items():
                    value.grad = kept[name]
        return mean(found), gradients

    def value(self, loss: Loss, at: Params) -> Tensor:
        """Compute a loss at a point, the mean over the processes."""
        return mean(self.call(loss, at))

    def call(self, function: Callable[[Params], T], at: Params) -> T:
        """Call a function of the live parameters at a point."""
        with self._moved_to(at), torch.no_grad():
            return function(dict(self.live))

    def dot(self, one: Params, other: Params) -> Tensor:
        """Multiply two vectors, given by their pieces."""
        return self.space.total(torch.stack([(one[name] * other[name]).sum() for name in self.live]).sum())

    @contextmanager
    def _moved_to(self, at: Params) -> Iterator[None]:
        for module in self._modules:
            reshard(module)  # or a gathered parameter would be used in place of its pieces
        kept = self.point()
        try:
            self._write(at)
            yield
        finally:
            for module in self._modules:
                reshard(module)
            self._write(kept)

    @torch.no_grad()
    def _write(self, at: Params) -> None:
        for name, value in self.live.items():
            local(value).copy_(at[name])


def mean(value: Tensor) -> Tensor:
    """Average a loss over the processes."""
    return all_reduced(value) / dist.get_world_size()
