"""The command ``phase-diagram``, which is ``examples/phase_diagram.py`` too: an experiment of Takagi et al."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lightning_maml_guard import plots
from lightning_maml_guard.cli import paper_near_minimum as near
from lightning_maml_guard.cli.arguments import exit_with_error, interruptible
from lightning_maml_guard.cli.errors import option_names, with_nearest
from lightning_maml_guard.cli.paper_panels import DATA, FULL, RESAMPLED, SMALL, Panel, problems
from lightning_maml_guard.cli.paper_results import (
    bisected_and_measured,
    json_ready,
    over_seeds,
    results,
    support_spectrum,
)
from lightning_maml_guard.cli.paper_tables import print_bisection, print_near_minimum, print_results
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.diagram import phase_diagram
from lightning_maml_guard.phase.result import PhaseDiagram
from lightning_maml_guard.tasks.image_files import DatasetError
from lightning_maml_guard.utils.checks import check_count, checked, did_you_mean

# The bisection of the linear panel's limits: steps of each training, and inner rates.
BISECTION_STEPS, BISECTED_RATES = 4000, 16
NEAR_MINIMUM = "near-minimum"
PANELS = (*SMALL, NEAR_MINIMUM)
DESCRIPTION = f"""Trains a grid of inner and outer learning rates, draws the training error with the largest outer rate
that trained, and prints for each inner rate that rate beside the measured limits. Writes PANEL.png, PANEL_ends.png (the
curvature before and after training), PANEL_spectrum.png, PANEL.json and PANEL.npz; run again, it continues where it was
interrupted. Image data is read from the folder that
--data or $LMG_DATA names. Under torchrun the grid is divided among the processes. After its grid
the linear panel finds the limits by training alone, some two minutes: {BISECTED_RATES} inner rates and
{BISECTION_STEPS} steps, whatever --grid and --steps say. The panel {NEAR_MINIMUM} starts close to a minimum of one task
of Omniglot and one of miniImageNet, and compares simplified and exact MAML with theory."""


def main(words: Sequence[str] | None = None, prog: str = "lightning-maml-guard phase-diagram") -> dict[str, Any]:
    """Train a panel's grid, print, draw and save the results, and return what PANEL.json holds, but for the grid."""
    given = _parsed(words, prog)
    if given.threads:
        torch.set_num_threads(given.threads)
    rank, launched = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) > 1
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if launched:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    given.out.mkdir(parents=True, exist_ok=True)
    writes = not launched or dist.get_rank() == 0
    near_minimum = given.panel == NEAR_MINIMUM
    try:
        with interruptible("" if near_minimum else "The same command goes on from what is trained."):
            found = (_near_minimum if near_minimum else _grid)(given, device, writes)
    except DatasetError as error:
        exit_with_error(f"{prog}: error: --data: {error}")
    if launched:
        dist.barrier()
        dist.destroy_process_group()
    return found


def _grid(given: argparse.Namespace, device: torch.device, writes: bool) -> dict[str, Any]:
    """Train the grid of a panel of Takagi et al. for each seed."""
    own = _sizes(given)[given.panel]
    panel = own.with_grid(given.grid) if given.grid else own
    panel = replace(panel, steps=given.steps) if given.steps else panel
    name = given.panel + ("_full" if given.full else "_resampled" if given.resampled else "")
    seeds = range(given.seed, given.seed + given.seeds)
    began = time.perf_counter()
    judged, diagrams = [], []
    for seed in seeds:
        family, judged_on = problems(panel, device, seed)
        size = f"{len(panel.alphas)}x{len(panel.betas)}x{panel.steps}"
        diagram = phase_diagram(
            family,
            panel.alphas,
            panel.betas,
            panel.steps,
            judged_on=judged_on,
            chance=panel.chance,
            measure_every=None if seed == given.seed else 0,  # the other seeds are there for the spread of the growth
            max_iter=panel.max_iter,
            partial=given.out / "partial" / f"{name}_{size}_seed{seed}",
        )
        judged.append(judged_on)
        diagrams.append(diagram)
    found = {key: getattr(given, key) for key in ("panel", "full", "resampled", "seed")}
    found |= {"steps": panel.steps, "data": DATA[panel.data], "inner_steps": panel.inner_steps}
    if writes:
        found |= results(diagrams[0]) | {"seeds": over_seeds(seeds, diagrams)}
        _finish(name, found, own, diagrams, judged[0], given.out, began)
    return found


def _near_minimum(given: argparse.Namespace, device: torch.device, writes: bool) -> dict[str, Any]:
    """Train from near a minimum on both image sets, with simplified and exact MAML."""
    shares = np.linspace(near.SHARES[0], near.SHARES[-1], given.grid or len(near.SHARES))
    levels = np.geomspace(near.LEVELS[0], near.LEVELS[-1], given.grid or len(near.LEVELS))
    steps = given.steps or near.STEPS
    found: dict[str, Any] = {"panel": NEAR_MINIMUM, "steps": steps, "seed": given.seed, "seeds": []}
    drawn: list[tuple[str, PhaseDiagram, float, np.ndarray]] = []
    began = time.perf_counter()
    for seed in range(given.seed, given.seed + given.seeds):
        by_set: dict[str, Any] = {}
        for dataset in near.SETS:
            problem, eigenvalues = near.minimum(dataset, seed, device)
            by_set[dataset] = {"eigenvalues": eigenvalues}
            for order in near.ORDERS:
                diagram = near.train_near(replace(problem, order=order), eigenvalues, shares, levels, steps)
                by_set[dataset][order] = near.compared(diagram, eigenvalues)
                if seed == given.seed:
                    fine = np.linspace(diagram.alphas[0], diagram.alphas[-1], 400)
                    theory = np.stack([fine, near.limits(eigenvalues, order, fine)])
                    drawn.append((f"{dataset}, {order} MAML", diagram, float(eigenvalues.max()), theory))
        found["seeds"].append({"seed": seed, **by_set})
    found["minutes"] = (time.perf_counter() - began) / 60
    if writes:
        print_near_minimum(found)
        _agg()
        _write(found, given.out / f"{NEAR_MINIMUM}.json")
        plots.near_minimum(drawn)[0].savefig(given.out / f"{NEAR_MINIMUM}.png", dpi=200)
        print(f"written: {given.out}/{NEAR_MINIMUM}.png, {NEAR_MINIMUM}.json ({found['minutes']:.1f} minutes)")
    return found


