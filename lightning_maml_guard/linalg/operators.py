"""The derivative of a gradient as matrix-vector products over a flat parameter vector.

An operator is a function ``(*batch, n) -> (*batch, n)``. What is differentiated is a *gradient field*
``theta -> G(theta)``: the gradient of a loss, whose Jacobian is the Hessian, or the meta-gradient of MAML. One graph
of the field is kept and reused for every product (reverse over reverse), so dropout masks are drawn once and the
operator stays one matrix. Where the field cannot be differentiated again, finite differences of it stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_maml_guard.linalg.lanczos import Matvec
from lightning_maml_guard.linalg.layout import Layout, Params
from lightning_maml_guard.utils.distributed import Ranks
from lightning_maml_guard.utils.task_map import TaskMap


class FieldValue(NamedTuple):
    """A gradient field at one point.

    Attributes:
        value: The scalar (or one a task) the gradient belongs to; the sum over tasks.
        gradients: ``G``, by parameter; None where it does not depend on one.
    """

    value: Tensor
    gradients: dict[str, Tensor | None]


# (params that require a gradient, whether the result must be differentiable again) -> value and gradient
Field = Callable[[Params, bool], FieldValue]


def gradient_of(loss: Callable[[Params], Tensor]) -> Field:
    """Make the gradient field of a loss.

    Args:
        loss: Function from the params to a scalar, or to one value a task when the params carry a leading task
            dimension.

    Returns:
        The field. It raises a ValueError if the loss does not depend on the parameters in a differentiable way.
    """

    def field(params: Params, differentiable: bool) -> FieldValue:
        value = loss(params).sum()
        if not value.requires_grad:
            raise ValueError(
                "The loss does not depend on any parameter in a differentiable way, so it has no curvature. "
                "Check that it is computed from the `params` it is given (torch.func.functional_call), not "
                "from the module's own, and without detach() or item()."
            )
        gradients = torch.autograd.grad(value, list(params.values()), create_graph=differentiable, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                "The loss does not depend on the `params` it is given: compute it from them "
                "(torch.func.functional_call), not from the module's own parameters."
            )
        return FieldValue(value.detach(), dict(zip(params, gradients, strict=True)))

    return field


class Jacobian:
    """Products with the transposed Jacobian of a gradient field (its eigenvalues are the Jacobian's).

    For the gradient of a loss that is the Hessian.

    Args:
        field: The gradient field.
        params: Where to differentiate: tensors by name. They are detached; nothing is written to them.
        layout: Layout of one block where the params carry a leading task dimension (then the operator is block
            diagonal, one block a task); None where they do not.
    """

    def __init__(self, field: Field, params: Params, layout: Layout | None = None) -> None:
        self.layout = layout or Layout(params)
        self.batch = 0 if layout is None else 1
        self._leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        self.value, gradients = field(self._leaves, True)
        self._gradients: Params | None = _filled(gradients, self._leaves)
        # Flat gradient, shape `(n,)` or `(tasks, n)`.
        self.gradient = self.layout.flatten(self._gradients, self.batch).detach()
        self._ranks = Ranks()
        self.matvecs = 0

    def across(self, ranks: Ranks) -> None:
        """Make this the operator of the ranks' mean gradient field, from here on.

        Args:
            ranks: The ranks; each calls this, and every product.
        """
        _average(self, ranks)

    def __call__(self, vector: Tensor) -> Tensor:
        """Multiply with a vector.

        Args:
            vector: Shape ``(n,)``, or ``(tasks, n)`` for the block-diagonal form.

        Returns:
            The product, same shape.

        Raises:
            RuntimeError: If the graph was let go of.
        """
        if self._gradients is None:
            raise RuntimeError("Expected a product before release() but it came after: the graph is gone.")
        self.matvecs += 1
        pieces = self.layout.split(vector)
        # A gradient that does not depend on the parameters (a linear part) has no graph: its rows are 0.
        outputs = {name: g for name, g in self._gradients.items() if g is not None and g.requires_grad}
        if not outputs:
            return self._ranks.mean(torch.zeros_like(vector))
        products = torch.autograd.grad(
            list(outputs.values()),
            list(self._leaves.values()),
            grad_outputs=[pieces[name].to(output.dtype) for name, output in outputs.items()],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        flat = self.layout.flatten(dict(zip(self._leaves, products, strict=True)), self.batch).detach()
        return self._ranks.mean(flat)

    def release(self) -> None:
        """Let go of graph and gradient, several times the parameters' size: no product can be taken any more."""
        self._gradients = None
        self.gradient = self.gradient.new_empty(0)


class Hessian(Jacobian):
    """Hessian of a scalar function of a params dict, as products with a flat vector.

    Args:
        loss: Function from the params to a scalar, or to one value a task (see :class:`Jacobian`).
        params: Where to differentiate.
        layout: Layout of one block, where there are several.
    """

    def __init__(self, loss: Callable[[Params], Tensor], params: Params, layout: Layout | None = None) -> None:
        super().__init__(gradient_of(loss), params, layout)


class FiniteDifference:
    """Products with the Jacobian of a gradient field by central differences: two gradients a product.

    Args:
        field: The gradient field. Every evaluation starts from the same random state, so that dropout does not make
            it another function each time.
        params: Where to differentiate.
        layout: Layout of one block, where there are several.
    """

    def __init__(self, field: Field, params: Params, layout: Layout | None = None) -> None:
        self.layout = layout or Layout(params)
        self.batch = 0 if layout is None else 1
        self._field = field
        self._centre = self.layout.flatten({name: value.detach() for name, value in params.items()}, self.batch)
        norm = torch.linalg.vector_norm(self._centre, dim=-1, keepdim=True)
        # Balances the rounding of the gradients against the third derivative.
        self._step = torch.finfo(self._centre.dtype).eps ** (1 / 3) * (1 + norm)
        self.value, self.gradient = self._evaluate(self._centre)
        self._ranks = Ranks()
        self.matvecs = 0

    def across(self, ranks: Ranks) -> None:
        """Make this the operator of the ranks' mean gradient field, from here on.

        Args:
            ranks: The ranks; each calls this, and every product.
        """
        _average(self, ranks)

    def _evaluate(self, point: Tensor) -> tuple[Tensor, Tensor]:
        leaves = {name: piece.detach().requires_grad_() for name, piece in self.layout.split(point).items()}
        torch.manual_seed(0)
        value, gradients = self._field(leaves, False)
        return value, self.layout.flatten(_filled(gradients, leaves), self.batch).detach()

    def __call__(self, vector: Tensor) -> Tensor:
        """Multiply with a vector.

        Args:
            vector: Shape ``(n,)``, or ``(tasks, n)`` for the block-diagonal form.

        Returns:
            The product, same shape; of the Jacobian itself, not of its transpose.
        """
        return self.product(vector)

    def release(self) -> None:
        """Do nothing: there is no graph to let go of."""

    def product(self, vector: Tensor, stretch: float = 1.0) -> Tensor:
        """Multiply with a vector, with a step of another length.

        Args:
            vector: Shape ``(n,)``, or ``(tasks, n)`` for the block-diagonal form.
            stretch: Factor on the step.

        Returns:
            The product, same shape.
        """
        self.matvecs += 1
        length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
        reach = stretch * self._step / length.clamp(min=torch.finfo(vector.dtype).tiny)
        ahead, behind = (self._evaluate(self._centre + side * reach * vector)[1] for side in (1.0, -1.0))
        return self._ranks.mean((ahead - behind) / (2 * reach))


def _filled(gradients: dict[str, Tensor | None], leaves: Params) -> Params:
    """Zeros where the field does not depend on a parameter."""
    known = {name: gradients[name] for name in leaves}
    return {name: torch.zeros_like(leaves[name]) if each is None else each for name, each in known.items()}


Operator = Jacobian | FiniteDifference


def _average(operator: Operator, ranks: Ranks) -> None:
    operator.value, operator.gradient = ranks.mean(operator.value), ranks.mean(operator.gradient)
    operator._ranks = ranks


def task_gradient(
    losses: Callable[[Params, Any], Tensor],
    params: Params,
    data: Any,
    *,
    per_task: bool,
    tasks: TaskMap,
    count: int,
) -> tuple[Field, Params, Layout | None]:
    """Gradient field of the mean task loss, or of every task's loss side by side; its Jacobian is the Hessian.

    Args:
        losses: Loss of one task: ``(params, one task's data) -> scalar``.
        params: Parameters by name.
        data: Pytree of tensors with a leading task dimension.
        per_task: False: of the mean. True: block diagonal, on ``(tasks, n)``.
        tasks: How to run over the tasks.
        count: Number of tasks in ``data``.

    Returns:
        The field, the params to take it at, and the layout of one block: what :class:`Jacobian` and
        :class:`FiniteDifference` take.
    """
    if per_task:
        copies = {name: value.detach().expand(count, *value.shape) for name, value in params.items()}
        return gradient_of(lambda each: tasks(losses, each, data, in_dims=(0, 0))), copies, Layout(params)
    return gradient_of(lambda shared: tasks(losses, shared, data, in_dims=(None, 0)).mean()), params, None


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
