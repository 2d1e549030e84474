"""AdviceBench, broken runs started again as the guard's first advice says: ``python -m benchmarks.advice [--quick]``.

Trains every configuration of :mod:`configurations` without a guard and with ``ConvergenceGuard()`` at its defaults,
applies the first advice and trains again. Report only ``--set report``: nothing was chosen on its seeds. Runs without
a guard are kept in ``OUT/cache``, so that a second call trains under the guard alone.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.advice.configurations import HEALTHY, Configuration, configurations
from benchmarks.advice.plot import draw
from benchmarks.advice.score import GUARD, PEERS, figures
from benchmarks.advice.study import study

SEEDS = {"tune": (0, 1, 2), "report": (10, 11, 12)}


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.advice", description=__doc__)
    parser.add_argument("--set", choices=tuple(SEEDS), default="report")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of the set")
    parser.add_argument("--quick", action="store_true", help="one seed, every third configuration")
    parser.add_argument("--names", metavar="PATTERN", help="only configurations whose name it is found in")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-guard", dest="guard", action="store_false", help="only see which configurations break")
    parser.add_argument("--messages", action="store_true", help="print first messages and checks of runs not served")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("advice_bench"))
    given = parser.parse_args()
    seeds = [seed for seed in SEEDS[given.set] if given.seeds is None or seed in given.seeds]
    chosen = configurations()[:: 3 if given.quick else 1]
    chosen = [config for config in chosen if re.search(given.names or "", config.name)]
    jobs = [(config, seed) for seed in (seeds[:1] if given.quick else seeds) for config in chosen]
    began = time.perf_counter()
    studies = []
    for done in _each(jobs, given):
        studies.append(done)
        print(f"{len(studies):4d}/{len(jobs)} {line(done)}", flush=True)
        if given.messages:
            print(trace(done), end="", flush=True)
    order = {(config.name, seed): at for at, (config, seed) in enumerate(jobs)}
    studies.sort(key=lambda each: order[each["name"], each["seed"]])
    result = figures(studies)
    result |= {"set": given.set, "seeds": seeds, "minutes": (time.perf_counter() - began) / 60}
    report(result)
    (given.out / "studies.json").write_text(json.dumps(studies, indent=1))
    (given.out / "advice_bench.json").write_text(json.dumps(result, indent=1))
    if result["by cause"]:
        draw(result, given.out / "advice_bench.png")
    print(f"written: {given.out}/advice_bench.json, advice_bench.png, studies.json")


def _each(jobs: list[tuple[Configuration, int]], given: argparse.Namespace) -> Any:
    """Yield the studies as they are done; one worker works in this process."""
    folder, options = given.out / "cache", {"guarded": given.guard, "peers": given.peers}
    if given.workers == 1:
        yield from (study(config, seed, folder, **options) for config, seed in jobs)
        return
    with ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(study, config, seed, folder, **options) for config, seed in jobs]):
            yield done.result()


def line(found: dict[str, Any]) -> str:
    """Sum a study up in a line."""
    (a, b), (a0, b0) = found["rates"], found["base rates"]
    parts = [f"{found['name']:44s} seed {found['seed']:2d} {found['seconds']:4.0f} s"]
    parts.append(f"alpha {a:g} ({a0:g}) beta {b:g} ({b0:g}) left {found['left']} peak {found['peak']}")
    parts.append(f"final {found['final'] / found['best']:.3g}x")
    parts += [f"{found['dead']:.0%} dead"] if found["dead"] else []
    broken = found["cause"] != HEALTHY
    if broken == found["trains"]:
        parts.append("NOT BROKEN" if broken else "NOT HEALTHY")
    if "advice" in found:
        advice = found["advice"]
        said = "no advice"
        if advice is not None:
            rates = ("alpha", "beta", "gradient_clip_val")
            said = f"{advice['cause']}@{advice['step']} " + " ".join(
                f"{rate}={advice[rate]:.3g}" for rate in rates if advice[rate] is not None
            )
        parts.append(f"| {said}")
        if broken:
            marks = [
                f"{name} {'yes' if found[key] else 'NO'}" for name, key in (("right", "right"), ("ahead", "ahead"))
            ]
            parts.append(f"{' '.join(marks)} second {found['second'] / found['best']:.3g}x")
        elif not found["unchanged"]:
            parts.append("CHANGED BY THE GUARD")
    if "peers" in found:
        parts.append("| " + " ".join("+" if found["peers"][peer]["trains"] else "-" for peer in PEERS[:-1]))
    return "  ".join(parts)


def trace(found: dict[str, Any]) -> str:
    """Show what the guard said and saw in a broken run that its advice did not serve, or in a healthy one it judged."""
    healthy = found["cause"] == HEALTHY
    if "advice" not in found or (found["advice"] is None if healthy else found["second trains"] and found["right"]):
        return ""
    lines = [f"      after {step} steps: {' '.join(text.split())}" for step, text in found["messages"][:1]]
    for check in found["checks"]:
        numbers = " ".join(f"{name} {check[name]:.3g}" for name in ("alpha", "alpha_c", "beta", "beta_c", "severity"))
        lines.append(f"      check {check['step']}: {check['status']} {numbers} {' '.join(check['findings'])}")
    return "".join(f"{each}\n" for each in lines)


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"\nAdviceBench, set '{result['set']}', seeds {result['seeds']}: {result['broken']} broken runs, ", end="")
    print(f"{result['healthy']} healthy; {result['minutes']:.1f} minutes")
    print(
        f"\n{'':24s}{'runs':>5s} {'cause':>7s} {'in time':>8s} {'lead':>5s} {'none':>5s} {'trains':>8s} | finder halved clip"
    )
    groups = {"all": {"all": result["all"]}} | {
        name: result[name] for name in ("by cause", "by family", "by optimizer")
    }
    for title, rows in groups.items():
        print(title if title != "all" else "", end="\n" if title != "all" else "")
        for name, each in rows.items():
            print(f"  {name:22s}{_row(each)}")
    print(f"EarlyStopping's message names no rate: its second run is the first one, {0.0:.0%}")
    rate = result["false advice per 1000 steps"]
    if rate is not None:
        print(
            f"\nfalse advice: {len(result['false advice'])} in {result['healthy steps']} healthy steps, {rate:.2f} per 1000"
        )
        print("".join(f"   {each}\n" for each in result["false advice"]), end="")
        print(f"healthy runs changed by the guard: {result['changed by the guard'] or 'none'}")
    print("\nnot scored:" + "".join(f"\n   {each}" for each in result["not scored"]))
    print("\nnot served:" + "".join(f"\n   {each}" for each in result["failures"]))


def _row(each: dict[str, Any]) -> str:
    if not each:
        return ""
    text = f"{each['runs']:5d}"
    if "right" in each:
        lead = math.nan if each["lead"] is None else each["lead"]
        text += f" {each['right']:7.1%} {each['ahead']:8.1%} {lead:5.0f} {each['no advice']:5d} {each[GUARD]:8.1%}"
    if PEERS[0] in each:
        text += " | " + " ".join(f"{each[peer]:6.1%}" for peer in PEERS[:-1])
    return text


if __name__ == "__main__":
    main()
