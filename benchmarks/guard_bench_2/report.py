"""What GuardBench 2 prints: a line per run, and one table."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.guard_bench_2.peers import PACKAGES, installed
from benchmarks.guard_bench_2.score import GUARD, LEADS, REMEDIES, Run
from benchmarks.guard_bench_2.study import RESCALE, WARN
from benchmarks.guard_bench_2.words import first_true, thrown_away

WIDTH = 44


def line(run: Run) -> str:
    """Sum a run up in a line."""
    acted = run[RESCALE]
    said = first_true(run[WARN], run)
    parts = [f"{run['name']:48s} {run['fate']:9s} best {run['best']:<7.3g} {_times(run['final'], run['best'])}"]
    parts.append(f"death {run['death']} due {run['due']}" if run["fate"] != "learning" else "")
    parts.append("" if run["fate"] == "learning" else f"word {said}")
    parts.append(f"| rescale: {acted['fate']} {_times(acted['final'], run['best'])}")
    thrown = thrown_away(acted)
    parts.append(f"thrown {' '.join(f'{share:.0%}' for share in thrown)}" if thrown else "")
    return "  ".join(filter(None, parts))


def _times(value: float, best: float) -> str:
    return f"{value / best:.3g}x" if math.isfinite(value) else "inf"


def trace(run: Run) -> str:
    """Show the checks and messages of a run, under both guards."""
    lines = []
    for arm in (WARN, RESCALE):
        lines.append(f"   {arm}:")
        for check in run[arm]["checks"]:
            cause = "" if check["cause"] is None else f" ADVICE {check['cause']} {check['evidence']}"
            lines.append(
                f"      check {check['step']}: {check['status']} severity {check['severity']:.3g} "
                f"ratios {check['ratio'][0]:.3g} {check['ratio'][1]:.3g} applied {check['applied']}{cause}"
            )
        lines += [f"      event {event}" for event in run[arm]["events"]]
        lines += [f"      after {step} steps: {' '.join(text.split())}" for step, text in run[arm]["messages"]]
    return "\n".join(lines) + "\n"


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    groups = result["groups"]
    print(
        f"\nGuardBench 2, set '{result['set']}', seeds {result['seeds']}, options {result['options'] or 'none'}; ",
        end="",
    )
    print(f"{result['minutes']:.1f} CPU minutes")
    print("within ...x: of the column's best; of constant: of its best at a constant rate, without a cosine schedule")
    print(f"{'':{WIDTH}s}" + "".join(f"{name:>34s}" for name in groups))

    def row(title: str, cells: list[str]) -> None:
        print(f"{title:{WIDTH}s}" + "".join(f"{cell:>34s}" for cell in cells))

    each = list(groups.values())
    row("runs", [str(group["runs"]) for group in each])
    row("learning/stalled/collapsed/diverged", ["/".join(map(str, group["fates"].values())) for group in each])
    row("healthy: learn without an excursion", [str(group["healthy"]) for group in each])
    row(
        "   of them within 1.5x, 1.1x; 1.5x of constant",
        [" ".join(f"{share:.0%}" for share in group["near"]) for group in each],
    )
    row(f"AUROC at {'/'.join(map(str, LEADS))} steps", ["" for _ in each])
    for name in next((group["detection"] for group in each if group["detection"]), {}):
        row(f"   {name}", [_leads(group["detection"].get(name, {})) for group in each])
    row("   deaths", [" ".join(f"{count:5d}" for count in group["deaths"].values()) for group in each])
    row("true word within 10 % of the run", ["" for _ in each])
    for fate in each[0]["told"]:
        row(f"   {fate}", [_of(group["told"][fate]) for group in each])
    row("any alert within 10 % of the death", ["" for _ in each])
    for name in each[0]["told by peers"]:
        row(f"   {name}", [_of(group["told by peers"].get(name, (0, 0))) for group in each])
    row("alarms per 1000 healthy steps", ["" for _ in each])
    for name in each[0]["false alarms"]:
        row(f"   {name}", [_per_1000(group["false alarms"].get(name, (0, 0))) for group in each])
    for kind in ("died", "stalled"):
        row(f"of runs that {kind}: finite, learn,", ["1.5x, 1.1x; 1.5x of constant" for _ in each])
        for remedy in REMEDIES:
            row(f"   {remedy}", [_rescue(group["rescue"][remedy].get(kind)) for group in each])
    row("harm: median, p90, worst; not learning", [_harm(group["harm"]) for group in each])
    row("thrown away: median; rollbacks, to 0", [_thrown(group["thrown"]) for group in each])
    for steps in sorted({steps for group in each for steps in group["work"]}):
        row(f"work of checks, {steps} steps", [_share(group["work"].get(steps)) for group in each])
    for found in result["overhead"]:
        ratios = " ".join(f"{ratio:.2f}" for ratio in found["cpu"])
        print(f"healthy ReLU run of {found['steps']} steps: CPU time x {ratios}; counted work {1 + found['work']:.2f}x")
    print(f"false alarms of the {GUARD}:" + "".join(f"\n   {name}" for name in result["alarmed"]))
    changed = [name for group in each for name in group["harm"].get("changed by warnings", [])]
    print(f"healthy runs that a guard changes that only warns: {changed or 'none'}")
    print(f"not scored, as the best reference learns nothing: {result['not scored'] or 'none'}")
    missing = [package for package in PACKAGES if not installed(package)]
    if missing:
        print(f"not installed, so left out: {', '.join(missing)} (pip install -e '.[bench]')")


def _leads(found: dict[int, float | None]) -> str:
    return " ".join("    -" if found.get(lead) is None else f"{found[lead]:5.3f}" for lead in LEADS)


def _of(pair: tuple[int, int]) -> str:
    return f"{pair[0]} of {pair[1]}" if pair[1] else "-"


def _per_1000(pair: tuple[int, int]) -> str:
    return f"{1000 * pair[0] / pair[1]:.2f}" if pair[1] else "-"


def _rescue(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    shares = (found[name] for name in ("finite", "learning", "within 1.5x", "within 1.1x", "within 1.5x of constant"))
    return f"{found['runs']:3d}: " + " ".join(f"{share:5.0%}" for share in shares)


def _harm(found: dict[str, Any]) -> str:
    if not found:
        return "-"
    return f"{found['median']:.3f} {found['p90']:.3f} {found['worst']:.3g}; {len(found['lost'])}"


def _thrown(found: dict[str, Any]) -> str:
    if not found["rollbacks"]:
        return "-"
    return f"{found['median']:.1%}; {found['rollbacks']}, {found['to the start']}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x of the run"
