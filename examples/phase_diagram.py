"""The poster's experiments: ``python examples/phase_diagram.py [linear|sinusoid|omniglot|miniimagenet] [--full]``.

Trains a grid of inner and meta rates, draws the training error with the critical rates, and prints for each inner rate
the largest meta rate that trained beside the guard's. Writes PANEL.png, PANEL_spectrum.png, PANEL.json and PANEL.npz
into ``runs/phase_diagram``; run again, it goes on where it was broken off. Image data is read from ``$LMG_DATA``.
``torchrun --nproc_per_node=N examples/phase_diagram.py ...`` deals the grid out over N processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from lightning_maml_guard import MetaLearningModule, MetaProblem, PhaseDiagram, phase_diagram, plots
from lightning_maml_guard.curvature.backward import double_backward
from lightning_maml_guard.curvature.density import spectral_density
from lightning_maml_guard.curvature.operators import Jacobian, task_gradient
from lightning_maml_guard.grid.bisection import critical_alpha, critical_betas
from lightning_maml_guard.grid.curvature import grid_rates
from lightning_maml_guard.grid.gradients import copies
from lightning_maml_guard.grid.optimizers import SGD
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.tasks.episodes import TaskFamily, episode_generator
from lightning_maml_guard.tasks.images import MiniImageNet, Omniglot
from lightning_maml_guard.tasks.regression import LinearRegression, Sinusoid


@dataclass(frozen=True)
class Panel:
    """One picture of the poster.

    Attributes:
        network: Builds the network.
        tasks: Builds the family of tasks.
        meta_batch_size: Tasks a training step.
        judged_tasks: Training tasks the errors are taken on.
        alphas: Exponents of 10 of the first and the last inner rate, and their number.
        betas: The same for the meta rates.
        steps: Training steps.
        order: How the meta-gradient is taken.
        inner_steps: ``K``.
        resample: Whether tasks are drawn anew at every step.
        max_iter: Products at most of a measurement.
    """

    network: Callable[[], nn.Module]
    tasks: Callable[[], TaskFamily]
    meta_batch_size: int
    judged_tasks: int
    alphas: tuple[float, float, int]
    betas: tuple[float, float, int]
    steps: int
    order: str = "exact"
    inner_steps: int = 1
    resample: bool = True
    max_iter: int = 20


# Sizes for two CPU cores and minutes. On images the same few tasks at every step, as the poster assumes (its data is
# not resampled): the training error then falls within a few hundred steps.
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
    """Make the problem of every step, and the one the errors are taken on."""
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
    # A stream of its own, so that these training tasks are none of the steps'.
    return lambda step: draw(panel.meta_batch_size, "train", step), draw(panel.judged_tasks, "val", 0)


def columns(diagram: PhaseDiagram) -> dict[str, Any]:
    """Tabulate what trained beside what was predicted, and state the poster's claim as a number."""
    trained_at = diagram.alphas[np.isfinite(diagram.largest_beta)]
    alpha_c = float(np.nanmin(diagram.at_start("alpha_c")))
    largest = float(trained_at.max()) if len(trained_at) else math.nan
    return {
        "trained means": "final error at most 0.9 of that before training, both with and without adaptation",
        "alpha": diagram.alphas,
        "largest beta that trained": diagram.largest_beta,
        "beta_c at the start": diagram.at_start("beta_c"),
        "beta_c, smallest along healthy runs": diagram.smallest_along("beta_c"),
        "exact beta_c at the start": diagram.at_start("exact_beta_c"),
        "exact beta_c, smallest along healthy runs": diagram.smallest_along("exact_beta_c"),
        "alpha_c at the start": alpha_c,
        "largest alpha that trained": largest,
        "Spearman with largest beta": {
            f"{name}, {'smallest along healthy runs' if along else 'at the start'}": diagram.correlation(name, along)
            for name in ("beta_c", "exact_beta_c")
            for along in (False, True)
        },
        "claim: growth of log10(largest beta) towards alpha_c": diagram.growth_towards_limit(alpha_c),
        "claim: growth of log10(largest beta) towards the largest alpha that trained": diagram.growth_towards_limit(
            largest
        ),
        "trained": int(diagram.trained.sum()),
        "diverged": int(diagram.diverged.sum()),
        "runs": int(diagram.final.size),
    }


