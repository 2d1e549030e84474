"""What a finished diagram of a panel says, as numbers: the keys are those of PANEL.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_maml_guard.linalg.density import SpectralDensity, spectral_density
from lightning_maml_guard.linalg.operators import Jacobian
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.bisection import critical_alpha, critical_betas
from lightning_maml_guard.phase.critical_rates import grid_rates
from lightning_maml_guard.phase.gradients import copies
from lightning_maml_guard.phase.optimizers import SGD
from lightning_maml_guard.phase.result import TRAINED_SHARE, PhaseDiagram
from lightning_maml_guard.stability.objective import MamlObjective
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.task_map import TaskMap

# The critical rates before training that are compared with the largest beta that trained.
PREDICTIONS = {"beta_c at the start": "beta_c", "exact beta_c at the start": "exact_beta_c"}
# On networks it matters what counts as trained: rates that barely lower the error go further.
SHARES = {f"{share:g} of the error before training": share for share in (TRAINED_SHARE, 0.5, 0.25)}


def results(diagram: PhaseDiagram) -> dict[str, Any]:
    """Return the largest rates that trained, how they grow with ``alpha``, and the critical rates.

    ``curve`` holds one value per inner rate. Gains are in decades of the outer rate.
    """
    return {
        "trained means": trained_means(diagram),
        "curve": {
            "alpha": diagram.alphas,
            "largest beta that trained": diagram.largest_beta,
            "best beta": diagram.best_beta,
            "beta_c at the start": diagram.at_start("beta_c"),
            "exact beta_c at the start": diagram.at_start("exact_beta_c"),
            "exact beta_c at the end": diagram.at_end_of_best("exact_beta_c"),
            "alpha * lambda_max at the start": _sharpness(diagram, diagram.at_start("alpha_c")),
            "alpha * lambda_max at the end": _sharpness(diagram, diagram.at_end_of_best("alpha_c")),
        },
        **gain(diagram),
        "beta at alpha = 0": diagram.beta_without_adaptation,
        "alpha_c at the start": float(np.fmin.reduce(diagram.at_start("alpha_c"))),
        "Spearman with largest beta": {which: diagram.correlation(name) for which, name in PREDICTIONS.items()},
        "gain by what counts as trained": {which: gain(diagram, share) for which, share in SHARES.items()},
        "trained": int(diagram.trained.sum()),
        "diverged": int(diagram.diverged.sum()),
        "runs": int(diagram.final.size),
    }


def gain(diagram: PhaseDiagram, share: float = TRAINED_SHARE) -> dict[str, float]:
    """Return the growth of the largest beta with ``alpha`` as PANEL.json holds it."""
    found = diagram.gain(share)
    return {
        "peak_gain": found.peak,
        "peak_alpha": found.peak_alpha,
        "gain_at_largest_alpha": found.at_largest_alpha,
        "smallest_alpha": found.smallest_alpha,
        "largest_alpha": found.largest_alpha,
    }


def over_seeds(seeds: Sequence[int], diagrams: Sequence[PhaseDiagram]) -> list[dict[str, Any]]:
    """Return the growth and the curve of each seed."""
    return [
        {
            "seed": seed,
            **gain(diagram),
            "curve": {"alpha": diagram.alphas, "largest beta that trained": diagram.largest_beta},
        }
        for seed, diagram in zip(seeds, diagrams, strict=True)
    ]


def trained_means(diagram: PhaseDiagram) -> str:
    """Return in words what counts as trained."""
    also = "" if math.isinf(diagram.chance) else f" and of chance ({diagram.chance:.3g})"
    return f"final error at most {TRAINED_SHARE:g} of that before training, with and without adaptation{also}"


def _sharpness(diagram: PhaseDiagram, alpha_c: np.ndarray) -> np.ndarray:
    """``alpha * lambda_max``: ``alpha_c`` is ``1 / (K * lambda_max)``."""
    return diagram.alphas / (diagram.inner_steps * alpha_c)


def bisected_and_measured(problem: MetaProblem, steps: int, count: int) -> dict[str, Any]:
    """Find the limits of full-batch training by training alone, at ``count`` inner rates, and measure them."""
    inside, outside = critical_alpha(problem, 0.2, 0.02, 2.0, steps=steps)
    found_alpha = math.sqrt(inside * outside)
    alphas = found_alpha * np.concatenate(
        [np.geomspace(0.04, 0.5, count // 2), np.linspace(0.55, 0.98, count - count // 2)]
    )
    betas = critical_betas(problem, alphas.tolist(), 0.1, 1000.0, steps=steps)
    found_betas = np.sqrt(betas.prod(1))
    like = next(iter(problem.params.values()))
    measured = grid_rates(
        problem, copies(problem.params, count), torch.from_numpy(alphas).to(like), SGD(), {}, 0, max_iter=50, tol=1e-9
    )
    return {
        "alpha_c found by training": found_alpha,
        "alpha_c measured": float(measured.alpha_c[0]),
        "alpha": alphas,
        "beta_c found by training": found_betas,
        "beta_c measured": measured.beta_c,
        "largest relative difference of alpha_c": abs(found_alpha / float(measured.alpha_c[0]) - 1),
        "largest relative difference of beta_c": float(np.abs(found_betas / measured.beta_c - 1).max()),
    }


def support_spectrum(problem: MetaProblem) -> SpectralDensity:
    """Estimate the eigenvalue density of the mean support loss's Hessian."""
    with double_backward():
        target = MamlObjective(problem, "support", TaskMap(problem.task_chunk_size)).curvature(False)
        hessian = Jacobian(target.field, target.params)
        like = next(iter(problem.params.values())).detach()
        return spectral_density(hessian, hessian.layout.size, like, probes=6, steps=40)


def json_ready(value: Any) -> Any:
    """Turn arrays to lists, and what JSON cannot hold (nan, infinities) to null."""
    if isinstance(value, dict):
        return {key: json_ready(each) for key, each in value.items()}
    if isinstance(value, (np.ndarray, list, tuple)):
        return [json_ready(each) for each in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
