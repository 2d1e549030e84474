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
from lightning_maml_guard.cli.arguments import exit_with_error
from lightning_maml_guard.cli.errors import option_names, with_nearest
from lightning_maml_guard.cli.paper_panels import FULL, SMALL, Panel, problems
from lightning_maml_guard.cli.paper_results import bisected_and_measured, json_ready, results, support_spectrum
from lightning_maml_guard.cli.paper_tables import print_bisection, print_results
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.diagram import phase_diagram
from lightning_maml_guard.phase.result import PhaseDiagram
from lightning_maml_guard.tasks.image_files import DatasetError
from lightning_maml_guard.utils.checks import check_count, checked, did_you_mean

# The bisection of the linear panel's limits: steps of each training, and inner rates.
BISECTION_STEPS, BISECTED_RATES = 4000, 16
DESCRIPTION = f"""Trains a grid of inner and outer learning rates, draws the training error with the critical rates,
and prints for each inner rate the largest outer rate that trained beside the measured limit. Writes PANEL.png,
PANEL_spectrum.png, PANEL.json and PANEL.npz; run again, it continues where it was interrupted. Under torchrun the
grid is divided among the processes. After its grid the linear panel finds the limits by training alone, some two
minutes: {BISECTED_RATES} inner rates and {BISECTION_STEPS} steps, whatever --grid and --steps say."""


def main(words: Sequence[str] | None = None, prog: str = "lightning-maml-guard phase-diagram") -> dict[str, Any]:
    """Train a panel's grid, print, draw and save the results, and return what PANEL.json holds, but for the grid."""
    given = _parsed(words, prog)
    panel = _panel(given)
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
    try:
        family, judged = problems(panel, device, given.seed)
    except DatasetError as error:
        exit_with_error(f"{prog}: error: --data: {error}")
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
    found = {name: getattr(given, name) for name in ("panel", "full")}
    found |= {"steps": panel.steps, "seed": given.seed, "resampled": panel.resample}
    if not launched or dist.get_rank() == 0:
        found |= results(diagram)
        _finish(found, diagram, judged, given.out, began)
    if launched:
        dist.barrier()
        dist.destroy_process_group()
    return found


def _parsed(words: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION)
    panels = f"{{{','.join(SMALL)}}}"
    parser.add_argument("panel", nargs="?", metavar=panels, default="linear", help="default: %(default)s")
    parser.add_argument("--full", action="store_true", help="the published sizes, on a GPU")
    for name, least, text in (
        ("steps", 1, f"training steps of the grid (default: {_defaults(lambda panel: panel.steps)})"),
        ("grid", 2, f"rates of each kind (default: {_defaults(lambda panel: panel.alphas[2])})"),
        ("threads", 1, "CPU threads (default: torch's)"),
    ):
        parser.add_argument(f"--{name}", type=checked(int, partial(check_count, name, least=least)), help=text)
    seed = checked(int, partial(check_count, "seed", least=0, most=2**64 - 1))
    parser.add_argument("--seed", type=seed, default=0, help="of the network and the tasks (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: $LMG_DATA, then data)")
    parser.add_argument("--out", type=Path, default=Path("runs/phase_diagram"), help="folder (default: %(default)s)")
    given, unknown = parser.parse_known_args(words)
    # Before the panel: argparse takes the value of an unknown option for the panel.
    if unknown:
        options = [word for word in unknown if word.startswith("-")]
        message = f"unrecognized arguments: {' '.join(options or unknown)}"
        parser.error(with_nearest(message, option_names(parser._actions)))
    if given.panel not in SMALL:
        meant = did_you_mean(given.panel, SMALL)
        parser.error(f"expected the panel to be one of {', '.join(SMALL)} but got {given.panel!r}. {meant}".rstrip())
    if given.data:
        os.environ["LMG_DATA"] = str(given.data)
    return given


def _defaults(of: Callable[[Panel], int]) -> str:
    small, full = (", ".join(f"{name} {of(panel)}" for name, panel in each.items()) for each in (SMALL, FULL))
    return f"{small}; with --full {full}"


def _panel(given: argparse.Namespace) -> Panel:
    panel = (FULL if given.full else SMALL)[given.panel]
    if given.grid:
        panel = replace(panel, alphas=(*panel.alphas[:2], given.grid), betas=(*panel.betas[:2], given.grid))
    return replace(panel, steps=given.steps) if given.steps else panel


def _finish(found: dict[str, Any], diagram: PhaseDiagram, judged: MetaProblem, out: Path, began: float) -> None:
    """Save, print and draw; the bisection and the minutes are added to what was found."""
    import matplotlib

    matplotlib.use("Agg")
    name = found["panel"]
    diagram.save(out / f"{name}.npz")
    points = None
    if name == "linear":
        print("The grid is trained. Now its limits are bisected by training alone, some two minutes ...", flush=True)
        bisected = found["theory"] = bisected_and_measured(judged, BISECTION_STEPS, BISECTED_RATES)
        points = np.stack([bisected["alpha"], bisected["beta_c found by training"]], 1)
    found["minutes"] = (time.perf_counter() - began) / 60
    print_results(name, found, diagram)
    if "theory" in found:
        print_bisection(found["theory"])
    grid = ("alphas", "betas", "start", "unadapted", "final", "divergence_step")
    written = json_ready(found | {"diagram": {key: getattr(diagram, key) for key in grid}})
    (out / f"{name}.json").write_text(json.dumps(written, indent=1, allow_nan=False))
    title = f"Training error after {found['steps']} steps, {name}"
    plots.phase_diagram(diagram, found=points, title=title)[0].savefig(out / f"{name}.png", dpi=200)
    alpha = float(diagram.alphas[len(diagram.alphas) // 2])
    title = f"Eigenvalue spectrum before training, {name}"
    spectrum, _ = plots.spectrum(support_spectrum(judged), alpha=alpha, title=title)
    spectrum.savefig(out / f"{name}_spectrum.png", dpi=200)
    print(f"written: {out}/{name}.png, {name}_spectrum.png, {name}.json, {name}.npz ({found['minutes']:.1f} minutes)")