def report(name: str, found: dict[str, Any]) -> None:
    """Print the table and the claim."""
    print(f"\n{name}: {found['trained']} of {found['runs']} runs trained ({found['trained means']}),", end=" ")
    print(f"{found['diverged']} diverged; tasks {'drawn anew' if found['resampled'] else 'the same'} at every step")
    names = [key for key, value in found.items() if isinstance(value, np.ndarray)]
    for number, key in enumerate(names, start=1):
        print(f"  [{number}] {key}")
    print("".join(f"{f'[{number}]':>11s}" for number in range(1, len(names) + 1)))
    for row in zip(*(found[key] for key in names), strict=True):
        print("".join(f"{value:11.4g}" for value in row))
    print(f"alpha_c at the start {found['alpha_c at the start']:.4g}", end=", ")
    print(f"largest alpha that trained {found['largest alpha that trained']:.4g}")
    for which, value in found["Spearman with largest beta"].items():
        print(f"Spearman of {which} with the largest beta that trained: {value:+.3f}")
    for key, value in found.items():
        if key.startswith("claim"):
            print(f"{key.removeprefix('claim: ')}: {value:+.3f} (the poster says: above 0)")


def meet_theory(problem: MetaProblem, steps: int, count: int) -> dict[str, Any]:
    """Find the linear panel's limits by training alone, and compare them with the guard's measurement."""
    inside, outside = critical_alpha(problem, 0.2, 0.02, 2.0, steps=steps)
    found_alpha = math.sqrt(inside * outside)
    alphas = found_alpha * np.concatenate(
        [np.geomspace(0.04, 0.5, count // 2), np.linspace(0.55, 0.98, count - count // 2)]
    )
    betas = critical_betas(problem, alphas.tolist(), 0.1, 1000.0, steps=steps)
    found_betas = np.sqrt(betas.prod(1))
    like = next(iter(problem.params.values()))
    rates = grid_rates(
        problem, copies(problem.params, count), torch.from_numpy(alphas).to(like), SGD(), {}, 0, max_iter=50, tol=1e-9
    )
    return {
        "alpha_c found by training": found_alpha,
        "alpha_c measured": float(rates.alpha_c[0]),
        "alpha": alphas,
        "beta_c found by training": found_betas,
        "beta_c measured": rates.beta_c,
        "largest relative difference of alpha_c": abs(found_alpha / float(rates.alpha_c[0]) - 1),
        "largest relative difference of beta_c": float(np.abs(found_betas / rates.beta_c - 1).max()),
    }


def draw_spectrum(problem: MetaProblem, alpha: float, name: str, path: Path) -> None:
    """Draw the eigenvalues of the mean support loss before training."""
    with double_backward():
        hessian = Jacobian(*_support(problem))
        like = next(iter(problem.params.values())).detach()
        density = spectral_density(hessian, hessian.layout.size, like, probes=6, steps=40)
    figure, _ = plots.spectrum(density, alpha=alpha, title=f"Eigenvalue spectrum before training, {name}")
    figure.savefig(path, dpi=200)


def _support(problem: MetaProblem) -> tuple[Any, Any]:
    from lightning_maml_guard._vectorize import TaskMap

    field, params, _ = task_gradient(
        problem.task_loss,
        problem.params,
        problem.support,
        per_task=False,
        tasks=TaskMap(problem.task_chunk_size),
        count=problem.tasks,
    )
    return field, params


def plain(value: Any) -> Any:
    """Turn arrays to lists and what JSON cannot hold (nan, infinities) to null."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (np.ndarray, list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Train, print, draw, write; return what was written."""
    parser = argparse.ArgumentParser(prog="phase_diagram.py", description=__doc__)
    parser.add_argument("panel", nargs="?", choices=tuple(SMALL), default="linear")
    parser.add_argument("--full", action="store_true", help="the published sizes, on a GPU")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--grid", type=int, help="rates of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=Path("runs/phase_diagram"))
    given = parser.parse_args(words)
    panel = (FULL if given.full else SMALL)[given.panel]
    if given.grid:
        panel = replace(panel, alphas=(*panel.alphas[:2], given.grid), betas=(*panel.betas[:2], given.grid))
    if given.steps:
        panel = replace(panel, steps=given.steps)
    if given.threads:
        torch.set_num_threads(given.threads)
    rank, launched = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) > 1
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if launched:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    given.out.mkdir(parents=True, exist_ok=True)
    size = f"{panel.alphas[-1]}x{panel.betas[-1]}x{panel.steps}"
    settings = f"{given.panel}{'_full' if given.full else ''}_{size}_seed{given.seed}"
    began = time.perf_counter()
    family, judged = problems(panel, device, given.seed)
    diagram = phase_diagram(
        family,
        np.logspace(*panel.alphas),
        np.logspace(*panel.betas),
        panel.steps,
        judged_on=judged,
        measure_every=max(1, panel.steps // 3),
        max_iter=panel.max_iter,
        partial=given.out / "partial" / settings,
    )
    first = not launched or dist.get_rank() == 0
    result: dict[str, Any] = {"panel": given.panel, "full": given.full, "steps": panel.steps, "seed": given.seed}
    result["resampled"] = panel.resample
    if first:
        result |= write(given.panel, panel, diagram, judged, given.out, began, result)
    if launched:
        dist.barrier()
        dist.destroy_process_group()
    return result


def write(
    name: str, panel: Panel, diagram: PhaseDiagram, judged: MetaProblem, out: Path, began: float, head: dict[str, Any]
) -> dict[str, Any]:
    """Print and draw a diagram, and write all that was found."""
    import matplotlib

    matplotlib.use("Agg")
    found = head | columns(diagram)
    points = None
    if name == "linear":
        theory = meet_theory(judged, 4 * 1000, 16)
        points = np.stack([theory["alpha"], theory["beta_c found by training"]], 1)
        found["theory"] = theory
    found["minutes"] = (time.perf_counter() - began) / 60
    report(name, found)
    if points is not None:
        print(f"alpha_c: found by training {found['theory']['alpha_c found by training']:.6g}", end=", ")
        print(f"measured {found['theory']['alpha_c measured']:.6g}", end=", ")
        print(f"difference {found['theory']['largest relative difference of alpha_c']:.1e}")
        print(
            f"beta_c(alpha): largest difference {found['theory']['largest relative difference of beta_c']:.1e}", end=" "
        )
        print(f"over {len(points)} inner rates from {points[0, 0]:.3g} to {points[-1, 0]:.3g}")
    diagram.save(out / f"{name}.npz")
    arrays = {
        key: getattr(diagram, key) for key in ("alphas", "betas", "start", "unadapted", "final", "divergence_step")
    }
    (out / f"{name}.json").write_text(json.dumps(plain(found | {"diagram": arrays}), indent=1, allow_nan=False))
    figure, _ = plots.phase_diagram(diagram, found=points, title=f"Training error after {panel.steps} steps, {name}")
    figure.savefig(out / f"{name}.png", dpi=200)
    alpha = float(diagram.alphas[len(diagram.alphas) // 2])
    draw_spectrum(judged, alpha, name, out / f"{name}_spectrum.png")
    print(f"written: {out}/{name}.png, {name}_spectrum.png, {name}.json, {name}.npz ({found['minutes']:.1f} minutes)")
    return found


if __name__ == "__main__":
    main()
