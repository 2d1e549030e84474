"""The poster's experiments as a command: ``lightning-maml-guard phase-diagram`` and ``examples/phase_diagram.py``."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lightning_maml_guard.cli.errors import with_nearest
from lightning_maml_guard.cli.paper_panels import FULL, SMALL, problems
from lightning_maml_guard.cli.paper_tables import BISECTED_RATES, BISECTION_STEPS, write
from lightning_maml_guard.phase.diagram import phase_diagram
from lightning_maml_guard.utils.checks import check_count, checked

DESCRIPTION = f"""Trains a grid of inner and meta rates, draws the training error with the critical rates, and prints
for each inner rate the largest meta rate that trained beside the guard's. Writes PANEL.png, PANEL_spectrum.png,
PANEL.json and PANEL.npz; run again, it goes on where it was broken off. Image data is read from $LMG_DATA. Under
torchrun the grid is dealt out over the processes. After its grid the linear panel bisects the limits by training alone,
some two minutes: {BISECTED_RATES} inner rates and {BISECTION_STEPS} steps, whatever --grid and --steps say."""


def main(words: Sequence[str] | None = None, prog: str = "lightning-maml-guard phase-diagram") -> dict[str, Any]:
    """Train a panel's grid, print and draw what was found, and write it.

    Args:
        words: The command line without the program's name (default: ``sys.argv``).
        prog: The program's name in its help.

    Returns:
        What was written: the table, the claims, and what the run was.

    Raises:
        SystemExit: If the command line is wrong, or after ``--help``.
    """
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION)
    panels = f"{{{','.join(SMALL)}}}"
    parser.add_argument("panel", nargs="?", metavar=panels, default="linear", help="default: %(default)s")
    parser.add_argument("--full", action="store_true", help="the published sizes, on a GPU")
    for name, least, said in (
        ("steps", 1, "training steps of the grid"),
        ("grid", 2, "rates of each kind"),
        ("threads", 1, "CPU threads (default: torch's)"),
    ):
        parser.add_argument(f"--{name}", type=checked(int, partial(check_count, name, least=least)), help=said)
    seed = checked(int, partial(check_count, "seed", least=0))
    parser.add_argument("--seed", type=seed, default=0, help="of the network and the tasks (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/phase_diagram"), help="folder (default: %(default)s)")
    given, unknown = parser.parse_known_args(words)
    # Before the panel: the value of an option that is not known is taken for one.
    if unknown:
        options = [word for word in unknown if word.startswith("-")]
        known = [name for name in vars(given) if name != "panel"]
        parser.error(with_nearest(f"unrecognized arguments: {' '.join(options or unknown)}", known))
    if given.panel not in SMALL:
        parser.error(f"expected the panel to be one of {', '.join(SMALL)} but got {given.panel!r}.")
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
