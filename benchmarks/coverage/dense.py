"""Dense matrices of a problem and the limits that follow, with code of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.coverage.networks import ACTIVATIONS, KINKED, Case, Data, forward, loss_of
from lightning_maml_guard import CurvatureOptions, StabilityReport, measure

QUANTITIES = (
    "lambda_max",
    "simplified beta_c",
    "exact beta_c",
    "exact_beta_c, rate far below",
    "exact_beta_c, rate near it",
    "lambda_max that judges alpha",
)
# A rate near its limit, as a share of it.
NEAR = 0.7
# Eigenvalues below this share of the largest limit no rate; a resolved interval is at most so wide; a kink so close.
FLOOR, RESOLVED, ON_A_KINK = 1e-2, 0.1, 1e-9


class Watched(nn.Module):
    """An activation that remembers how close its inputs came to 0."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation, self.nearest = activation, math.inf

    def forward(self, x: Tensor) -> Tensor:
        self.nearest = min(self.nearest, float(x.detach().abs().min()))
        return self.activation(x)


class Dense:
    """Flat loss and gradients of a case's tasks, written anew."""

    def __init__(self, case: Case) -> None:
        self.case, self.shapes = case, {name: value.shape for name, value in case.problem.params.items()}
        self.activation = Watched(ACTIVATIONS[case.activation]())
        self.theta = torch.cat([value.detach().flatten() for value in case.problem.params.values()]).requires_grad_()

    def flat(self, values: Any) -> Tensor:
        return torch.cat([torch.as_tensor(each).detach().double().flatten() for each in values])

    def loss(self, theta: Tensor, data: Data) -> Tensor:
        pieces = theta.split([shape.numel() for shape in self.shapes.values()])
        params = {n: each.reshape(shape) for (n, shape), each in zip(self.shapes.items(), pieces, strict=True)}
        return loss_of(forward(params, data[0], self.case.norm, self.activation, self.case.layers), data[1])

    def slope(self, theta: Tensor, data: Data) -> Tensor:
        return torch.autograd.grad(self.loss(theta, data), theta, create_graph=True)[0]

    def matrix(self, gradient: Tensor) -> np.ndarray:
        rows = torch.eye(len(self.theta)).double()
        if not gradient.requires_grad:
            return np.zeros(rows.shape)
        return torch.autograd.grad(gradient, self.theta, rows, is_grads_batched=True)[0].numpy()

    def tasks(self) -> list[tuple[Data, Data]]:
        problem = self.case.problem
        return [
            tuple((x[t], y[t]) for x, y in (problem.support, problem.query))  # type: ignore[misc]
            for t in range(problem.tasks)
        ]

    def meta_gradient(self) -> Tensor:
        problem, theta = self.case.problem, self.theta
        rates, found = self.flat(problem.rates().values()), []
        for support, query in self.tasks():
            if problem.order == "simplified":
                step = rates * problem.inner_steps * self.slope(theta, support)
                point = self.theta.clone()
                slope = self.slope(point, query)
                found.append(slope - torch.autograd.grad(slope, point, step, create_graph=True)[0])
                continue
            moved = theta.clone()
            for _ in range(problem.inner_steps):
                moved = moved - rates * self.slope(moved, support)
            if problem.order == "first":
                found.append(self.slope(moved, query))
            else:
                found.append(torch.autograd.grad(self.loss(moved, query), theta, create_graph=True)[0])
        return torch.stack(found).mean(0)


def mean_hessian(case: Case) -> np.ndarray:
    dense = Dense(case)
    found = dense.matrix(torch.stack([dense.slope(dense.theta, support) for support, _ in dense.tasks()]).mean(0))
    return (found + found.T) / 2


def scaling(case: Case) -> tuple[np.ndarray | float, float, float]:
    """What the optimizer makes of a gradient: its diagonal, momentum, and the gain of a step."""
    optimizer = case.optimizer
    if optimizer is None:
        return 1.0, 0.0, 1.0
    group = optimizer.param_groups[0]
    if isinstance(optimizer, SGD):
        return 1.0, group["momentum"], 1.0
    b1, b2 = group["betas"]
    diagonal = [
        1 / ((state["exp_avg_sq"] / (1 - b2 ** float(state["step"]))).sqrt() + group["eps"]).flatten()
        for state in (optimizer.state[value] for value in case.problem.params.values())
    ]
    return torch.cat(diagonal).numpy(), b1, 1 - b1


def largest_rate(mu: complex, momentum: float, gain: float) -> float:
    """Largest rate at which ``v <- m v + g, theta <- theta - rate*gain*v`` contracts along an eigenvalue."""
    if mu.imag == 0 or momentum == 0:
        return 2 * (1 + momentum) * mu.real / abs(mu) ** 2 / gain

    def contracts(rates: np.ndarray) -> np.ndarray:
        trace = 1 + momentum - rates * gain * mu
        root = np.sqrt(trace * trace - 4 * momentum)
        return np.maximum(np.abs(trace + root), np.abs(trace - root)) < 2

    rates = np.geomspace(1e-6, 1, 2000) * 2 * (1 + momentum) / abs(mu) / gain
    first = int(np.argmin(contracts(rates)))
    low, high = (rates[first - 1], rates[first]) if first else (0.0, rates[0])
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if contracts(np.array(middle)) else (low, middle)
    return float(low)


