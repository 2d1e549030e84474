"""Trains grids, asks ``suggest_rates`` and its peers, and prints how their pairs end."""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common.lightning import quiet
from benchmarks.common.workers import each_done
from benchmarks.suggest.peers import default, has_optuna, lightning_finder, old_rule, optuna_pair
from benchmarks.suggest.problems import BETAS, SETTINGS, Problems
from benchmarks.suggest.truth import Grid, grid, trained
from lightning_maml_guard import LadderOptions, suggest_rates
from lightning_maml_guard.tuner.rungs import RunGradients
from lightning_maml_guard.tuner.search import LadderSearch

# Constants were chosen on the first; the figures are of the second.
TUNE_SEED, REPORT_SEED = 0, 2
QUIET = LadderOptions(progress=False)
OURS, DEFAULT, OLD, QUARTER, FINDER = (
    "suggest_rates",
    "default",
    "half of the limits",
    "quarter of largest",
    "Lightning's finder",
)
OPTUNA = {"Optuna TPE": False, "Optuna halving": True}
# The batch from which a grid is trained once more.
ANEW = 5000


def _column(problems: Problems, alpha: float) -> float:
    """The largest meta rate by a ladder of one inner rate."""
    search = LadderSearch(problems.stream(1000), [], True, [problems.optimizer()], [alpha], QUIET, 0.25, RunGradients())
    return float(search.find().largest[0])


def study(name: str, seed: int, steps: int | None, optuna: bool) -> dict[str, Any]:
    """Study one problem: the grid, the suggestion, and where it and its peers' pairs end."""
    problems = Problems(name, seed)
    steps = steps or problems.setting.steps
    truth: Grid = grid(problems, steps, BETAS[problems.setting.optimizer])
    began = time.process_time()
    found = suggest_rates(problems.module, problems.data(), ladder=QUIET)
    seconds = time.process_time() - began
    assert found.ladder is not None
    pairs = {OURS: found.suggestion(), DEFAULT: default(problems), OLD: old_rule(problems)}
    if found.ladder.best is not None:
        pairs[QUARTER] = found.alpha, found.margin * float(found.ladder.largest[found.ladder.best])
    pairs[FINDER] = lightning_finder(Problems(name, seed))
    if optuna:
        for word, halving in OPTUNA.items():
            pairs[word] = optuna_pair(problems, found.ladder.taken, halving)
    finite = {who: pair for who, pair in pairs.items() if math.isfinite(pair[1])}
    ends = dict(zip(finite, trained(problems, list(finite.values()), steps).tolist(), strict=True))
    began = time.process_time()
    trained(problems, [found.suggestion() if math.isfinite(found.beta) else default(problems)], 20)
    step = (time.process_time() - began) / 20
    columns = [_column(problems, float(alpha)) for alpha in truth.alphas]
    return {
        "name": name,
        "seed": seed,
        "steps": steps,
        "best": truth.best,
        "pairs": pairs,
        "ends": ends,
        "taken": found.ladder.taken,
        "seconds": seconds,
        "step seconds": step,
        "columns": list(zip(truth.alphas.tolist(), truth.largest.tolist(), columns, strict=True)),
    }


def _kept(path: Path, name: str, seed: int, steps: int | None, optuna: bool) -> dict[str, Any]:
    """Study a problem, or read what an earlier call found."""
    if not path.is_file():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path.write_text(json.dumps(study(name, seed, steps, optuna)))
    return json.loads(path.read_text())


