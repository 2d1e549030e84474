"""GuardBench 2, late deaths, lost learning and rescue: ``python -m benchmarks.guard_bench_2 [--quick] [--set tune|report]``.

Trains every run of :mod:`study` without a guard, with common remedies, under ``ConvergenceGuard()`` and under
``ConvergenceGuard(action="rescale")`` at their defaults. Report only ``--set report``: nothing is chosen on its seeds,
nor on the family that is held out, which is in this set alone. Runs without a guard are kept in ``OUT/cache``, so that a
second call trains under the guard alone. ``--overhead`` takes the lengths of a healthy run of
the ReLU family that are timed; without any, none is.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.options import add_options, add_seeds, options_of, seeds_of
from benchmarks.common.workers import each_done
from benchmarks.guard_bench_2.families import HELD_OUT
from benchmarks.guard_bench_2.report import line, report, trace
from benchmarks.guard_bench_2.score import Run, alarm_steps, figures
from benchmarks.guard_bench_2.study import columns, overhead, study

# Two runs of seed 10 were seen under a guard before the references held the base at three times its rate, so seeds 10 and
# 11 are not reported. On seed 20 the families "relu" and "gelu" were given other tasks after one of their columns had
# shown that their best reference learns too little to be scored. Seeds 20 and 21 were reported before; nothing was chosen
# on them, nor on 22.
SEEDS = {"tune": (0, 1, 10, 11), "report": (20, 21, 22, 23, 24, 25, 26, 27, 28, 29)}


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard_bench_2", description=__doc__)
    add_seeds(parser, SEEDS)
    parser.add_argument("--quick", action="store_true", help="one seed, half of the scenarios")
    parser.add_argument("--families", nargs="+", help="only these")
    parser.add_argument("--scenarios", metavar="PATTERN", help="only those in which it is found")
    parser.add_argument("--overhead", type=int, nargs="*", default=[300, 3000], metavar="STEPS")
    parser.add_argument(
        "--read", type=Path, nargs="+", metavar="RUNS", help="print the table of runs.json of earlier calls"
    )
    parser.add_argument("--messages", action="store_true", help="print the guard's checks and messages of each run")
    add_options(parser)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("guard_bench_2"))
    given = parser.parse_args()
    seeds = seeds_of(parser, given, SEEDS)
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    if given.read:
        runs, elsewhere = [run for path in given.read for run in json.loads(path.read_text())], 0.0
    else:
        runs, elsewhere = _trained(given, seeds, options_of(given))
    timed = [overhead(steps, 3 if steps <= 3000 else 1) for steps in given.overhead]
    minutes = (time.process_time() - began + elsewhere) / 60
    result = _figures(runs, timed) | {"set": given.set, "options": options_of(given), "minutes": minutes}
    report(result)
    (given.out / "guard_bench_2.json").write_text(json.dumps(result, indent=1))
    print(f"written: {given.out}/guard_bench_2.json" + ("" if given.read else ", runs.json"))


def _trained(given: argparse.Namespace, seeds: tuple[int, ...], options: dict[str, Any]) -> tuple[list[Run], float]:
    """Train the runs; also the CPU seconds that other processes took."""
    jobs = []
    for name, seed, steps, scenarios in columns(seeds, quick=given.quick, held_out=given.set == "report"):
        kept = tuple(each for each in scenarios if re.search(given.scenarios or "", each))
        if kept and (given.families is None or name in given.families):
            jobs.append(partial(study, name, seed, steps, kept, given.out / "cache", options))
    runs: list[Run] = []
    elsewhere = 0.0
    for found, seconds in each_done(jobs, "20 minutes with --quick, some hours without", given.workers):
        elsewhere += seconds if given.workers > 1 else 0.0
        for run in found:
            runs.append(run)
            print(line(run), flush=True)
            if given.messages:
                print(trace(run), end="", flush=True)
        (given.out / "runs.json").write_text(json.dumps(runs))
    return runs, elsewhere


def _figures(runs: list[Run], timed: list[dict[str, Any]]) -> dict[str, Any]:
    runs = sorted(runs, key=lambda run: run["name"])
    scored = [run for run in runs if run["scored"]]
    groups = {
        "families tuned on": [run for run in scored if run["family"] != HELD_OUT],
        f"held out: {HELD_OUT}": [run for run in scored if run["family"] == HELD_OUT],
    }
    alarms = {run["name"]: sorted(alarm_steps(run)) for run in scored if run["healthy"]}
    return {
        "seeds": sorted({run["seed"] for run in runs}),
        "groups": {name: figures(group) for name, group in groups.items() if group},
        "overhead": timed,
        "not scored": [run["name"] for run in runs if not run["scored"]],
        "alarmed": [f"{name}: {steps}" for name, steps in alarms.items() if steps],
    }


if __name__ == "__main__":
    main()
