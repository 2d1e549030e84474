"""GuardBench, detection and rescue of diverging runs: ``python -m benchmarks.guard_bench [--quick] [--set tune|report]``.

Trains every run of :mod:`columns` without a guard, with common remedies and under the guard. Prints how well the guard
predicts divergence and how many runs it keeps from diverging. Report only ``--set report`` (seed 1): the defaults were
chosen on ``--set tune`` (seed 0).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.options import add_options, options_of
from benchmarks.common.workers import each_done
from benchmarks.guard_bench.columns import STEPS, columns
from benchmarks.guard_bench.guarded import (
    ARMS,
    RESCALE,
    ROLLBACK,
    ROLLBACK_DEFAULT,
    WARN,
    WARN_DEFAULT,
)
from benchmarks.guard_bench.plot import draw
from benchmarks.guard_bench.process import both
from benchmarks.guard_bench.remedies import CLIP_1, CLIP_10, HALVE, UNGUARDED
from benchmarks.guard_bench.score import LEADS, Run, detection, false_alarms, harm, rescue

SEEDS = {"tune": range(0, 1), "report": range(1, 2)}


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard_bench", description=__doc__)
    parser.add_argument("--set", choices=tuple(SEEDS), default="report")
    parser.add_argument("--quick", action="store_true", help="a tenth of the columns, at random")
    parser.add_argument("--columns", type=int, help="this number of columns, at random")
    parser.add_argument("--families", nargs="+", help="only these")
    add_options(parser)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("guard_bench"))
    given = parser.parse_args()
    options = options_of(given)
    chosen = columns(SEEDS[given.set])
    if given.families:
        chosen = [column for column in chosen if column.family in given.families]
    count = given.columns or (7 if given.quick else len(chosen))
    # The long ones first, so that the workers end at the same time.
    chosen = random.Random(0).sample(chosen, min(count, len(chosen)))
    chosen.sort(key=lambda column: (column.family != "omniglot", -column.inner_steps))
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    runs: list[Run] = []
    jobs = [partial(both, column, options) for column in chosen]
    for column, found, seconds in each_done(jobs, "1 minute a part, more on images", given.workers):
        runs += found
        torch.save(runs, given.out / "runs.pt")
        outcomes = " ".join(f"{run.plain.outcome[0]}{run.guarded[ROLLBACK].trace.outcome[0]}" for run in found)
        print(f"{len(runs):4d} runs  {seconds:5.0f} s  {outcomes}  {column}", flush=True)
    runs.sort(key=lambda run: (str(run.column), run.beta))
    result = figures(runs)
    result["set"], result["options"] = given.set, options
    result["minutes"] = (time.perf_counter() - began) / 60
    report(result)
    (given.out / "guard_bench.json").write_text(json.dumps(result, indent=1))
    draw(result, given.out / "guard_bench.png")
    print(f"written: {given.out}/guard_bench.json, guard_bench.png, runs.pt")


def figures(runs: list[Run]) -> dict[str, Any]:
    """Compute every figure of the report."""
    outcomes = [run.plain.outcome for run in runs]
    remedies = (UNGUARDED, CLIP_1, CLIP_10, HALVE, RESCALE, ROLLBACK, ROLLBACK_DEFAULT)
    seconds = {arm: sum(run.guarded[arm].seconds for run in runs) for arm in ARMS}
    return {
        "runs": len(runs),
        "outcomes": {outcome: outcomes.count(outcome) for outcome in ("healthy", "diverged", "neither")},
        "detection": detection(runs),
        "false alarms": {arm: false_alarms(runs, arm) for arm in (WARN, WARN_DEFAULT)},
        "rescue": {arm: rescue(runs, arm) for arm in remedies},
        "harm": {arm: harm(runs, arm) for arm in remedies},
        "seconds": seconds,
        "engines disagree": [run.name for run in runs if run.plain.outcome != run.remedies[UNGUARDED].outcome],
    }


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"\nGuardBench, set '{result['set']}': {result['runs']} runs of {STEPS} steps, {result['outcomes']}")
    print(
        f"{result['minutes']:.1f} minutes; Trainer seconds by arm: { {k: round(v) for k, v in result['seconds'].items()} }"
    )
    head = "".join(f"  lead {lead:2d}: AUROC recall" for lead in LEADS)
    print(f"\n{'detection (recall at 2 % false alarms)':40s}{head}")
    for name, leads in result["detection"].items():
        print(f"{name:40s}" + "".join(f"        {leads[k][0]:6.3f} {leads[k][1]:6.2f}" for k in LEADS if k in leads))
    first = next(iter(result["detection"].values()))
    print(f"{'diverging runs':40s}" + "".join(f"        {first[k][2]:6d}       " for k in LEADS if k in first))
    for arm, (alarms, steps, where) in result["false alarms"].items():
        print(f"\n{arm}: {alarms} alarms in {steps} healthy steps: {1000 * alarms / max(steps, 1):.2f} per 1000")
        print("".join(f"   {each}\n" for each in where), end="")
    print(
        f"\n{'remedy':36s} {'finite':>7s} {'healthy':>8s} {'final/best':>11s} | {'harm: median':>12s} p90 largest diverged"
    )
    for arm, found in result["rescue"].items():
        hurt = result["harm"][arm]
        print(
            f"{arm:36s} {found['finite']:7.1%} {found['healthy']:8.1%} {found['median ratio']:11.3g} | "
            f"{hurt['median']:12.4f} {hurt['p90']:.3f} {hurt['largest']:.3g} {len(hurt['made to diverge'])}"
        )
    found = result["rescue"][UNGUARDED]
    print(
        f"(of {found['diverging']} diverging runs; final/best over the {found['compared']} whose column has a healthy run)"
    )
    for arm in (RESCALE, ROLLBACK, ROLLBACK_DEFAULT):
        for title in ("not finite", "not healthy"):
            print(f"{arm}, {title}:" + "".join(f"\n   {each}" for each in result["rescue"][arm][title]))
        print(f"{arm}, made to diverge: {result['harm'][arm]['made to diverge']}")


if __name__ == "__main__":
    main()
