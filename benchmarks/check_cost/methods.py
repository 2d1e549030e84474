"""The methods: each finds lambda_max of one operator with its own algorithm and counts matrix-vector products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hessian_eigenthings import LambdaOperator
from hessian_eigenthings import lanczos as eigenthings_lanczos
from pyhessian import hessian as pyhessian
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from benchmarks.check_cost.cases import Case, Reference
from benchmarks.meta_step.rows import LayerByLayer
from lightning_maml_guard.linalg.operators import Jacobian
from lightning_maml_guard.networks import Conv4
from lightning_maml_guard.stability.krylov_stopping import Krylov, rounding, run_lanczos
from lightning_maml_guard.theory.critical_rates import CriticalRates
from lightning_maml_guard.theory.ritz import rates_from_lanczos

TOLERANCES = tuple(m * 10.0**-d for d in range(1, 8) for m in (1, 0.5, 0.2) if m * 10.0**-d > 0.9e-7)


@dataclass
class Found:
    """An eigenvalue, the matrix-vector products it took (None: not reached), and its interval where there is one."""

    value: float
    products: float | None
    low: float = math.nan
    high: float = math.nan
    note: str = ""


class Replay:
    """The operator with its products stored: a run from the same start that stops elsewhere reuses them."""

    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        self.operator, self.kept, self.used = operator, [], 0

    def __call__(self, vector: Tensor) -> Tensor:
        if self.used == len(self.kept):
            self.kept.append(self.operator(vector))
        self.used += 1
        return self.kept[self.used - 1]

    def rewind(self) -> Replay:
        self.used = 0
        return self


class PyHessian(pyhessian):
    """PyHessian's own loop over the products of another operator."""

    def __init__(self, matvec: Callable[[Tensor], Tensor], operator: Jacobian) -> None:
        self.model, self.device, self.full_dataset = nn.Module(), "cpu", True
        self.params = [operator.gradient.new_zeros(shape) for shape in operator.layout.shapes.values()]
        self.matvec, self.layout, self.products = matvec, operator.layout, 0

    def dataloader_hv_product(self, v: list[Tensor]) -> tuple[float, list[Tensor]]:
        self.products += 1
        flat = torch.cat([piece.flatten() for piece in v])
        product = self.matvec(flat)
        return float(product @ flat), list(self.layout.split(product).values())


def ours(operator: Jacobian, max_iter: int = 20, tol: float = 1e-2) -> Found:
    run = run_lanczos(operator, operator.layout.size, operator.gradient, None, krylov=Krylov(max_iter, tol))
    noise = max(rounding(operator.gradient), run.asymmetry)
    rates: CriticalRates = rates_from_lanczos(*run.runs[0], 0.0, rounding=noise, resolution=tol)
    note = "" if run.converged else "residual not reached"
    return Found(rates.lambda_max, run.matvecs, *rates.lambda_max_interval, note)


def power(operator: Jacobian, matvec: Callable, tol: float = 1e-3, max_iter: int = 100, seed: int = 0) -> Found:
    torch.manual_seed(seed)
    method = PyHessian(matvec, operator)
    values, _ = method.eigenvalues(maxIter=max_iter, tol=tol)
    return Found(values[0], method.products)


def power_to(operator: Jacobian, known: Reference, error: float, limit: int, seed: int) -> tuple[Found, dict]:
    """PyHessian at the loosest tolerance whose true error is at most this, and its options."""
    kept = Replay(operator)
    for tol in TOLERANCES:
        found = power(operator, kept.rewind(), tol, limit, seed)
        if known.error(found.value) <= error:
            return found, {"tol": tol, "max_iter": limit, "seed": seed}
        if found.products == limit or (tol <= 1e-3 and found.value * known.top < 0):
            break  # it converges to another eigenvalue
    return Found(found.value, None, note=f"not within {found.products} (tolerance {tol:.0e})"), {}


def eigenthings(operator: Jacobian, matvec: Callable, **options) -> Found:
    found = eigenthings_lanczos(LambdaOperator(matvec, operator.layout.size), seed=0, **options)
    return Found(float(found.eigenvalues[0]), found.iterations)


def eigenthings_to(operator: Jacobian, known: Reference, error: float) -> Found:
    kept = Replay(operator)
    for steps in range(2, 101):
        options = {"k": 1, "which": "LA", "max_iter": steps, "reorthogonalize": True}
        found = eigenthings(operator, kept.rewind(), **options)
        if known.error(found.value) <= error:
            return found
    return Found(found.value, None, note=f"not within {steps}")


def scipy(size: int, matvec: Callable[[np.ndarray], np.ndarray], tol: float = 1e-2) -> Found:
    products = 0

    def counted(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return matvec(vector.reshape(-1).astype(np.float32))

    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    operator = LinearOperator((size, size), matvec=counted, dtype=np.float32)
    values = eigsh(operator, k=1, which="LA", tol=tol, v0=start, return_eigenvectors=False)
    return Found(float(values[0]), products)


def scipy_on(operator: Jacobian) -> Found:
    return scipy(operator.layout.size, lambda vector: operator(torch.from_numpy(vector)).numpy())


class _Episodes(nn.Module):
    """All tasks' predictions of the support sets, in one batch for curvlinops."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = LayerByLayer(network) if isinstance(network, Conv4) else network
        self.apart = isinstance(network, Conv4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.network(each) for each in x]) if self.apart else self.network(x).flatten(0, 1)


def curvlinops_operator(case: Case):
    """The Hessian of the same loss, as curvlinops writes it (forward over reverse)."""
    from curvlinops import HessianLinearOperator

    model = _Episodes(case.module.network)
    loss = nn.CrossEntropyLoss() if model.apart else nn.MSELoss()
    x, y = case.problem.support
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return HessianLinearOperator(model, loss, params, [(x, y.flatten(0, 1))], check_deterministic=False)


def curvlinops_on(case: Case) -> Found:
    operator = curvlinops_operator(case)
    return scipy(operator.shape[0], lambda vector: (operator @ torch.from_numpy(vector)).detach().numpy())