def _parsed(words: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION)
    panels = f"{{{','.join(PANELS)}}}"
    parser.add_argument("panel", nargs="?", metavar=panels, default="linear", help="default: %(default)s")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--resampled", action="store_true", help="tasks drawn anew at every step (images: 100 steps, K = 2)"
    )
    sizes.add_argument("--full", action="store_true", help="the published sizes, on a GPU")
    for name, least, text in (
        ("steps", 1, f"training steps of the grid (default: {_defaults(lambda panel: panel.steps)})"),
        (
            "grid",
            2,
            f"rates of each kind (default: {_defaults(lambda panel: f'{len(panel.alphas)} x {len(panel.betas)}')})",
        ),
        ("threads", 1, "CPU threads (default: torch's)"),
    ):
        parser.add_argument(f"--{name}", type=checked(int, partial(check_count, name, least=least)), help=text)
    seed = checked(int, partial(check_count, "seed", least=0, most=2**64 - 1))
    parser.add_argument("--seed", type=seed, default=0, help="of the network and the tasks (default: %(default)s)")
    seeds = checked(int, partial(check_count, "seeds"))
    parser.add_argument("--seeds", type=seeds, default=1, help="number of seeds, from --seed on (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: $LMG_DATA, then data)")
    parser.add_argument("--out", type=Path, default=Path("runs/phase_diagram"), help="folder (default: %(default)s)")
    given, unknown = parser.parse_known_args(words)
    # Before the panel: argparse takes the value of an unknown option for the panel.
    if unknown:
        options = [word for word in unknown if word.startswith("-")]
        message = f"unrecognized arguments: {' '.join(options or unknown)}"
        parser.error(with_nearest(message, option_names(parser._actions)))
    if given.panel not in PANELS:
        meant = did_you_mean(given.panel, PANELS)
        parser.error(f"expected the panel to be one of {', '.join(PANELS)} but got {given.panel!r}. {meant}".rstrip())
    sizes_of = _sizes(given)
    if given.panel not in sizes_of and sizes_of is not SMALL:
        word = "--full" if given.full else "--resampled"
        parser.error(
            f"argument {word}: the panel {given.panel} does not have it: leave it out, or take {', '.join(sizes_of)}."
        )
    if given.data:
        os.environ["LMG_DATA"] = str(given.data)
    return given


def _sizes(given: argparse.Namespace) -> dict[str, Panel]:
    return FULL if given.full else RESAMPLED if given.resampled else SMALL


def _defaults(of: Callable[[Panel], object]) -> str:
    small, full = (", ".join(f"{name} {of(panel)}" for name, panel in each.items()) for each in (SMALL, FULL))
    return f"{small}; with --full {full}"


def _agg() -> None:
    import matplotlib

    matplotlib.use("Agg")


def _write(found: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(json_ready(found), indent=1, allow_nan=False))


def _finish(
    name: str,
    found: dict[str, Any],
    own: Panel,
    diagrams: Sequence[PhaseDiagram],
    judged: MetaProblem,
    out: Path,
    began: float,
) -> None:
    """Save, print and draw; the bisection and the minutes are added to what was found."""
    _agg()
    diagram = diagrams[0]
    for each, seed in zip(diagrams, (s["seed"] for s in found["seeds"]), strict=True):
        each.save(out / (f"{name}.npz" if each is diagram else f"{name}_seed{seed}.npz"))
    points = None
    theorem = found["panel"] == "linear"
    if theorem:
        print("The grid is trained. Now its limits are bisected by training alone, some two minutes ...", flush=True)
        bisected = found["theory"] = bisected_and_measured(judged, BISECTION_STEPS, BISECTED_RATES)
        points = np.stack([bisected["alpha"], bisected["beta_c found by training"]], 1)
    found["minutes"] = (time.perf_counter() - began) / 60
    print_results(name, found, own, diagram)
    if theorem:
        print_bisection(found["theory"])
    grid = ("alphas", "betas", "start", "unadapted", "final", "divergence_step")
    _write(found | {"diagram": {key: getattr(diagram, key) for key in grid}}, out / f"{name}.json")
    title = f"{found['panel']}, {found['steps']} steps\n{found['data']}"
    pictures = {
        f"{name}.png": plots.phase_diagram(
            diagram, found=points, others=diagrams[1:], critical_rates=theorem, title=title
        ),
        f"{name}_ends.png": plots.start_and_end(diagram, title=f"What training does to the curvature, {name}"),
        f"{name}_spectrum.png": plots.spectrum(
            support_spectrum(judged),
            alpha=float(diagram.alphas[len(diagram.alphas) // 2]),
            title=f"Eigenvalue spectrum before training, {name}",
        ),
    }
    for file, (figure, _) in pictures.items():
        figure.savefig(out / file, dpi=200)
    written = ", ".join([*pictures, f"{name}.json", f"{name}.npz"])
    print(f"written to {out}: {written} ({found['minutes']:.1f} minutes)")