def _print(done: Iterable[dict[str, Any]], optuna: bool) -> list[dict[str, Any]]:
    """Print the ends of each problem as it is done, then the other tables; returns all of them."""
    who = [OURS, DEFAULT, OLD, QUARTER, FINDER, *(OPTUNA if optuna else ())]
    print("Loss at the end over that of the grid's best pair (inf: the run is lost)\n")
    print(f"{'problem':28s}{'steps':>6s} " + "".join(f"{name:>20s}" for name in who), flush=True)
    results = []
    for each in done:
        results.append(each)
        ratios = [each["ends"].get(name, math.nan) / each["best"] for name in who]
        print(f"{each['name']:28s}{each['steps']:6d} " + "".join(f"{ratio:20.2f}" for ratio in ratios), flush=True)
    for word, figure in (("median", median), ("worst", max)):
        values = [[e["ends"][n] / e["best"] for e in results if n in e["ends"]] for n in who]
        print(f"{word:35s}" + "".join(f"{figure(v or [math.nan]):20.2f}" for v in values))
    lost = [sum(not math.isfinite(e["ends"][n]) for e in results if n in e["ends"]) for n in who]
    print(f"{'runs lost':35s}" + "".join(f"{count:20d}" for count in lost))
    print("\nLargest meta rate that trains, by the ladder and by the grid")
    _agree([(truth, found) for each in results for _, truth, found in each["columns"]])
    print("\nCost: CPU seconds, training steps of all rungs, and the run of which the time is 2 %")
    for each in results:
        run = each["seconds"] / 0.02 / each["step seconds"]
        print(f"{each['name']:28s}{each['seconds']:8.1f} s{each['taken']:8d} steps   2 % of {run:10,.0f} steps")
    return results


def _agree(columns: list[tuple[float, float]]) -> None:
    """Print how often a largest meta rate is that of the grid."""
    both = np.array([math.log2(found / truth) for truth, found in columns if found > 0 and truth > 0])
    none = sum(not truth > 0 for truth, _ in columns)
    agreed = sum(not truth > 0 and not found > 0 for truth, found in columns)
    missed = sum(truth > 0 and not found > 0 for truth, found in columns)
    print(
        f"{len(columns)} columns, {none} of them without one in the grid ({agreed} of these without one by the other)."
    )
    if len(both):
        within = int((abs(both) <= 1).sum())
        print(
            f"Of the others {within} of {len(both) + missed} within a factor of 2 "
            f"({100 * within / (len(both) + missed):.0f} %), {(both < -1).sum()} lower, {(both > 1).sum()} higher, "
            f"{missed} not found; median log2 error {np.median(both):+.1f}, largest {both[abs(both).argmax()]:+.1f}."
        )


def _anew(results: list[dict[str, Any]], out: Path) -> None:
    """Train the grids once more, on other batches, and print how well the two agree."""
    columns = []
    for each in results:
        path = out / f"{each['name'].replace(' ', '_')}_{each['seed']}_{each['steps']}_anew.json"
        if not path.is_file():
            problems = Problems(each["name"], each["seed"])
            found = grid(problems, each["steps"], BETAS[problems.setting.optimizer], ANEW)
            path.write_text(json.dumps(found.largest.tolist()))
        pairs = zip(each["columns"], json.loads(path.read_text()), strict=True)
        columns += [(truth, largest) for (_, truth, _), largest in pairs]
    print(f"\nThe same by a second grid, on other batches ({', '.join(each['name'] for each in results)})")
    _agree(columns)


def main() -> None:
    """Study problems and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suggest", description=__doc__)
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=f"of {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--seed", type=int, default=REPORT_SEED, help=f"{TUNE_SEED} is the one tuned on")
    parser.add_argument("--steps", type=int, help="of every run (default: 500, fewer on images; 500 is the full size)")
    parser.add_argument("--out", type=Path, default=Path("runs/suggest"), help="results so far are read from there")
    parser.add_argument("--anew", action="store_true", help="train the grids once more on other batches and compare")
    given = parser.parse_args()
    unknown = sorted(set(given.problems) - set(SETTINGS))
    if unknown:
        parser.error(f"expected problems among {', '.join(SETTINGS)} but got {', '.join(unknown)}.")
    torch.set_num_threads(1)
    quiet()
    optuna = has_optuna()
    if not optuna:
        print("Optuna is not installed: its rows are left out (pip install optuna).\n")
    given.out.mkdir(parents=True, exist_ok=True)
    jobs = []
    for name in given.problems or SETTINGS:
        path = given.out / f"{name.replace(' ', '_')}_{given.seed}_{given.steps or ''}.json"
        jobs.append(partial(_kept, path, name, given.seed, given.steps, optuna))
    results = _print(each_done(jobs, "5 minutes a problem, more on images"), optuna)
    if given.anew:
        _anew(results, given.out)


if __name__ == "__main__":
    main()
