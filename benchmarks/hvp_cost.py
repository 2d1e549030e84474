"""Time of what a check does, in training steps: ``python -m benchmarks.hvp_cost [ROW ...]``.

``stability.hvp`` and ``stability.adaptation`` count the cost of checks by the upper end of these figures, so that the
same run checks at the same steps on any machine. A training step is a gradient of the meta-update or, for "plain", of
the loss alone. Every figure is a median over turns in which the step and the rest alternate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch

from benchmarks.common.workers import each_done
from benchmarks.guarded_training import ROWS
from lightning_maml_guard import MetaLearningModule, MetaProblem
from lightning_maml_guard.linalg.operators import Jacobian, gradient_of
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.stability.adaptation import COST, adaptation
from lightning_maml_guard.stability.hvp import HESSIAN_PRICE, UPDATE_PRICE
from lightning_maml_guard.stability.objective import MamlObjective
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.task_map import TaskMap

ORDERS = ("exact", "first", "simplified")
WIDE = (lambda: mlp(hidden=(512, 512)), lambda: Sinusoid(10, 10), 25, 0.01, 5)


def problem_of(row: Sequence, order: str) -> MetaProblem:
    """The problem of a training's first batch."""
    network, family, tasks, alpha, inner_steps = row[:5]
    torch.manual_seed(0)
    module = MetaLearningModule(network(), inner_lr=alpha, inner_steps=inner_steps, order=order)
    drawn = family()
    drawn.setup()
    return module.meta_problem(drawn.sample(tasks, episode_generator(0, "train", 0), "train"))


def timed(works: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median seconds of each. They take turns; the first turn is left out."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - began)
    return {name: median(seconds[1:]) for name, seconds in taken.items()}


def costs(row: Sequence, order: str, turns: int) -> dict[str, float]:
    """Time of each, divided by the time of a training step."""
    problem = problem_of(row, order)
    tasks = TaskMap(problem.task_chunk_size, looped=problem.looped)
    objective = MamlObjective(problem, "support", tasks)
    field, params, *_ = objective.update(1.0)
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    plain = gradient_of(objective.mean_loss)
    with double_backward():
        update, curvature = Jacobian(*objective.update(1.0)[:3]), Jacobian(*objective.curvature(False)[:3])
        vector = torch.randn(update.layout.size, generator=torch.Generator().manual_seed(0))
        took = timed(
            {
                "step": lambda: field(leaves, False),
                "J graph": lambda: Jacobian(*objective.update(1.0)[:3]),
                "J": lambda: update(vector),
                "H graph": lambda: Jacobian(*objective.curvature(False)[:3]),
                "H": lambda: curvature(vector),
                "by task": lambda: objective.curvature_by_task(update.layout.split(vector)),
                "plain step": lambda: plain(leaves, False),
                "adaptation": lambda: adaptation(problem, tasks),
            },
            turns,
        )
    found = {name: seconds / took["step"] for name, seconds in took.items()}
    found["plain H"] = took["H"] / took["plain step"]
    return found


def main() -> None:
    """Time and print."""
    rows = {**ROWS, "sinusoid 512-512, K=5": WIDE}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hvp_cost", description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(rows))
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(2)
    columns = ("J graph", "J", "H graph", "H", "by task", "plain H", "adaptation")
    print(f"| training | order | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    both = [(name, order) for name in given.rows for order in ORDERS]
    jobs = [partial(costs, rows[name], order, given.turns) for name, order in both]
    for (name, order), found in zip(both, each_done(jobs, "5 minutes with all rows"), strict=True):
        print(f"| {name} | {order} | {' | '.join(f'{found[column]:.2f}' for column in columns)} |", flush=True)
    counted = (
        UPDATE_PRICE.graph,
        UPDATE_PRICE.product,
        HESSIAN_PRICE.graph,
        HESSIAN_PRICE.product,
        UPDATE_PRICE.graph + UPDATE_PRICE.product,
    )
    print(
        f"| counted as | | {' | '.join(f'{cost:.2f}' for cost in counted)} | {UPDATE_PRICE.product:.2f} | {COST:.2f} |"
    )


if __name__ == "__main__":
    main()
