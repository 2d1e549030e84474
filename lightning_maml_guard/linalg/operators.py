"""The derivative of a gradient as matrix-vector products over a flat parameter vector.

An operator is a function ``(*batch, n) -> (*batch, n)``. It differentiates a *gradient field* ``theta -> G(theta)``:
the gradient of a loss, whose Jacobian is the Hessian, or the meta-gradient of MAML. One graph of the field is kept and
reused for every product (reverse over reverse), so dropout masks are drawn once and the operator stays one matrix.
Finite differences are the alternative for fields that cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_maml_guard.linalg.lanczos import Matvec
from lightning_maml_guard.linalg.layout import WHOLE, Layout, Params, Space
from lightning_maml_guard.utils.distributed import Ranks
from lightning_maml_guard.utils.random_state import seed_generators
from lightning_maml_guard.utils.task_map import TaskMap


class FieldValue(NamedTuple):
    """A gradient field at one point.

    Attributes:
        value: The scalar whose gradient it is; with one scalar per task, their sum.
        gradients: ``G``, by parameter; None where it does not depend on one.
        by_task: The parameters in the graph as groups of tasks have them, with a leading task dimension; empty where
            the field does not tell the tasks apart.
    """

    value: Tensor
    gradients: dict[str, Tensor | None]
    by_task: Sequence[Params] = ()


# (params that require a gradient, whether the result must be differentiable again) -> value and gradient
Field = Callable[[Params, bool], FieldValue]


def gradient_of(loss: Callable[[Params], Tensor]) -> Field:
    """Make the gradient field of a loss of the params: a scalar, or one per task if the params have a task dimension.

    The field raises a ValueError if the loss does not depend on the parameters in a differentiable way.
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
        dense = [each.to_dense() if each is not None and each.is_sparse else each for each in gradients]
        return FieldValue(value.detach(), dict(zip(params, dense, strict=True)))

    return field


