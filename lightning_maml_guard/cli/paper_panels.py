"""The panels of Takagi et al. as settings: networks, tasks, learning rates and sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_maml_guard.maml.meta_learning import MetaLearningModule
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.tasks.episodes import TaskFamily, episode_generator
from lightning_maml_guard.tasks.images import MiniImageNet, Omniglot
from lightning_maml_guard.tasks.regression import LinearRegression, Sinusoid

WAYS = 5


@dataclass(frozen=True)
class Panel:
    """A phase diagram: what is trained, and at which rates."""

    network: Callable[[], nn.Module]
    tasks: Callable[[], TaskFamily]
    data: str  # what a step trains on, one of DATA
    batch: int  # tasks per step
    judged: int  # training tasks on which the errors are computed
    alphas: np.ndarray
    betas: np.ndarray
    steps: int
    order: str = "exact"
    inner_steps: int = 1
    chance: float = math.inf  # error that is reached without learning
    max_iter: int = 20  # Hessian-vector products of a measurement at most

    def with_grid(self, rates: int) -> Panel:
        """Return the panel with that many rates of each kind over the same ranges, besides an inner rate of 0."""
        alphas, betas = (np.geomspace(each[each > 0][0], each[-1], rates) for each in (self.alphas, self.betas))
        return replace(self, alphas=_with_zero(alphas) if self.alphas[0] == 0 else alphas, betas=betas)


DATA = {
    "same": "the same tasks at every step",
    "batches": "batches of a fixed set of tasks",
    "labels": "the same images at every step, their labels drawn anew",
    "tasks": "tasks drawn anew at every step",
}


def ticks(low: float, high: float) -> np.ndarray:
    """The rates of Takagi et al.'s axes, from ``low`` to ``high``: 1, 3, 5, 7 and 9 times each power of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    rates = np.array([float(f"{digit}e{decade}") for decade in decades for digit in (1, 3, 5, 7, 9)])
    return rates[(low <= rates) & (rates <= high)]


def _with_zero(alphas: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], alphas])


# On images a step sees the same few images with their labels drawn anew: a network memorises fixed tasks without
# adaptation, and then no inner rate is needed.
_OMNIGLOT = Panel(
    lambda: conv4(WAYS, filters=8, strided=True),
    lambda: Omniglot(n_way=WAYS, k_shot=1, queries=1),
    "labels",
    batch=4,
    judged=4,
    alphas=_with_zero(np.logspace(-1.8, 1.06, 14)),
    betas=np.logspace(-1.2, 1.22, 12),
    steps=120,
    chance=math.log(WAYS),
    max_iter=12,
)
# Sizes for two CPU cores and minutes.
SMALL = {
    "linear": Panel(
        lambda: mlp(10, hidden=()).double(),
        lambda: LinearRegression(10, 40, 40, same_query=True, dtype="float64"),
        "same",
        batch=1,
        judged=1,
        alphas=_with_zero(np.logspace(-2, -0.3, 24)),
        betas=np.logspace(-1.2, 1.2, 24),
        steps=400,
        order="simplified",
    ),
    # The published size.
    "sinusoid": Panel(
        mlp,
        lambda: Sinusoid(10, 10),
        "batches",
        batch=10,
        judged=100,
        alphas=_with_zero(ticks(1e-4, 9)),
        betas=ticks(1e-2, 9),
        steps=500,
    ),
    "omniglot": _OMNIGLOT,
    "miniimagenet": replace(
        _OMNIGLOT,
        network=lambda: conv4(WAYS, channels=3, filters=8, image_size=32, strided=True),
        tasks=lambda: MiniImageNet(n_way=WAYS, k_shot=1, queries=3, image_size=32),
        batch=2,
        judged=2,
    ),
}
# As above, with tasks drawn anew and, on images, the published number of steps and of inner steps.
RESAMPLED = {
    "sinusoid": replace(SMALL["sinusoid"], data="tasks"),
    "omniglot": replace(
        SMALL["omniglot"],
        tasks=lambda: Omniglot(n_way=WAYS, k_shot=1, queries=3),
        data="tasks",
        judged=16,
        steps=100,
        inner_steps=2,
    ),
    "miniimagenet": replace(SMALL["miniimagenet"], data="tasks", batch=4, judged=16, steps=100, inner_steps=2),
}
# The published sizes, for a GPU; Finn et al.'s networks. The data of the linear panel is our own. One epoch of
# miniImageNet: as many steps as see each of its 38,400 training images once, at 5 * (1 + 15) images of 4 tasks a step.
FULL = {
    "linear": replace(SMALL["linear"], alphas=_with_zero(ticks(1e-5, 9e-2)), betas=ticks(5e-3, 9), steps=500),
    "sinusoid": SMALL["sinusoid"],
    "omniglot": replace(
        RESAMPLED["omniglot"],
        network=lambda: conv4(WAYS, filters=64, strided=True),
        tasks=lambda: Omniglot(n_way=WAYS, k_shot=1, queries=15),
        batch=32,
        judged=32,
        alphas=_with_zero(ticks(1e-3, 9)),
        betas=ticks(1e-1, 90),
        max_iter=20,
    ),
    "miniimagenet": replace(
        RESAMPLED["miniimagenet"],
        network=lambda: conv4(WAYS, channels=3, filters=32, image_size=84),
        tasks=lambda: MiniImageNet(n_way=WAYS, k_shot=1, queries=15),
        alphas=_with_zero(ticks(1e-4, 9)),
        betas=ticks(1e-2, 9),
        steps=120,
        max_iter=20,
    ),
}


