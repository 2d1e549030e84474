"""What a check costs: ``python -m tests.benchmarks.check_cost``.

Meta-training steps, checks by either criterion and PyHessian's power iteration take turns in one process; printed are
products, the median time as a multiple of a meta-training step (median of the ratios of one turn), and the
error of lambda_max against a Lanczos run that is converged to 1e-6.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from lightning_maml_guard import MetaLearningModule, measure
from lightning_maml_guard._vectorize import TaskMap
from lightning_maml_guard.curvature.pyhessian import PowerIteration, largest_eigenvalue
from lightning_maml_guard.guard.products import Memory
from lightning_maml_guard.maml.gradients import meta_gradient
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.images import Omniglot
from lightning_maml_guard.tasks.regression import Sinusoid

DATA = os.environ.get("LMG_DATA", str(Path(__file__).parents[3] / "shared" / "data"))


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def trained(module, family, tasks: int, steps: int):
    """Train a little, in a plain loop, so that the second moments of Adam exist."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for index in range(steps):
        batch = family.sample(tasks, episode_generator(0, "train", index))
        gradients = meta_gradient(module.meta_problem(batch), tasks=module.task_map).gradients
        for name, parameter in module.theta().items():
            parameter.grad = gradients[name]
        optimizer.step()
    return optimizer, module.meta_problem(family.sample(tasks, episode_generator(0, "val", 0)))


def mean_support_loss(problem):
    tasks = TaskMap(problem.task_chunk_size)
    return lambda params: tasks(problem.task_loss, params, problem.support, in_dims=(None, 0)).mean()


def main(turns: int = 9) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rows = [
        ("sinusoid MLP 1-40-40-1, 25 tasks", MetaLearningModule(mlp()), Sinusoid(), 25, 500, turns),
        (
            "Omniglot conv4-64, 16 tasks",
            MetaLearningModule(conv4(), inner_lr=0.4, task_chunk_size=8),
            Omniglot(DATA),
            16,
            20,
            max(turns // 3, 3),
        ),
    ]
    print("| problem | check | products | x meta-training step | ms | error of lambda_max |\n|---|---|---|---|---|---|")
    for name, module, family, tasks, steps, repeats in rows:
        optimizer, problem = trained(module, family, tasks, steps)
        reference = measure(problem, max_iter=200, tol=1e-6).lambda_max
        memory = Memory()
        measure(problem, optimizer=optimizer, memory=memory)  # the self-check of the first measurement
        measure(replace(problem, order="first"), memory=memory)
        checks = {
            "poster's criterion, SGD": lambda p=problem, m=memory: measure(p, beta=1e-3, memory=m),
            "poster's criterion, Adam": lambda p=problem, o=optimizer, m=memory: measure(p, optimizer=o, memory=m),
            "exact criterion, SGD": lambda p=problem, m=memory: measure(p, beta=1e-3, criterion="exact", memory=m),
            "exact criterion, Adam": lambda p=problem, o=optimizer, m=memory: measure(
                p, optimizer=o, criterion="exact", memory=m
            ),
            "first-order MAML, exact criterion, SGD": lambda p=problem, m=memory: measure(
                replace(p, order="first"), beta=1e-3, criterion="exact", memory=m
            ),
            "PyHessian's defaults, lambda_max only": lambda p=problem: largest_eigenvalue(
                mean_support_loss(p), {n: v.detach() for n, v in p.params.items()}, max_iter=100, tol=1e-3
            ),
        }
        times = {check: [] for check in checks}
        ratios = {check: [] for check in checks}
        for _ in range(repeats):
            step = seconds(lambda p=problem, m=module: meta_gradient(p, tasks=m.task_map))
            for check, work in checks.items():
                times[check].append(seconds(work))
                ratios[check].append(times[check][-1] / step)
        for check, work in checks.items():
            report = work()
            error = abs(report.lambda_max / reference - 1)
            products = report.matvecs if isinstance(report, PowerIteration) else report.hvps
            print(
                f"| {name} | {check} | {products} | {median(ratios[check]):.1f} | {1e3 * median(times[check]):.0f} "
                f"| {error:.1e} |"
            )


if __name__ == "__main__":
    main()