class Jacobian:
    """Products with the transposed Jacobian of a gradient field (its eigenvalues are the Jacobian's).

    For the gradient of a loss that is the Hessian. ``params`` are detached; nothing is written to them. ``layout`` is
    the layout of one block if the params have a leading task dimension: the operator is then block diagonal, one block
    per task, and its vectors have shape ``(tasks, n)`` instead of ``(n,)``.
    """

    def __init__(self, field: Field, params: Params, layout: Layout | None = None) -> None:
        self.layout = layout or Layout(params)
        self.batch = 0 if layout is None else 1
        self._field = field
        self._leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        self.value, gradients, self._by_task = field(self._leaves, True)
        self._gradients: Params | None = _filled(gradients, self._leaves)
        # Flat gradient, shape `(n,)` or `(tasks, n)`.
        self.gradient = self.layout.flatten(self._gradients, self.batch).detach()
        self._ranks = Ranks()
        self.matvecs = 0

    def across(self, ranks: Ranks) -> None:
        """Make this the operator of the mean gradient field of all ranks; each must call this, and every product."""
        _average(self, ranks)

    def __call__(self, vector: Tensor) -> Tensor:
        if self._gradients is None:
            raise RuntimeError("Expected a product before release() but it came after: the graph is gone.")
        self.matvecs += 1
        with torch._C.DisableTorchFunction():  # a mode that the graph was built under has nothing to change here
            return self._ranks.mean(self._product(self._gradients, vector))

    def _product(self, gradients: Params, vector: Tensor) -> Tensor:
        pieces = self.layout.split(vector)
        # A gradient that does not depend on the parameters (a linear part) has no graph: its rows are 0.
        outputs = {name: g for name, g in gradients.items() if g.requires_grad}
        if not outputs:
            return torch.zeros_like(vector)
        products = torch.autograd.grad(
            list(outputs.values()),
            list(self._leaves.values()),
            grad_outputs=[pieces[name].to(output.dtype) for name, output in outputs.items()],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return self.layout.flatten(dict(zip(self._leaves, products, strict=True)), self.batch).detach()

    @property
    def tells_tasks_apart(self) -> bool:
        """Whether :meth:`by_task` knows the tasks' shares."""
        return bool(self._by_task)

    def by_task(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return a product, and ``J_task v`` of every task of this process, shape ``(tasks, n)``: ``J`` is their mean.

        It costs no more than the product: the derivatives of ``v . G`` towards each task's own copy of the parameters.
        """
        assert self._gradients is not None
        self.matvecs += 1
        with torch._C.DisableTorchFunction():
            rows = self._rows(self._gradients, vector)
        return self._ranks.mean(rows.mean(0)), rows

    def _rows(self, gradients: Params, vector: Tensor) -> Tensor:
        pieces = self.layout.split(vector)
        outputs = {name: g for name, g in gradients.items() if g.requires_grad}
        copies = [value for group in self._by_task for value in group.values()]
        found = iter(
            torch.autograd.grad(
                list(outputs.values()),
                copies,
                grad_outputs=[pieces[name].to(output.dtype) for name, output in outputs.items()],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            if outputs
            else map(torch.zeros_like, copies)
        )
        groups = [self.layout.flatten({name: next(found) for name in group}, 1) for group in self._by_task]
        rows = torch.cat(groups).detach()
        rows *= len(rows)
        return rows

    def gradient_after(self, step: Tensor) -> Tensor:
        """Evaluate the field a step down from the point, with the same dropout masks."""
        moved = {name: self._leaves[name] - piece for name, piece in self.layout.split(step).items()}
        return self._ranks.mean(_evaluated(self._field, moved, self.layout, self.batch)[1])

    def release(self) -> None:
        """Free graph and gradient, several times the size of the parameters; no product is possible any more."""
        self._gradients, self._by_task = None, ()
        self.gradient = self.gradient.new_empty(0)


class Hessian(Jacobian):
    """The Hessian of a loss as products with a flat vector; see :class:`Jacobian`."""

    def __init__(self, loss: Callable[[Params], Tensor], params: Params, layout: Layout | None = None) -> None:
        super().__init__(gradient_of(loss), params, layout)


class FiniteDifference:
    """Products with the Jacobian itself by central differences of the gradient field: two gradients per product.

    Every evaluation starts from the same random state, so that dropout does not make it another function each time.
    ``error`` is the relative error of the gradients, beside rounding. In a ``space`` that is split over processes
    ``params`` and vectors are the entries that lie here, and the field's values those of all processes together.
    """

    def __init__(
        self, field: Field, params: Params, layout: Layout | None = None, *, space: Space = WHOLE, error: float = 0.0
    ) -> None:
        self.layout = layout or Layout(params, space)
        self.batch = 0 if layout is None else 1
        self._field = field
        self._centre = self.layout.flatten({name: value.detach() for name, value in params.items()}, self.batch)
        # Balances the error of the gradients against the third derivative.
        self.error = max(torch.finfo(self._centre.dtype).eps, error)
        self._step = self.error ** (1 / 3) * (1 + self.layout.space.norm(self._centre))
        self.value, self.gradient = self._evaluate(self._centre)
        self._ranks = Ranks()
        self.matvecs = 0

    def across(self, ranks: Ranks) -> None:
        """Make this the operator of the mean gradient field of all ranks; each must call this, and every product."""
        _average(self, ranks)

    def _evaluate(self, point: Tensor) -> tuple[Tensor, Tensor]:
        return _evaluated(self._field, self.layout.split(point), self.layout, self.batch)

    def __call__(self, vector: Tensor) -> Tensor:
        return self.product(vector)

    def gradient_after(self, step: Tensor) -> Tensor:
        """Evaluate the field a step down from the point, with the same dropout masks."""
        return self._ranks.mean(self._evaluate(self._centre - step)[1])

    def release(self) -> None:
        """Do nothing: there is no graph to free."""

    def product(self, vector: Tensor, stretch: float = 1.0) -> Tensor:
        """Multiply with a vector, with the step of the difference scaled by ``stretch``."""
        self.matvecs += 1
        length = self.layout.space.norm(vector)
        reach = stretch * self._step / length.clamp(min=torch.finfo(vector.dtype).tiny)
        ahead, behind = (self._evaluate(self._centre + side * reach * vector)[1] for side in (1.0, -1.0))
        return self._ranks.mean((ahead - behind) / (2 * reach))


def value_and_gradient(field: Field, params: Params) -> tuple[Tensor, Params]:
    """Evaluate a field, without a graph: the value, and the gradient by parameter."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    value, gradients, _ = field(leaves, False)
    return value, {name: each.detach() for name, each in _filled(gradients, leaves).items()}


def _evaluated(field: Field, params: Params, layout: Layout, batch: int) -> tuple[Tensor, Tensor]:
    """Value and flat gradient of a field, from the random state that every evaluation starts from."""
    seed_generators()
    value, gradient = value_and_gradient(field, params)
    return value, layout.flatten(gradient, batch)


def _filled(gradients: dict[str, Tensor | None], leaves: Params) -> Params:
    """Replace None by zeros."""
    known = {name: gradients[name] for name in leaves}
    return {name: torch.zeros_like(leaves[name]) if each is None else each for name, each in known.items()}


Operator = Jacobian | FiniteDifference


def _average(operator: Operator, ranks: Ranks) -> None:
    operator.value, operator.gradient = ranks.mean(operator.value), ranks.mean(operator.gradient)
    operator._ranks = ranks


def gradients_by_task(
    loss: Callable[[Params, Any], Tensor], params: Params, data: Any, tasks: TaskMap, count: int
) -> tuple[Field, Params, Layout]:
    """Make the gradient field of every task's loss side by side.

    ``loss`` is that of one task, ``data`` holds ``count`` tasks in a leading dimension. Returns the field, its params
    and the layout of one block, as :class:`Jacobian` and :class:`FiniteDifference` take them.
    """
    copies = {name: value.detach().expand(count, *value.shape) for name, value in params.items()}
    return gradient_of(lambda each: tasks(loss, each, data, in_dims=(0, 0))), copies, Layout(params)


def simplified(hessian: Matvec, rates: Tensor | float) -> Matvec:
    """Hessian of simplified MAML's objective near a minimum, ``H - H A H`` (Takagi et al.: ``A = alpha*I``).

    ``rates`` is ``A``: one inner rate, or one per parameter, shape ``(n,)``. A product takes two products with ``H``.
    """

    def matvec(vector: Tensor) -> Tensor:
        product = hessian(vector)
        return product - hessian(rates * product)

    return matvec


def scaled(matvec: Matvec, scale: Tensor, shift: Tensor | float = 0.0) -> Matvec:
    """Symmetric scaling ``D^(1/2) (A + S) D^(1/2)``, similar to ``D (A + S)``.

    ``scale`` is the diagonal of ``D``, not negative; ``shift`` is the diagonal ``S`` (coupled weight decay).
    """
    root = scale.sqrt()

    def product(vector: Tensor) -> Tensor:
        inner = root * vector
        return root * (matvec(inner) + shift * inner)

    return product