def problems(panel: Panel, device: torch.device, seed: int) -> tuple[Callable[[int], MetaProblem], MetaProblem]:
    """Return a function from the step to its problem, and the problem on which the errors are computed."""
    family = panel.tasks()
    family.setup()
    family.to(device)
    torch.manual_seed(seed)
    module = MetaLearningModule(panel.network(), inner_steps=panel.inner_steps, order=panel.order).to(device)

    def draw(tasks: int, split: str, index: int) -> MetaProblem:
        batch = family.sample(tasks, episode_generator(seed, split, index), "train")
        return module.meta_problem(tree_map(lambda each: each.to(device), batch))

    if panel.data == "tasks":
        # The judged tasks are training tasks from a random stream of their own, so that no step trains on them.
        return lambda step: draw(panel.batch, "train", step), draw(panel.judged, "val", 0)
    fixed = draw(max(panel.batch, panel.judged), "train", 0)
    if panel.data == "labels":
        return (
            lambda step: _relabelled(fixed, episode_generator(seed, "train", 1 + step)),
            _relabelled(fixed, episode_generator(seed, "val", 0)),
        )
    if panel.data == "batches":
        return lambda step: _batch(fixed, panel.batch, seed, step), fixed
    return lambda step: fixed, fixed


def _relabelled(problem: MetaProblem, generator: torch.Generator) -> MetaProblem:
    """The problem with the classes of each task numbered anew."""
    order = torch.stack([torch.randperm(WAYS, generator=generator) for _ in range(problem.tasks)])

    def relabelled(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = data
        return images, order.to(labels.device).gather(1, labels)

    return replace(problem, support=relabelled(problem.support), query=relabelled(problem.query))


def _batch(problem: MetaProblem, tasks: int, seed: int, step: int) -> MetaProblem:
    """The tasks of a step: the whole set, batch after batch, is in a new order each time it is passed through."""
    passes, place = divmod(step, problem.tasks // tasks)
    order = torch.randperm(problem.tasks, generator=episode_generator(seed, "train", 1 + passes))
    chosen = order[place * tasks : (place + 1) * tasks]
    part = tree_map(lambda each: each[chosen.to(each.device)], (problem.support, problem.query))
    return replace(problem, support=part[0], query=part[1])
