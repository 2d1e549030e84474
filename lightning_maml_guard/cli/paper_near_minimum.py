"""The panel ``near-minimum``: Takagi et al.'s theorem on real images, from close to a minimum of one task's loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from lightning_maml_guard.cli.paper_panels import SMALL, WAYS
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.diagram import phase_diagram
from lightning_maml_guard.phase.result import PhaseDiagram
from lightning_maml_guard.tasks.episodes import TaskFamily, episode_generator
from lightning_maml_guard.tasks.images import MiniImageNet, Omniglot
from lightning_maml_guard.theory.critical_rates import critical_rates

# The networks of the panels; the one task has only a support set, which is the query set too.
SETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], TaskFamily]]] = {
    "omniglot": (SMALL["omniglot"].network, lambda: Omniglot(n_way=WAYS)),
    "miniimagenet": (SMALL["miniimagenet"].network, lambda: MiniImageNet(n_way=WAYS, queries=1, image_size=32)),
}
ORDERS = ("simplified", "exact")
STEPS = 40
# Rates in units of plain gradient descent's limits: alpha * lambda_max, and beta * lambda_max / 2.
SHARES, LEVELS = np.linspace(0, 2, 11), np.logspace(-0.2, 1.1, 14)
# Distance from the minimum, per parameter: so near that the loss is quadratic in double precision.
DISTANCE = 1e-7
# Above this the fit has not reached a minimum of zero loss, and the Gauss-Newton spectrum would not be the Hessian's.
ZERO_LOSS = 1e-12


def minimum(dataset: str, seed: int, device: torch.device) -> tuple[MetaProblem, np.ndarray]:
    """Fit a network to one task's images; return the problem near that minimum and the Hessian's eigenvalues at it.

    The loss is the squared error on one-hot labels. The fit is exact, so the Hessian is ``2/n * J^T J`` with the
    Jacobian ``J`` of the outputs, and ``2/n * J J^T`` has its eigenvalues other than 0.
    """
    make, tasks = SETS[dataset]
    torch.manual_seed(seed)
    network = make().double().to(device)
    family = tasks()
    family.setup()
    (images, labels), _ = family.sample(1, episode_generator(seed, "train", 0), "train")
    images, targets = images.double().to(device), F.one_hot(labels, WAYS).double().to(device)

    def task_loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        outputs = functional_call(network, params, (data[0],))
        return (outputs - data[1]).square().sum(-1).mean()

    task = images[0], targets[0]
    params = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    fit = torch.optim.LBFGS(
        list(params.values()), max_iter=2000, history_size=50, tolerance_grad=1e-13, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        fit.zero_grad()
        loss = task_loss(params, task)
        loss.backward()
        return loss

    fit.step(closure)
    loss = float(task_loss(params, task).detach())
    if not loss < ZERO_LOSS:
        raise RuntimeError(f"The fit of seed {seed} on {dataset} ended at a loss of {loss:.3g}: take another --seed.")
    fitted = {name: value.detach() for name, value in params.items()}
    rows = jacrev(lambda theta: functional_call(network, theta, (task[0],)).flatten())(fitted)
    jacobian = torch.cat([row.flatten(1) for row in rows.values()], 1)
    eigenvalues = torch.linalg.eigvalsh(2 / len(task[0]) * jacobian @ jacobian.T).cpu().numpy()
    noise = torch.Generator().manual_seed(seed)
    near = {
        name: value + DISTANCE * torch.randn(value.shape, generator=noise, dtype=value.dtype).to(device)
        for name, value in fitted.items()
    }
    return MetaProblem(near, task_loss, (images, targets), (images, targets)), eigenvalues


def train_near(
    problem: MetaProblem, eigenvalues: np.ndarray, shares: np.ndarray, levels: np.ndarray, steps: int
) -> PhaseDiagram:
    """Train a grid of rates, given in units of plain gradient descent's limits, from near the minimum."""
    sharpest = float(eigenvalues.max())
    return phase_diagram(problem, shares / sharpest, levels * 2 / sharpest, steps, measure_every=0)


def limits(eigenvalues: np.ndarray, order: str, alphas: np.ndarray) -> np.ndarray:
    """Theory's largest outer rate at each inner one; 0 where none is stable."""
    return np.array([critical_rates(eigenvalues, alpha, order=order).beta_c for alpha in alphas])


def compared(diagram: PhaseDiagram, eigenvalues: np.ndarray) -> dict[str, Any]:
    """Compare the largest outer rates up to which all trained with theory's, in steps of the grid.

    A run far above the limit can be thrown out of this minimum and find another.

    Where theory has no stable outer rate, none may train: the difference is then 0, and infinite otherwise.
    """
    sharpest = float(eigenvalues.max())
    theory = limits(eigenvalues, diagram.order, diagram.alphas)
    step = math.log(diagram.betas[1] / diagram.betas[0])
    found = diagram.contiguous_beta
    none = theory == 0
    with np.errstate(divide="ignore"):
        steps = np.abs(np.log(found / np.where(none, np.nan, theory))) / step
    steps = np.where(none, np.where(np.isnan(found), 0.0, math.inf), np.where(np.isnan(found), math.inf, steps))
    return {
        "curve": {
            "alpha / alpha_c": diagram.alphas * sharpest,
            "beta * lambda_max / 2, largest up to which all trained": found * sharpest / 2,
            "beta * lambda_max / 2, theory": theory * sharpest / 2,
        },
        "grid step in decades": step / math.log(10),
        "largest difference in grid steps": float(steps.max()),
    }
