"""The inner loop of a stack of linear layers without weights of each task's own.

Gradient descent moves a layer's weight by ``-alpha * D^T X``, of the layer's inputs ``X`` and the loss's derivatives
``D`` towards its outputs: a matrix of no more ranks than there are examples. An adapted layer of all tasks at once is

    x W^T + b - alpha * (x X^T + 1) D,

one product of all tasks' rows with the weight that they share, and two small ones for each task. So is its derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_maml_guard.kernels.batched_stack import BatchedStack

Params = dict[str, Tensor]
Losses = Callable[[Tensor, Tensor], Tensor]


# Share of the weights' entries that the moves of a task may have.
_SHARE = 2.0


class StackLosses:
    """The losses of several tasks of a stack: with parameters of each task's own, or after an inner loop without them.

    ``losses`` computes them from predictions and targets with a leading task dimension.
    """

    def __init__(self, stack: BatchedStack, losses: Losses) -> None:
        self._stack, self._losses = stack, losses

    def __call__(self, params: Params, data: Any) -> Tensor:
        """Return the losses; parameters and data have a leading task dimension."""
        return self._losses(self._stack(params, data[0]), data[1])

    def is_worthwhile(self, support: Any, steps: int) -> bool:
        """Return True if that is faster than weights of each task's own, on a CPU."""
        x = support[0]
        ranks = steps * (x[0].numel() // x.shape[-1])
        weights, moves = self._stack.entries
        return x.device.type == "cpu" and ranks * moves < _SHARE * weights

    def at(self, params: Params, data: Any) -> Tensor:
        """Return the losses with parameters that all tasks share."""
        return self.adapted(params, 0.0, data, data, 0)

    def adapted(
        self,
        params: Params,
        rate: float,
        support: Any,
        query: Any,
        steps: int,
        along: tuple[Tensor, Params] | None = None,
    ) -> Tensor:
        """Return the query losses after steps of gradient descent, as a function of the parameters all tasks share.

        ``along``: by how much each task is moved off these parameters, shape ``(tasks,)``, and in which direction.
        """
        linear = {name for pair in self._stack.named.values() for name in pair}
        # Those of layer norms are small, and multiply entry by entry.
        own = {n: value.expand(len(support[0]), *value.shape) for n, value in params.items() if n not in linear}
        if along is not None:
            own = {n: v + _column(along[0], v.dim()) * along[1][n] for n, v in own.items()}
        moves: dict[str, tuple[Tensor, Tensor]] = {}
        for _ in range(steps):
            layers = _Linear(self._stack.named, params, moves, along)
            losses = self._of_each(own, support, layers)
            towards = [*layers.outputs.values(), *own.values()]
            down = losses.new_full(losses.shape, -rate)
            slopes = torch.autograd.grad(losses, towards, down, create_graph=True)
            more = zip(layers.inputs.items(), slopes, strict=False)
            moves = {n: _joined(moves.get(n), *(_by_task(e, support) for e in (x, d))) for (n, x), d in more}
            rest = slopes[len(moves) :]
            own = {name: value + slope for (name, value), slope in zip(own.items(), rest, strict=True)}
        return self._of_each(own, query, _Linear(self._stack.named, params, moves, along))

    def _of_each(self, own: Params, data: Any, layers: _Linear) -> Tensor:
        x = data[0]
        with torch._C.DisableTorchFunction():  # a mode would be asked about each operation, and change none of these
            if layers.are_shared and self._stack.by_row:  # without a view to and fro at each layer
                prediction = self._stack.run(own, x.flatten(0, -2), layers).unflatten(0, x.shape[:-1])
            else:
                prediction = self._stack.run(own, x, layers)
        return self._losses(prediction, data[1])


class _Linear:
    """Linear layers as moved so far; notes the inputs and outputs of those that are adapted."""

    def __init__(
        self,
        named: dict[str, tuple[str, ...]],
        params: Params,
        moves: dict[str, tuple[Tensor, Tensor]],
        along: tuple[Tensor, Params] | None,
    ) -> None:
        self._named, self._params, self._moves, self._along = named, params, moves, along
        self.inputs: Params = {}
        self.outputs: Params = {}
        self.are_shared = not moves and along is None

    def __call__(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        shape, x = x.shape, x if x.dim() <= 3 else x.flatten(1, -2)
        weight, bias = map(self._params.get, self._named[name])
        y = F.linear(x, layer.weight if weight is None else weight, layer.bias if bias is None else bias)
        if self._along is not None:
            offsets, direction = self._along
            towards, level = map(direction.get, self._named[name])
            if towards is not None:
                y = y + _column(offsets, 3) * F.linear(x, towards)
            if level is not None:
                y = y + _column(offsets, 3) * level
        if name in self._moves:
            inputs, slopes = self._moves[name]
            y = torch.baddbmm(y, _products(x, inputs, weight, bias), slopes)
        if weight is not None or bias is not None:
            self.inputs[name], self.outputs[name] = x, y
        return y if len(shape) <= 3 else y.unflatten(1, shape[1:-1])


def _column(offsets: Tensor, dims: int) -> Tensor:
    """One number a task, to multiply tensors of so many dimensions."""
    return offsets.reshape(-1, *[1] * (dims - 1))


def _by_task(rows: Tensor, data: Any) -> Tensor:
    return rows if rows.dim() == 3 else rows.unflatten(0, (len(data[0]), -1))


def _products(x: Tensor, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x X^T + 1`` by task, or the one of the two whose parameter is adapted."""
    if weight is None:
        return x.new_ones(len(x), x.shape[1], inputs.shape[1])
    turned = inputs.transpose(1, 2)
    return torch.bmm(x, turned) if bias is None else torch.baddbmm(x.new_ones(()), x, turned)


def _joined(known: tuple[Tensor, Tensor] | None, *more: Tensor) -> tuple[Tensor, Tensor]:
    inputs, slopes = more if known is None else (torch.cat(pair, 1) for pair in zip(known, more, strict=True))
    return inputs, slopes
