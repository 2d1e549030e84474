"""PyHessian as an estimator backend, on copies: it never gets the user's model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.linalg.operators import Hessian
from lightning_maml_guard.utils.random_state import seed_generators


class PowerIteration(NamedTuple):
    """Result of :func:`largest_eigenvalue`.

    Attributes:
        lambda_max: Largest eigenvalue, with its sign.
        lambda_min: The negative eigenvalue that dominates in magnitude, else ``lambda_max``.
        residual: ``|H v - lambda v|`` of the returned eigenvector: an eigenvalue lies that close.
        matvecs: Number of Hessian-vector products, that of the residual included.
    """

    lambda_max: float
    lambda_min: float
    residual: float
    matvecs: int


class _Objective(nn.Module):
    """A model whose output is the loss itself, over its own copy of the parameters."""

    def __init__(self, loss: Callable[[Params], Tensor], params: Params) -> None:
        super().__init__()
        self.names = list(params)
        self.values = nn.ParameterList([nn.Parameter(value.detach().clone()) for value in params.values()])
        self.loss = loss
        self.shift = 0.0
        self.centre = [value.detach().clone() for value in params.values()]

    def forward(self, _: Tensor) -> Tensor:
        value = self.loss(dict(zip(self.names, self.values, strict=True)))
        # Also with shift 0: PyHessian needs every parameter to appear in every derivative.
        square = sum(((p - c) ** 2).sum() for p, c in zip(self.values, self.centre, strict=True))
        return value + 0.5 * self.shift * square


def largest_eigenvalue(
    loss: Callable[[Params], Tensor], params: Params, *, max_iter: int, tol: float
) -> PowerIteration:
    """Compute the largest eigenvalue of the Hessian of ``loss`` at ``params`` with PyHessian's power iteration.

    Power iteration converges to the eigenvalue largest in *magnitude*. If that is negative, it runs again on ``H +
    s*I`` (``s`` its magnitude), whose dominant eigenvalue is ``lambda_max + s``. PyHessian gives no error bound, so one
    more Hessian-vector product measures the residual. ``tol`` is PyHessian's: the relative change between two steps.
    """
    from pyhessian import hessian

    def fixed(at: Params) -> Tensor:
        seed_generators()  # for every product, else it is not one matrix
        return loss(at)

    objective = _Objective(fixed, params)
    first = next(iter(params.values()))
    dummy = torch.zeros(1, device=first.device)
    products = 0

    def count(_: Tensor) -> None:
        nonlocal products
        products += 1

    def run() -> tuple[float, list[Tensor]]:
        with warnings.catch_warnings():
            # The memory leak that torch warns of is avoided below, by deleting .grad.
            warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
            estimator = hessian(objective, lambda value, _: value, data=(dummy, dummy), cuda=first.is_cuda)
        estimator.gradsH[0].register_hook(count)
        values, vectors = estimator.eigenvalues(maxIter=max_iter, tol=tol, top_n=1)
        for parameter in objective.values:
            parameter.grad = None  # breaks the cycle that backward(create_graph=True) leaves
        return float(values[0]), [piece.detach() for piece in vectors[0]]

    with torch.random.fork_rng(), _default_dtype(first.dtype):
        value, vector = run()
        lambda_min = value
        if value < 0:
            objective.shift = abs(value)
            shifted, vector = run()
            value = shifted - objective.shift
        operator = Hessian(fixed, params)
    flat = operator.layout.flatten(dict(zip(params, vector, strict=True)))
    flat = flat / torch.linalg.vector_norm(flat)
    residual = float(torch.linalg.vector_norm(operator(flat) - value * flat))
    return PowerIteration(value, min(value, lambda_min), residual, products + 1)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """PyHessian draws its start vector in the default dtype, which must be that of the parameters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
