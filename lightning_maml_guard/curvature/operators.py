"""The curvature of a loss as matrix-vector products over a flat parameter vector.

An operator is a function ``(*batch, n) -> (*batch, n)``. The Hessian keeps one graph of the gradient and
reuses it for every product (reverse over reverse), so dropout masks are drawn once and the operator stays
one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_maml_guard._vectorize import TaskMap

Params = dict[str, Tensor]
Matvec = Callable[[Tensor], Tensor]


class Layout:
    """Where each named parameter lies in a flat vector.

    Args:
        params: Parameters by name; all floating point, on one device.

    Raises:
        ValueError: If there are none, or if they lie on several devices or are not floating point.
    """

    def __init__(self, params: Params) -> None:
        if not params:
            raise ValueError("Expected `params` to hold at least one parameter but it is empty: nothing is trained.")
        wrong = {name: str(value.dtype) for name, value in params.items() if not value.is_floating_point()}
        if wrong:
            raise ValueError(f"Expected `params` to be floating point but got {wrong}.")
        devices = {str(value.device) for value in params.values()}
        if len(devices) != 1:
            raise ValueError(f"Expected `params` on one device but got {sorted(devices)}.")
        self.shapes = {name: value.shape for name, value in params.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.size = sum(self.sizes)

    def flatten(self, values: Params, batch: int = 0) -> Tensor:
        """Concatenate named tensors.

        Args:
            values: Tensors by name, each with ``batch`` leading dimensions before the parameter's shape.
            batch: Number of leading dimensions.

        Returns:
            Vector(s) of shape ``(*leading, n)``.
        """
        return torch.cat([values[name].flatten(batch) for name in self.shapes], dim=-1)

    def split(self, vector: Tensor) -> Params:
        """Cut vector(s) of shape ``(*leading, n)`` into named tensors.

        Args:
            vector: The vector(s).

        Returns:
            Tensors by name, of shape ``(*leading, *parameter shape)``.
        """
        pieces = vector.split(self.sizes, dim=-1)
        leading = vector.shape[:-1]
        return {
            name: piece.reshape(leading + shape)
            for piece, (name, shape) in zip(pieces, self.shapes.items(), strict=True)
        }


class Hessian:
    """Hessian of a scalar function of a params dict, as products with a flat vector.

    Args:
        loss: Function from the params to a scalar, or to one value a task when the params carry a leading
            task dimension (then the operator is block diagonal, one block a task).
        params: Where to differentiate: tensors by name. They are detached; nothing is written to them.
        layout: Layout of one block; by default that of ``params`` without leading dimension.

    Raises:
        ValueError: If the loss does not depend on the parameters in a differentiable way.
    """

    def __init__(self, loss: Callable[[Params], Tensor], params: Params, layout: Layout | None = None) -> None:
        self.layout = layout or Layout(params)
        self.batch = 0 if layout is None else 1
        self._leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        value = loss(self._leaves).sum()
        if not value.requires_grad:
            raise ValueError(
                "The loss does not depend on any parameter in a differentiable way, so it has no curvature. "
                "Check that it is computed from the `params` it is given (torch.func.functional_call), not "
                "from the module's own, and without detach() or item()."
            )
        self.value = value.detach()
        gradients = torch.autograd.grad(value, list(self._leaves.values()), create_graph=True, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                "The loss does not depend on the `params` it is given: compute it from them "
                "(torch.func.functional_call), not from the module's own parameters."
            )
        self._gradients = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for gradient, leaf in zip(gradients, self._leaves.values(), strict=True)
        ]
        # A gradient that does not depend on the parameters (a linear part) has no graph: its rows are 0.
        self._active = [gradient.requires_grad for gradient in self._gradients]
        self.matvecs = 0

    @property
    def gradient(self) -> Tensor:
        """Flat gradient, shape ``(n,)`` or ``(tasks, n)``."""
        return self._flat(self._gradients)

    def _flat(self, values: Any) -> Tensor:
        return self.layout.flatten(dict(zip(self._leaves, values, strict=True)), self.batch).detach()

    def __call__(self, vector: Tensor) -> Tensor:
        """Multiply the Hessian with a vector.

        Args:
            vector: Shape ``(n,)``, or ``(tasks, n)`` for the block-diagonal form.

        Returns:
            The product, same shape.
        """
        self.matvecs += 1
        if not any(self._active):
            return torch.zeros_like(vector)
        pieces = self.layout.split(vector)
        outputs, weights = [], []
        for active, gradient, piece in zip(self._active, self._gradients, pieces.values(), strict=True):
            if active:
                outputs.append(gradient)
                weights.append(piece.to(gradient.dtype))
        products = torch.autograd.grad(
            outputs,
            list(self._leaves.values()),
            grad_outputs=weights,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return self._flat(products)


def task_hessian(
    losses: Callable[[Params, Any], Tensor],
    params: Params,
    data: Any,
    *,
    per_task: bool,
    tasks: TaskMap,
    count: int,
) -> Hessian:
    """Hessian of the mean task loss, or of every task's loss side by side.

    Args:
        losses: Loss of one task: ``(params, one task's data) -> scalar``.
        params: Parameters by name.
        data: Pytree of tensors with a leading task dimension.
        per_task: False: the Hessian of the mean. True: the block-diagonal operator on ``(tasks, n)``.
        tasks: How to run over the tasks.
        count: Number of tasks in ``data``.

    Returns:
        The operator.
    """
    if per_task:
        copies = {name: value.detach().expand(count, *value.shape) for name, value in params.items()}
        return Hessian(lambda each: tasks(losses, each, data, in_dims=(0, 0)), copies, Layout(params))
    return Hessian(lambda shared: tasks(losses, shared, data, in_dims=(None, 0)).mean(), params)


def simplified(hessian: Matvec, rates: Tensor | float) -> Matvec:
    """Hessian of simplified MAML's objective near a minimum, ``H - H A H`` (the poster: ``A = alpha*I``).

    Args:
        hessian: Product with ``H``.
        rates: Inner rates ``A``: a number, or a vector of one rate a parameter, shape ``(n,)``.

    Returns:
        The product, two products with ``H`` each.
    """

    def matvec(vector: Tensor) -> Tensor:
        product = hessian(vector)
        return product - hessian(rates * product)

    return matvec


def scaled(matvec: Matvec, scale: Tensor, shift: Tensor | float = 0.0) -> Matvec:
    """Symmetric scaling ``D^(1/2) (A + S) D^(1/2)``, similar to ``D (A + S)``.

    Args:
        matvec: Product with ``A``.
        scale: Diagonal of ``D``, shape ``(n,)``, not negative.
        shift: Diagonal ``S`` added first (coupled weight decay).

    Returns:
        The product.
    """
    root = scale.sqrt()

    def product(vector: Tensor) -> Tensor:
        inner = root * vector
        return root * (matvec(inner) + shift * inner)

    return product
