"""Cost of a check, and of lambda_max by other packages: ``python -m benchmarks.check_cost [--out FILE]``.

Each network is measured at initialisation and after training. ``H`` is the Hessian of the mean support loss, ``J`` the
Jacobian of the exact meta-update. All methods multiply with the same float32 operator (curvlinops with its own operator
of the same loss). The error is measured against float64 Lanczos converged to 1e-8. The methods take turns in one
process, each turn with a meta-step; multiples are medians of the ratios within a turn, and the time to build the
operator counts. PyHessian runs at its defaults and at the loosest tolerance of 1e-1 ... 1e-7 that reaches our true
error (or 1 %), the median over its start vectors; it is not asked for errors below float32's rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.check_cost import methods
from benchmarks.check_cost.cases import SPECS, Case, Reference, cases, fewer, reference, seconds
from benchmarks.check_cost.methods import Found
from benchmarks.common.workers import begin
from lightning_maml_guard import measure
from lightning_maml_guard.stability.hvp import MeasurementCache

CERTIFIED, FEW, LONG = 1e-2, 4, 200
PATIENCE = 6.0  # seconds, after which a method takes no further turn


def taking_turns(step: Callable[[], Any], works: dict[str, Callable[[], Any]], turns: int) -> dict[str, Any]:
    """Median seconds, median multiple of the step, and the last result of each."""
    step()
    times: dict[str, list[float]] = {name: [] for name in works}
    ratios: dict[str, list[float]] = {name: [] for name in works}
    last = {}
    for _ in range(turns):
        one = seconds(step)[0]
        for name, work in works.items():
            if sum(times[name]) > PATIENCE:
                continue
            taken, last[name] = seconds(work)
            times[name].append(taken)
            ratios[name].append(taken / one)
    return {name: (median(times[name]), median(ratios[name]), last[name]) for name in works}


def power_to(case: Case, operator: Any, known: Reference, error: float) -> tuple[Found, dict]:
    """PyHessian for this error: the run of the median start vector, and its options."""
    runs = [methods.power_to(operator, known, error, case.spec.limit, seed) for seed in range(case.spec.seeds)]
    reached = sorted((run for run in runs if run[0].products), key=lambda run: run[0].products)
    missed = [run for run in runs if run[0].products is None]
    return (reached + missed)[len(runs) // 2]


def at_least(found: Found, known: Reference) -> float:
    """Products until it converged or was stopped; inf where it converges to an eigenvalue of the other sign."""
    if found.products is not None:
        return found.products
    return math.inf if found.value * known.top < 0 else float(found.note.split()[2])


def compare(case: Case, which: str) -> tuple[list[dict], dict]:
    known = reference(case, which)
    operator = case.operator(which)
    certified = methods.ours(operator, LONG)
    error = max(known.error(certified.value), known.floor)
    same, same_options = power_to(case, operator, known, error)
    loose, loose_options = power_to(case, operator, known, CERTIFIED)

    def fresh(work: Callable[..., Found], *given: Any, **options: Any) -> Callable[[], Found]:
        return lambda: work(*[case.operator(which)] * (1 + (work is not methods.ours)), *given, **options)

    works = {
        "ours, as a check runs it": fresh(methods.ours),
        "PyHessian, defaults": fresh(methods.power),
        "hessian-eigenthings, defaults (k=10, LM)": fresh(methods.eigenthings),
        "scipy eigsh on our products, LA, tol 1e-2": lambda: methods.scipy_on(case.operator(which)),
    }
    if certified.products > 20:
        works["ours, until certified"] = fresh(methods.ours, LONG)
    if which == "H":
        works["curvlinops + scipy eigsh, LA, tol 1e-2"] = lambda: methods.curvlinops_on(case)
    for title, options in (("our true error", same_options), ("1 % true error", loose_options)):
        if options:
            works[f"PyHessian, tol {options['tol']:.0e}: {title}"] = fresh(methods.power, **options)
    rows = []
    for name, (taken, multiple, found) in taking_turns(case.step, works, case.spec.turns).items():
        given = {"our true error": same, "1 % true error": loose}.get(name.split(": ")[-1], found)
        rows.append(row(case, which, known, name, given, taken, multiple))
    for name, found in (("PyHessian, our true error", same), ("PyHessian, 1 % true error", loose)):
        if found.products is None:
            rows.append(row(case, which, known, name, found, math.nan, math.nan))
    least = methods.eigenthings_to(operator, known, error)
    name = "hessian-eigenthings, LA, fewest steps for our true error (by oracle)"
    rows.append(row(case, which, known, name, least, math.nan, math.nan))
    width = certified.high / certified.value - 1
    verdict = {
        "case": f"{case.title}: {which}",
        "ours": certified.products,
        "ours_error": known.error(certified.value),
        "interval_width": width,
        "certified": bool(certified.low <= known.top <= certified.high),
        "pyhessian": at_least(same, known),
        "pyhessian_reached": same.products is not None,
        "pyhessian_1_percent": at_least(loose, known),
        "pyhessian_1_percent_reached": loose.products is not None,
        "fewest_possible_with_our_error": least.products,
        "wrong_sign": [each["method"] for each in rows if each["wrong_sign"]],
        **vars(known),
    }
    return rows, verdict


def row(case: Case, which: str, known: Reference, name: str, found: Found, taken: float, multiple: float) -> dict:
    one = {
        "case": f"{case.title}: {which}",
        "method": name,
        "products": found.products,
        "seconds": taken,
        "multiple": multiple,
        "error": known.error(found.value),
        "interval": "" if math.isnan(found.low) else "holds" if found.low <= known.top <= found.high else "MISSES",
        "wrong_sign": found.value * known.top < 0,
        "note": found.note,
    }
    said = "; ".join(filter(None, (one["interval"] and f"interval {one['interval']}", found.note)))
    said += " **wrong sign**" if one["wrong_sign"] else ""
    print(
        f"| {one['case']} | {name} | {found.products or '-'} | {taken:.3f} | {multiple:.1f} | {one['error']:.1e} "
        f"| {said} |",
        flush=True,
    )
    return one


def check_rows(case: Case) -> list[dict]:
    """The default check, of Adam."""
    some = min(FEW, case.problem.tasks)
    works, caches = {}, [MeasurementCache(), MeasurementCache()]
    for tasks, cache in zip((case.problem.tasks, some), caches, strict=True):
        problem = fewer(case.problem, tasks)
        # Before its first step Adam has no second moments, so this checks the first step.
        works[f"check, {tasks} tasks"] = lambda p=problem, c=cache: measure(p, optimizer=case.optimizer, cache=c)
    for work in works.values():
        work()  # the first measurement includes the self-check of the second derivatives
    rows = []
    for name, (taken, multiple, report) in taking_turns(case.step, works, case.spec.turns).items():
        rows.append({"case": case.title, "method": name, "products": report.hvps, "seconds": taken})
        rows[-1] |= {"multiple": multiple, "status": report.status, "reasons": list(report.reasons)}
        print(f"| {case.title} | {name} | {report.hvps} | {taken:.3f} | {multiple:.1f} | {report.status} |", flush=True)
    return rows


def judge(verdicts: list[dict]) -> list[str]:
    lines = []
    for key, title in (("pyhessian", "our true error"), ("pyhessian_1_percent", "a 1 % true error")):
        ratios = [(each["ours"] / each[key], each) for each in verdicts]
        lines.append(f"\nOurs to a certified 1 % / PyHessian to {title}, products:")
        for ratio, each in ratios:
            sign = "" if each[f"{key}_reached"] else "<"
            lines.append(f"  {each['case']}: {each['ours']} / {'>' * bool(sign)}{each[key]:.0f} = {sign}{ratio:.2f}")
        worst = max(ratio for ratio, _ in ratios)
        more = sum(ratio > 1 for ratio, _ in ratios)
        lines.append(
            f"  worst {worst:.2f} (target 0.5: {'met' if worst <= 0.5 else 'MISSED'}); more in {more} cases (target 0)"
        )
    wrong = sorted({name for each in verdicts for name in each["wrong_sign"]})
    lines.append(f"\nWrong sign (target: never ours): {wrong or 'none'}")
    held = sum(each["certified"] for each in verdicts)
    widest = max(each["interval_width"] for each in verdicts)
    lines.append(
        f"Our interval holds the reference in {held} of {len(verdicts)} cases; its widest reaches {widest:.1%} up."
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--cases", nargs="+", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--full", action="store_true", help="J of conv4, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin("a minute or two a case")
    began = time.perf_counter()
    if arguments.full:
        SPECS["conv4"] = replace(SPECS["conv4"], operators="HJ")
    rows, verdicts, checks = [], [], []
    print("| case | method | products | CPU s | x meta-step | error of lambda_max | |\n|---|---|---|---|---|---|---|")
    for case in cases(arguments.cases):
        for which in case.spec.operators:
            found, verdict = compare(case, which)
            rows, verdicts = rows + found, [*verdicts, verdict]
        checks += check_rows(case)
    print(
        "\n| reference | lambda_max | lambda_min | residual | float32 against it | asymmetry | with torch's own norms |"
    )
    print("|---|---|---|---|---|---|---|")
    for each in verdicts:
        print(
            f"| {each['case']} | {each['top']:.6g} | {each['bottom']:.4g} | {each['residual']:.0e} | {each['gap']:.0e} "
            f"| {each['asymmetry']:.0e} | {each['own']:+.0e} |"
        )
    print("\n".join(judge(verdicts)))
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    if arguments.out:
        found = {"torch": torch.__version__, "rows": rows, "verdicts": verdicts, "checks": checks}
        arguments.out.write_text(json.dumps(found, indent=1, default=str))


if __name__ == "__main__":
    main()
