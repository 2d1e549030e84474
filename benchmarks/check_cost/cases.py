"""The cases: a network at initialisation or after training, and its operators in float32 and float64."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from benchmarks.meta_step.rows import ROWS
from lightning_maml_guard import MetaLearningModule, MetaProblem
from lightning_maml_guard.linalg.lanczos import lanczos, start_vector
from lightning_maml_guard.linalg.operators import Jacobian
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.stability.objective import MamlObjective
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.images import Omniglot
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.theory.ritz import ritz_values
from lightning_maml_guard.utils.double_backward import double_backward

DATA = os.environ.get("LMG_DATA", str(Path(__file__).parents[3] / "shared" / "data"))
REFERENCE_STEPS, REFERENCE_RESIDUAL, OTHER_SEED = 200, 1e-8, 1


@dataclass
class Spec:
    """A network, its tasks, and how long to train; ``limit``: after how many products a peer's run ends."""

    title: str
    network: Callable[[], torch.nn.Module]
    family: Callable[[], Any]
    tasks: int
    alpha: float
    steps: int
    turns: int
    limit: int
    seeds: int
    operators: str


SPECS = {
    "mlp": Spec("sinusoid MLP 1-40-40-1, 25 tasks", mlp, Sinusoid, 25, 0.01, 500, 5, 2000, 3, "HJ"),
    "transformer": Spec(
        "transformer, 8 tasks", ROWS["transformer"].network, lambda: Sinusoid(20, 20), 8, 0.01, 500, 5, 2000, 3, "HJ"
    ),
    "conv4": Spec("Omniglot conv4-64, 8 tasks", conv4, lambda: Omniglot(DATA), 8, 0.4, 40, 3, 300, 1, "H"),
}


@dataclass
class Case:
    """One network in one state."""

    title: str
    spec: Spec
    module: MetaLearningModule
    optimizer: torch.optim.Optimizer
    problem: MetaProblem
    step: Callable[[], Any] = field(init=False)

    def __post_init__(self) -> None:
        self.step = lambda: meta_gradient(self.problem, tasks=self.module.task_map)

    def operator(self, which: str, dtype: torch.dtype = torch.float32, own: bool = False) -> Jacobian:
        """``H`` of the mean support loss, or the Jacobian ``J`` of the meta-update; ``own``: with torch's own norms."""
        with nullcontext() if own else double_backward():  # as in a check
            objective = MamlObjective(in_dtype(self.problem, dtype), "support", self.module.task_map)
            return Jacobian(*(objective.curvature(False) if which == "H" else objective.update())[:3])


def in_dtype(problem: MetaProblem, dtype: torch.dtype) -> MetaProblem:
    if dtype == torch.float32:
        return problem

    def convert(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.detach().to(dtype) if leaf.is_floating_point() else leaf

    return replace(
        problem,
        params={name: convert(value) for name, value in problem.params.items()},
        support=tree_map(convert, problem.support),
        query=tree_map(convert, problem.query),
    )


def fewer(problem: MetaProblem, tasks: int) -> MetaProblem:
    support, query = (tree_map(lambda leaf: leaf[:tasks], each) for each in (problem.support, problem.query))
    return replace(problem, support=support, query=query)


@dataclass
class Reference:
    """Top and bottom of the spectrum in float64, and the residual reached.

    ``gap``: relative distance of float32's converged top. ``own``: relative distance of float64's top with torch's own
    norm layers, whose third derivatives are wrong; nan where it was not measured.
    """

    top: float
    bottom: float
    residual: float
    gap: float
    asymmetry: float
    own: float

    @property
    def floor(self) -> float:
        """Smaller errors come from rounding, not from the method: PyHessian stalls at about 20 units in the last place."""
        return max(self.gap, 64 * torch.finfo(torch.float32).eps)

    def error(self, value: float) -> float:
        return abs(value / self.top - 1)


def converged(operator: Any, residual: float) -> tuple[np.ndarray, float, float]:
    start = start_vector((operator.layout.size,), operator.gradient, seed=OTHER_SEED)

    def stop(runs: Any) -> bool:
        values, residuals = ritz_values(*runs[0])
        return residuals[-1] <= residual * abs(values[-1])

    run = lanczos(operator, start, max_iter=REFERENCE_STEPS, stop=stop)
    values, residuals = ritz_values(*run.runs[0])
    return values, float(residuals[-1] / abs(values[-1])), run.asymmetry


def reference(case: Case, which: str) -> Reference:
    values, residual, asymmetry = converged(case.operator(which, torch.float64), REFERENCE_RESIDUAL)
    single, _, _ = converged(case.operator(which), 1e-5)
    own = math.nan
    if which == "J":
        own = float(converged(case.operator(which, torch.float64, own=True), 1e-5)[0][-1] / values[-1]) - 1
    gap = abs(float(single[-1] / values[-1]) - 1)
    return Reference(float(values[-1]), float(values[0]), residual, gap, asymmetry, own)


def cases(names: list[str], seed: int = 0) -> Iterator[Case]:
    """Each network at initialisation and after training by a plain loop."""
    for name in names:
        spec = SPECS[name]
        torch.manual_seed(seed)
        module, family = MetaLearningModule(spec.network(), inner_lr=spec.alpha), spec.family()
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

        def advance(index: int, module=module, family=family, optimizer=optimizer, tasks=spec.tasks) -> None:
            batch = family.sample(tasks, episode_generator(seed, "train", index))
            gradients = meta_gradient(module.meta_problem(batch), tasks=module.task_map).gradients
            for key, parameter in module.theta().items():
                parameter.grad = gradients[key]
            optimizer.step()

        held_out = family.sample(spec.tasks, episode_generator(seed, "val", 0), "val")
        for state, steps in (("at init", 0), (f"after {spec.steps} steps", spec.steps)):
            for index in range(steps):
                advance(index)
            yield Case(f"{spec.title}, {state}", spec, module, optimizer, module.meta_problem(held_out))


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, which another program on the machine moves less than the clock."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found
