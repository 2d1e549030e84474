"""What a panel's diagram says: the table, the poster's claim as a number, the pictures."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_maml_guard import plots
from lightning_maml_guard.cli.paper_panels import FULL, SMALL, Panel
from lightning_maml_guard.linalg.density import spectral_density
from lightning_maml_guard.linalg.operators import Jacobian, task_gradient
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.bisection import critical_alpha, critical_betas
from lightning_maml_guard.phase.critical_rates import grid_rates
from lightning_maml_guard.phase.gradients import copies
from lightning_maml_guard.phase.optimizers import SGD
from lightning_maml_guard.phase.result import FEWEST, TRAINED_SHARE, PhaseDiagram
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.task_map import TaskMap

# The linear panel's limits found by training: steps of each training, and inner rates.
BISECTION_STEPS, BISECTED_RATES = 4000, 16
# What is correlated with the largest meta rate that trained: a critical rate, and whether along the healthy runs.
_PREDICTIONS = {
    f"{name}, {'smallest along healthy runs' if along else 'at the start'}": (name, along)
    for name in ("beta_c", "exact_beta_c")
    for along in (False, True)
}
# What counts as trained decides the sign on networks: rates that barely lower the error go further.
_SHARES = {f"{share:g} of the error before training": share for share in (TRAINED_SHARE, 0.5, 0.25)}


def write(
    name: str, panel: Panel, diagram: PhaseDiagram, judged: MetaProblem, out: Path, began: float, head: dict[str, Any]
) -> dict[str, Any]:
    """Print and draw a diagram, and write all that was found.

    Args:
        name: The panel's name.
        panel: The panel.
        diagram: Its diagram.
        judged: The problem the errors were taken on.
        out: The folder to write into.
        began: When the run began, by ``time.perf_counter``.
        head: What else to write: how the panel was run.

    Returns:
        What was written as JSON.
    """
    import matplotlib

    matplotlib.use("Agg")
    found = head | _columns(diagram)
    points = None
    diagram.save(out / f"{name}.npz")
    if name == "linear":
        print("The grid is trained. Now its limits are bisected by training alone, some two minutes ...", flush=True)
        theory = _meet_theory(judged, BISECTION_STEPS, BISECTED_RATES)
        points = np.stack([theory["alpha"], theory["beta_c found by training"]], 1)
        found["theory"] = theory
    found["minutes"] = (time.perf_counter() - began) / 60
    _report(name, found, diagram)
    if points is not None:
        print(f"alpha_c: found by training {found['theory']['alpha_c found by training']:.6g}", end=", ")
        print(f"measured {found['theory']['alpha_c measured']:.6g}", end=", ")
        print(f"difference {found['theory']['largest relative difference of alpha_c']:.1e}")
        print(
            f"beta_c(alpha): largest difference {found['theory']['largest relative difference of beta_c']:.1e}", end=" "
        )
        print(f"over {len(points)} inner rates from {points[0, 0]:.3g} to {points[-1, 0]:.3g}")
    arrays = {
        key: getattr(diagram, key) for key in ("alphas", "betas", "start", "unadapted", "final", "divergence_step")
    }
    (out / f"{name}.json").write_text(json.dumps(plain(found | {"diagram": arrays}), indent=1, allow_nan=False))
    figure, _ = plots.phase_diagram(diagram, found=points, title=f"Training error after {panel.steps} steps, {name}")
    figure.savefig(out / f"{name}.png", dpi=200)
    alpha = float(diagram.alphas[len(diagram.alphas) // 2])
    _draw_spectrum(judged, alpha, name, out / f"{name}_spectrum.png")
    print(f"written: {out}/{name}.png, {name}_spectrum.png, {name}.json, {name}.npz ({found['minutes']:.1f} minutes)")
    return found


def plain(value: Any) -> Any:
    """Turn arrays to lists and what JSON cannot hold (nan, infinities) to null.

    Args:
        value: Dicts, lists, arrays and numbers.

    Returns:
        The same in JSON's own types.
    """
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (np.ndarray, list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _columns(diagram: PhaseDiagram) -> dict[str, Any]:
    """Tabulate what trained beside what was predicted, and state the poster's claim as a number."""
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
            which: diagram.correlation(*prediction) for which, prediction in _PREDICTIONS.items()
        },
        "claim by what counts as trained": {
            which: {
                where: diagram.growth_towards_limit(limit, share) for where, limit in _limits(diagram, share).items()
            }
            for which, share in _SHARES.items()
        },
        "trained": int(diagram.trained.sum()),
        "diverged": int(diagram.diverged.sum()),
        "runs": int(diagram.final.size),
    }


def _alpha_c(diagram: PhaseDiagram) -> float:
    return float(np.fmin.reduce(diagram.at_start("alpha_c")))


