"""The guard's limits against training of small networks: ``python -m benchmarks.limits_networks``.

Sinusoid networks (tanh and ReLU, exact MAML, K = 1, fixed tasks, float64) are brought to a minimum of the meta loss:
gradient descent with a small rate, damped Newton, gradient descent with half the limit. Runs then start 1e-4 away from
it along random directions. The largest outer learning rate at which they return is found by bisection and printed
beside ``exact_beta_c`` and beside ``beta_c`` of the simplified criterion. The error of the latter is that of applying
the simplified criterion to exact MAML; 0 means that it allows no outer learning rate at this alpha. Where a ReLU
network's kinks lie within 1e-4 of the minimum, runs start 1e-7 away, and the table says so.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from statistics import median

import torch

from benchmarks.common.workers import each_done
from lightning_maml_guard import CurvatureOptions, EpisodeBatch, MetaLearningModule, MetaProblem, measure
from lightning_maml_guard.linalg.layout import Layout
from lightning_maml_guard.linalg.operators import Jacobian
from lightning_maml_guard.maml.jacobian import meta_field
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.task_map import TaskMap
from tests.helpers import bisect

AWAY, STEPS, TASKS, DIRECTIONS, TRAINING, RATE, POLISH = (1e-4, 1e-7), 1500, 3, 2, 8000, 0.02, 300
CURVATURE, ALPHAS = CurvatureOptions(tol=1e-6, max_iter=60), (0.0005, 0.002, 0.01)
# Hidden units and shots. A ReLU network's minima lie at kinks, where J does not exist, more often than not: several
# seeds are tried, and those whose gradient does not vanish are marked.
SIZES, SEEDS, SMOOTH = {"tanh": (6, 100), "relu": (3, 20)}, {"tanh": (0,), "relu": (0, 3, 4)}, 1e-3


def problem_of(activation: str, seed: int, alpha: float) -> MetaProblem:
    torch.manual_seed(seed)
    hidden, shots = SIZES[activation]
    module = MetaLearningModule(mlp(1, (hidden,), 1, activation=activation).double(), inner_lr=alpha)
    support, query = Sinusoid(shots=shots).sample(TASKS, torch.Generator().manual_seed(seed))
    return module.meta_problem(EpisodeBatch(*[(x.double(), y.double()) for x, y in (support, query)]))


class Objective:
    """Meta loss and meta-gradient over a flat parameter vector."""

    def __init__(self, problem: MetaProblem) -> None:
        self.field = meta_field(problem, TaskMap())
        params = {n: p.detach() for n, p in problem.params.items()}
        self.layout = Layout(params)
        self.start = self.layout.flatten(params)

    def __call__(self, theta: torch.Tensor) -> tuple[float, torch.Tensor]:
        leaves = {n: p.detach().requires_grad_() for n, p in self.layout.split(theta).items()}
        found = self.field(leaves, False)
        return float(found.value), torch.cat([g.flatten() for g in found.gradients.values()])

    def hessian(self, theta: torch.Tensor) -> torch.Tensor:
        at = Jacobian(self.field, self.layout.split(theta))
        return torch.stack([at(row) for row in torch.eye(len(theta)).double()])


def minimum(objective: Objective) -> torch.Tensor:
    """Gradient descent with a small rate, whose edge of stability (2/rate) bounds the sharpness, then damped Newton."""
    theta = objective.start.clone()
    for _ in range(TRAINING):
        theta = theta - RATE * objective(theta)[1]
    value, gradient = objective(theta)
    damping = 1.0
    for _ in range(POLISH):
        values, vectors = torch.linalg.eigh(objective.hessian(theta))
        step = vectors @ ((vectors.T @ gradient) / (values.abs() + damping))
        after, moved = objective(theta - step)
        if after < value:
            theta, value, gradient, damping = theta - step, after, moved, damping / 2
        else:
            damping *= 4
        if gradient.norm() < 1e-9 or damping > 1e8:
            break
    return theta


def returns(objective: Objective, at: torch.Tensor, direction: torch.Tensor, beta: float, away: float) -> bool:
    """Return True if a run that starts ``away`` from the minimum stays close to the one that starts there.

    Directions without curvature neither grow nor shrink, hence the factor. Unstable ones grow by orders of magnitude.
    """
    theta, reference = at + away * direction, at
    for _ in range(STEPS):
        theta, reference = theta - beta * objective(theta)[1], reference - beta * objective(reference)[1]
        if not float((theta - reference).norm()) < 3 * away:
            return False
    return True


def put(problem: MetaProblem, objective: Objective, theta: torch.Tensor) -> None:
    with torch.no_grad():
        for name, piece in objective.layout.split(theta).items():
            problem.params[name].copy_(piece)


def row(activation: str, seed: int, alpha: float) -> str:
    problem = problem_of(activation, seed, alpha)
    objective = Objective(problem)
    at = minimum(objective)
    put(problem, objective, at)
    rate = 0.5 * measure(problem, curvature=CURVATURE).exact_beta_c
    for _ in range(1000):
        at = at - rate * objective(at)[1]
    put(problem, objective, at)
    left = float(objective(at)[1].norm())
    head = f"| {activation} | {seed} | {alpha} | {left:.0e} "
    if left > SMOOTH:
        return head + "| | no smooth minimum | | | | |"
    report = measure(problem, curvature=CURVATURE)
    limit = report.exact_beta_c
    for away in AWAY:
        found = []
        for index in range(DIRECTIONS):
            direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(index)).double()
            direction /= direction.norm()

            def stays(beta: float, along: torch.Tensor = direction, away: float = away) -> bool:
                return returns(objective, at, along, beta, away)

            if stays(0.9 * limit):
                found.append(bisect(stays, 0.9 * limit, 1.1 * limit, 2e-3))
        if len(found) == DIRECTIONS:
            middle = median(found)
            return (
                f"{head}| {away:.0e} | {middle:.5g} | {limit:.5g} | {middle / limit:.4f} | {report.sgd_beta_c:.5g} "
                f"| {report.sgd_beta_c / middle - 1:+.1%} |"
            )
    return f"{head}| | below {0.9 * limit:.4g} | {limit:.5g} | | {report.sgd_beta_c:.5g} | |"


def main() -> None:
    torch.set_num_threads(1)
    print(
        "| network | seed | alpha | gradient left | start | bisected | exact_beta_c | ratio | simplified criterion's beta_c | its error |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    cases = [(activation, seed, alpha) for activation, seeds in SEEDS.items() for seed, alpha in product(seeds, ALPHAS)]
    for line in each_done([partial(row, *case) for case in cases], "15 minutes"):
        print(line, flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.limits_networks", description=__doc__).parse_args()
    main()