def exact_truth(case: Case, jacobian: np.ndarray) -> float:
    diagonal, momentum, gain = scaling(case)
    root = np.sqrt(diagonal)
    scaled = jacobian * np.multiply.outer(root, root) if isinstance(root, np.ndarray) else jacobian * diagonal
    if case.problem.order == "exact":
        top = float(np.linalg.eigvalsh((scaled + scaled.T) / 2)[-1])
        return largest_rate(complex(top), momentum, gain) if top > 0 else math.inf
    values = np.linalg.eigvals(scaled)
    floor = FLOOR * np.abs(values).max()
    known = [complex(mu) for mu in values if mu.real > 0 and abs(mu) > floor]
    return min((largest_rate(mu, momentum, gain) for mu in known), default=math.inf)


def simplified_truth(case: Case, hessian: np.ndarray) -> float:
    diagonal, momentum, gain = scaling(case)
    rates = Dense(case).flat(case.problem.rates().values()).numpy()
    steps = case.problem.inner_steps if case.problem.order == "simplified" else 1
    weights = np.sqrt(np.maximum(rates, 0))
    if steps * np.linalg.eigvalsh(hessian * np.multiply.outer(weights, weights))[-1] > 1:
        return 0.0
    curvature = hessian - hessian @ (steps * rates[:, None] * hessian)
    root = np.sqrt(np.broadcast_to(diagonal, len(rates)))
    top = float(np.linalg.eigvalsh(curvature * np.multiply.outer(root, root))[-1])
    return 2 * (1 + momentum) / gain / top if top > 0 else math.inf


@dataclass(frozen=True)
class Outcome:
    """A quantity beside its truth; ``kink`` if a ReLU sits on its kink there, where the matrix does not exist."""

    quantity: str
    value: float
    interval: tuple[float, float]
    truth: float
    kink: bool

    @property
    def inside(self) -> bool:
        low, high = self.interval
        return bool(math.isnan(self.value)) or low * (1 - 1e-6) <= self.truth <= high * (1 + 1e-6)

    @property
    def resolved(self) -> bool:
        low, high = self.interval
        return low == high or (low > 0 and high - low <= RESOLVED * high)


def outcomes(case: Case, curvature: CurvatureOptions) -> tuple[list[Outcome], StabilityReport]:
    """Measure a case by both criteria and compare it with the dense matrices.

    ``exact_beta_c`` is measured to the tolerance and, as a run for a verdict leaves it, at rates far below the limit and
    near it.
    """
    given: dict = {"optimizer": case.optimizer, "beta": None if case.optimizer else 1e-3}
    report = measure(case.problem, **given, curvature=replace(curvature, criterion="simplified"))
    full, early = (
        measure(case.problem, **given, curvature=replace(curvature, criterion="exact", tol=tol))
        for tol in (0.99 * curvature.tol, curvature.tol)
    )
    near = measure(case.problem, **_at(case, NEAR * full.exact_beta_c), curvature=curvature)
    hessian = mean_hessian(case)
    dense = Dense(case)
    jacobian = dense.matrix(dense.meta_gradient())
    exact = exact_truth(case, jacobian)
    if full.exact_beta_c == 0 and np.linalg.eigvals(jacobian).real.min() < 0:
        exact = 0.0  # the inner rate turned a direction: no rate is stable
    kink = case.activation in KINKED and dense.activation.nearest < ON_A_KINK
    top = float(np.linalg.eigvalsh(hessian)[-1])
    return [
        Outcome(QUANTITIES[0], report.lambda_max, report.lambda_max_interval, top, kink),
        Outcome(QUANTITIES[1], report.beta_c, report.beta_c_interval, simplified_truth(case, hessian), kink),
        Outcome(QUANTITIES[2], full.exact_beta_c, full.exact_beta_c_interval, exact, kink),
        Outcome(QUANTITIES[3], early.exact_beta_c, early.exact_beta_c_interval, exact, kink),
        Outcome(QUANTITIES[4], near.exact_beta_c, near.exact_beta_c_interval, exact, kink),
        Outcome(QUANTITIES[5], early.lambda_max, early.lambda_max_interval, top, kink),
    ], early


def _at(case: Case, rate: float) -> dict[str, Any]:
    """Arguments of a measurement at another meta rate, if it is one."""
    usable = math.isfinite(rate) and rate > 0
    if case.optimizer is None:
        return {"beta": rate if usable else 1e-3}
    if usable:
        for group in case.optimizer.param_groups:
            group["lr"] = rate
    return {"optimizer": case.optimizer}