def _limits(diagram: PhaseDiagram, share: float) -> dict[str, float]:
    return {
        "towards alpha_c": _alpha_c(diagram),
        "towards the largest alpha that trained": _largest_alpha(diagram, share),
    }


def _largest_alpha(diagram: PhaseDiagram, share: float) -> float:
    found = diagram.alphas[diagram.trained_to(share).any(1)]
    return float(found.max()) if len(found) else math.nan


def _report(name: str, found: dict[str, Any], diagram: PhaseDiagram) -> None:
    """Print the table and the claim."""
    print(f"\n{name}: {found['trained']} of {found['runs']} runs trained ({found['trained means']}),", end=" ")
    print(f"{found['diverged']} diverged; tasks {'drawn anew' if found['resampled'] else 'the same'} at every step")
    names = [key for key, value in found.items() if isinstance(value, np.ndarray)]
    for number, key in enumerate(names, start=1):
        print(f"  [{number}] {key}")
    print("".join(f"{f'[{number}]':>11s}" for number in range(1, len(names) + 1)))
    for row in zip(*(found[key] for key in names), strict=True):
        print("".join(f"{_shown(value):>11s}" for value in row))
    if any(np.isnan(found[key]).any() for key in names):
        print("A dash: no meta rate trained at that inner rate, or the critical rate could not be measured.")
    limit = f"alpha_c at the start {_shown(found['alpha_c at the start'], otherwise='not known')}"
    columns = len(diagram.trained_up_to(math.inf))
    print(f"{limit}, largest alpha that trained {found['largest alpha that trained']:.4g}" if columns else limit)
    if columns < FEWEST:
        print(_too_few_trained((FULL if found["full"] else SMALL)[name], found, columns))
        return
    for which, value in found["Spearman with largest beta"].items():
        said = _no_correlation(diagram, *_PREDICTIONS[which]) if math.isnan(value) else f"{value:+.3f}"
        print(f"Spearman of {which} with the largest beta that trained: {said}")
    print("Growth of log10(largest beta) with alpha (the poster says: above 0), by what counts as trained:")
    for which, grown in found["claim by what counts as trained"].items():
        print(f"  {which}: {_growth(diagram, _SHARES[which], grown)}")


def _shown(value: float, otherwise: str = "-") -> str:
    return otherwise if math.isnan(value) else f"{value:.4g}"


def _too_few_trained(own: Panel, found: dict[str, Any], columns: int) -> str:
    rates = len(found["alpha"])
    run = f"in {found['steps']} steps on a grid of {rates} x {found['runs'] // rates} rates"
    why = (
        f"Only {columns} of the inner rates trained {run}, and a comparison takes {FEWEST}"
        if columns
        else f"Nothing trained {run}"
    )
    return (
        f"{why}, so no limit can be compared with the grid's training: pass more --steps (the panel's own: "
        f"{own.steps}) or a finer --grid (its own: {own.alphas[-1]} x {own.betas[-1]})."
    )


def _no_correlation(diagram: PhaseDiagram, name: str, along: bool) -> str:
    count = len(diagram.paired(name, along)[0])
    if count < FEWEST:
        return f"no number, as {count} of the inner rates have both and it takes {FEWEST}"
    return "no number, as one of the two is the same at all inner rates that have both"


def _growth(diagram: PhaseDiagram, share: float, grown: dict[str, float]) -> str:
    trained = len(diagram.trained_up_to(math.inf, share))
    if trained < FEWEST:
        return f"no number, as {trained} of the inner rates trained that far and it takes {FEWEST}"
    said = []
    for where, limit in _limits(diagram, share).items():
        count = len(diagram.trained_up_to(limit, share))
        few = f"no number {where} ({count} of the inner rates up to it trained, it takes {FEWEST})"
        said.append(few if math.isnan(grown[where]) else f"{grown[where]:+.3f} {where}")
    return ", ".join(said)


def _meet_theory(problem: MetaProblem, steps: int, count: int) -> dict[str, Any]:
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


def _draw_spectrum(problem: MetaProblem, alpha: float, name: str, path: Path) -> None:
    """Draw the eigenvalues of the mean support loss before training."""
    with double_backward():
        hessian = Jacobian(*_support(problem))
        like = next(iter(problem.params.values())).detach()
        density = spectral_density(hessian, hessian.layout.size, like, probes=6, steps=40)
    figure, _ = plots.spectrum(density, alpha=alpha, title=f"Eigenvalue spectrum before training, {name}")
    figure.savefig(path, dpi=200)


def _support(problem: MetaProblem) -> tuple[Any, Any]:
    field, params, _ = task_gradient(
        problem.task_loss,
        problem.params,
        problem.support,
        per_task=False,
        tasks=TaskMap(problem.task_chunk_size),
        count=problem.tasks,
    )
    return field, params
