"""The panels of Takagi et al. as settings: networks, tasks, learning rates and sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_maml_guard.maml.meta_learning import MetaLearningModule
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.tasks.episodes import TaskFamily, episode_generator
from lightning_maml_guard.tasks.images import MiniImageNet, Omniglot
from lightning_maml_guard.tasks.regression import LinearRegression, Sinusoid


@dataclass(frozen=True)
class Panel:
    """A phase diagram; rates are exponents of 10 of the first and the last, and their number."""

    network: Callable[[], nn.Module]
    tasks: Callable[[], TaskFamily]
    meta_batch_size: int
    judged_tasks: int  # training tasks on which the errors are computed
    alphas: tuple[float, float, int]
    betas: tuple[float, float, int]
    steps: int
    order: str = "exact"
    inner_steps: int = 1
    resample: bool = True  # new tasks at every step
    max_iter: int = 20  # Hessian-vector products of a measurement at most


# Sizes for two CPU cores and minutes. On images the same few tasks at every step, as Takagi et al. assume (their data
# is not resampled): the training error then falls within a few hundred steps.
SMALL = {
    "linear": Panel(
        lambda: mlp(10, hidden=()).double(),
        lambda: LinearRegression(10, 40, 40, same_query=True, dtype="float64"),
        meta_batch_size=1,
        judged_tasks=1,
        alphas=(-2, -0.3, 18),
        betas=(-1.2, 1.2, 18),
        steps=400,
        order="simplified",
        resample=False,
    ),
    "sinusoid": Panel(
        mlp,
        lambda: Sinusoid(10, 10),
        meta_batch_size=10,
        judged_tasks=50,
        alphas=(-3, -0.3, 16),
        betas=(-3, 0.3, 16),
        steps=4000,
    ),
    "omniglot": Panel(
        lambda: conv4(filters=8, strided=True),
        lambda: Omniglot(n_way=5, k_shot=1, queries=1),
        meta_batch_size=4,
        judged_tasks=4,
        alphas=(-3.5, 1, 12),
        betas=(-2, 2, 10),
        steps=300,
        resample=False,
        max_iter=12,
    ),
    "miniimagenet": Panel(
        lambda: conv4(channels=3, filters=8, image_size=32, strided=True),
        lambda: MiniImageNet(n_way=5, k_shot=1, queries=3, image_size=32),
        meta_batch_size=2,
        judged_tasks=2,
        alphas=(-3.5, 0.5, 12),
        betas=(-2, 2, 10),
        steps=200,
        resample=False,
        max_iter=12,
    ),
}
# The published sizes (Finn et al. 2017), for a GPU.
FULL = {
    "linear": replace(SMALL["linear"], alphas=(-2, -0.3, 40), betas=(-1.2, 1.2, 40), steps=2000),
    "sinusoid": replace(
        SMALL["sinusoid"], meta_batch_size=25, judged_tasks=100, alphas=(-3, -0.3, 32), betas=(-3, 0.3, 32), steps=15000
    ),
    "omniglot": replace(
        SMALL["omniglot"],
        network=lambda: conv4(filters=64, strided=True),
        meta_batch_size=32,
        judged_tasks=64,
        alphas=(-3.5, 1, 20),
        betas=(-2, 2, 16),
        steps=5000,
        resample=True,
        max_iter=20,
    ),
    "miniimagenet": replace(
        SMALL["miniimagenet"],
        network=lambda: conv4(channels=3, filters=32, image_size=84),
        tasks=lambda: MiniImageNet(n_way=5, k_shot=1, queries=15),
        meta_batch_size=4,
        judged_tasks=16,
        inner_steps=5,
        alphas=(-3.5, 0.5, 20),
        betas=(-2, 2, 16),
        steps=5000,
        resample=True,
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

    if not panel.resample:
        fixed = draw(panel.meta_batch_size, "train", 0)
        return lambda step: fixed, fixed
    # Training tasks from a random stream of their own, so that no step trains on them.
    return lambda step: draw(panel.meta_batch_size, "train", step), draw(panel.judged_tasks, "val", 0)
