"""What a finished diagram of a panel says, as numbers: the keys are those of PANEL.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from lightning_maml_guard.linalg.density import SpectralDensity, spectral_density
from lightning_maml_guard.linalg.operators import Jacobian, task_gradient
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.bisection import critical_alpha, critical_betas
from lightning_maml_guard.phase.critical_rates import grid_rates
from lightning_maml_guard.phase.gradients import copies
from lightning_maml_guard.phase.optimizers import SGD
from lightning_maml_guard.phase.result import TRAINED_SHARE, PhaseDiagram
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.task_map import TaskMap

# The critical rates that are compared with the largest beta that trained, as arguments of PhaseDiagram.correlation.
PREDICTIONS = {
    f"{name}, {'smallest along healthy runs' if along else 'at the start'}": (name, along)
    for name in ("beta_c", "exact_beta_c")
    for along in (False, True)
}
# On networks, what counts as trained decides the sign of the growth: rates that barely lower the error go further.
SHARES = {f"{share:g} of the error before training": share for share in (TRAINED_SHARE, 0.5, 0.25)}


def results(diagram: PhaseDiagram) -> dict[str, Any]:
    """Return the largest rates that trained, the critical rates, and how the two are related."""
    return {
        "trained means": "final error at most 0.9 of that before training, both with and without adaptation",
        "alpha": diagram.alphas,
        "largest beta that trained": diagram.largest_beta,
        "beta_c at the start": diagram.at_start("beta_c"),
        "beta_c, smallest along healthy runs": diagram.smallest_along("beta_c"),
        "exact beta_c at the start": diagram.at_start("exact_beta_c"),
        "exact beta_c, smallest along healthy runs": diagram.smallest_along("exact_beta_c"),
        "alpha_c at the start": _alpha_c(diagram),
        "largest alpha that trained": _largest_alpha(diagram, TRAINED_SHARE),
        "Spearman with largest beta": {
            which: diagram.correlation(*prediction) for which, prediction in PREDICTIONS.items()
        },
        "claim by what counts as trained": {which: _growth(diagram, share) for which, share in SHARES.items()},
        "trained": int(diagram.trained.sum()),
        "diverged": int(diagram.diverged.sum()),
        "runs": int(diagram.final.size),
    }


def growth_limits(diagram: PhaseDiagram, share: float) -> dict[str, float]:
    """Return the inner rates towards which the largest beta is said to grow."""
    return {
        "towards alpha_c": _alpha_c(diagram),
        "towards the largest alpha that trained": _largest_alpha(diagram, share),
    }


def _growth(diagram: PhaseDiagram, share: float) -> dict[str, float]:
    """Takagi et al. claim that the largest beta grows with alpha up to alpha_c: positive where it does."""
    return {where: diagram.growth_towards_limit(limit, share) for where, limit in growth_limits(diagram, share).items()}


def _alpha_c(diagram: PhaseDiagram) -> float:
    return float(np.fmin.reduce(diagram.at_start("alpha_c")))


def _largest_alpha(diagram: PhaseDiagram, share: float) -> float:
    found = diagram.alphas[diagram.trained_to(share).any(1)]
    return float(found.max()) if len(found) else math.nan


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
        gradient, params, _ = task_gradient(
            problem.task_loss,
            problem.params,
            problem.support,
            per_task=False,
            tasks=TaskMap(problem.task_chunk_size),
            count=problem.tasks,
        )
        hessian = Jacobian(gradient, params)
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
