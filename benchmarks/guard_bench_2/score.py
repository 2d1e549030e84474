"""From runs to figures: detection, words, false alarms, rescue, harm, progress thrown away, work."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.common.detectors import Series, early_stopping, finite, spike_detection, spike_ratios, time_matched
from benchmarks.guard_bench_2.fates import COLLAPSED, DIVERGED, FATES, LEARNING, STALLED
from benchmarks.guard_bench_2.peers import ALERTS
from benchmarks.guard_bench_2.scenarios import BATCH
from benchmarks.guard_bench_2.study import AFTERMATH, CAPPED, RESCALE, WARN
from benchmarks.guard_bench_2.training import CLIP, SKIP, UNGUARDED
from benchmarks.guard_bench_2.words import WITHIN, first_true, thrown_away, words

LEADS = (1, 3, 5, 10, 30)
NEAR, NEARER = 1.5, 1.1  # times the column's best within which a rescued run ends
ROUNDING = 1e-3  # between losses evaluated together and one by one
REMEDIES = (UNGUARDED, CLIP, SKIP, RESCALE, CAPPED)
Run = dict[str, Any]

GUARD = "guard"
ALARM = math.log(3.0)  # the severity of the guard's default threshold: what an advice counts as that rests on none
OWN: dict[str, Callable[[Run], Series]] = {
    GUARD: lambda run: _severity(run),
    "guard, its words included": lambda run: [*_severity(run), *((word.step, ALARM) for word in words(run[WARN]))],
    "guard, its lookaheads alone": lambda run: [(step, value) for step, value in run[WARN]["severities"]],
    "loss-spike ratio": lambda run: spike_ratios(run["losses"]),
    "gradient-norm spike": lambda run: spike_ratios(run["norms"]),
    "EarlyStopping rule": lambda run: early_stopping(run["losses"], run["start"]),
    "SpikeDetection rule": lambda run: spike_detection(run["losses"]),
}


def _severity(run: Run) -> Series:
    """The severity as it is logged at each step; infinite ones are only kept by the guard itself."""
    return [(step, value) for name in ("severities", "logged") for step, value in run[WARN][name]]


def scores(run: Run) -> dict[str, Series]:
    """Every detector's scores of a run."""
    own = {name: detector(run) for name, detector in OWN.items()}
    return own | {name: [(step, value) for step, value in series] for name, series in run["peers"].items()}


def detection(runs: list[Run]) -> dict[str, dict[int, float | None]]:
    """Compute the time-matched AUROC by detector and lead.

    Bad batches are left out: what the next batch does cannot be seen steps before it comes.
    """
    known = [(scores(run), run) for run in runs]
    healthy = [(found, run["steps"] - AFTERMATH) for found, run in known if run["healthy"]]
    deaths = [(found, run["death"]) for found, run in known if run["death"] is not None and run["cause"] != BATCH]
    if not healthy or not deaths:
        return {}
    return {
        name: {
            lead: time_matched(
                [(found[name], death) for found, death in deaths],
                [(found[name], known_steps) for found, known_steps in healthy],
                lead,
            )
            for lead in LEADS
        }
        for name in known[0][0]
    }


def deaths(runs: list[Run]) -> dict[int, int]:
    """Count the deaths that a lead leaves in."""
    at = [run["death"] for run in runs if run["death"] is not None and run["cause"] != BATCH]
    return {lead: sum(death >= lead for death in at) for lead in LEADS}


def told(runs: list[Run]) -> dict[str, tuple[int, int]]:
    """Count the runs that got a true word in time, by fate: of how many."""
    found = {}
    for each in (DIVERGED, COLLAPSED, STALLED):
        chosen = [run for run in runs if run["fate"] == each]
        found[each] = (sum(first_true(run[WARN], run) is not None for run in chosen), len(chosen))
    return found


def told_by_peers(runs: list[Run]) -> dict[str, tuple[int, int]]:
    """The same of the peers, for which any alert from a tenth of the run before the death on counts."""
    lost = [run for run in runs if run["fate"] != LEARNING]
    found = {}
    for name in ALERTS:
        if any(name in run["peers"] for run in runs):
            count = sum(
                any(abs(step - run["due"]) <= WITHIN * run["steps"] for step in run["alerts"][name]) for run in lost
            )
            found[name] = (count, len(lost))
    return found


def false_alarms(runs: list[Run]) -> dict[str, tuple[int, int]]:
    """Count alarms in healthy runs, and the healthy steps."""
    healthy = [run for run in runs if run["healthy"]]
    steps = sum(run["steps"] - AFTERMATH for run in healthy)
    found = {GUARD: (sum(len(alarm_steps(run)) for run in healthy), steps)}
    for name in ALERTS:
        if any(name in run["peers"] for run in runs):
            alerts = [step for run in healthy for step in run["alerts"][name] if step < run["steps"] - AFTERMATH]
            found[name] = (len(alerts), steps)
    return found


def alarm_steps(run: Run) -> set[int]:
    """Steps within the reported ones at which the guard spoke."""
    return {each.step for each in words(run[WARN]) if each.step < run["steps"] - AFTERMATH}


def outcome(run: Run, remedy: str) -> dict[str, Any] | None:
    """Fate and final loss under a remedy; None where it was not run."""
    if remedy == CAPPED:  # differs from RESCALE for modules written by hand alone
        return run.get(CAPPED, run[RESCALE])
    return run if remedy == UNGUARDED else run.get(remedy)


def rescue(runs: list[Run], remedy: str) -> dict[str, Any]:
    """Outcomes of the runs that die without a guard, and of those that stall."""
    found: dict[str, Any] = {}
    for name, fates in (("died", {DIVERGED, COLLAPSED}), ("stalled", {STALLED})):
        ends = [(run, outcome(run, remedy)) for run in runs if run["fate"] in fates]
        known = [(run, end) for run, end in ends if end is not None]
        if not known:
            continue
        learn = [end["final"] / run["best"] if end["fate"] == LEARNING else math.inf for run, end in known]
        # A cosine schedule ends lower than any constant rate, a rescued run's included.
        level = [each * run["best"] / run["best constant"] for each, (run, _) in zip(learn, known, strict=True)]
        found[name] = {
            "runs": len(known),
            "finite": sum(math.isfinite(end["final"]) for _, end in known) / len(known),
            "learning": sum(math.isfinite(each) for each in learn) / len(known),
            "within 1.5x": sum(each <= NEAR for each in learn) / len(known),
            "within 1.1x": sum(each <= NEARER for each in learn) / len(known),
            "within 1.5x of constant": sum(each <= NEAR for each in level) / len(known),
        }
    return found


def harm(runs: list[Run], remedy: str = RESCALE) -> dict[str, Any]:
    """Effect on the runs that are healthy without a guard: ratios of the final losses."""
    healthy = [(run, outcome(run, remedy)) for run in runs if run["healthy"]]
    ratios = sorted(finite(end["final"] / run["final"]) for run, end in healthy if end is not None)
    if not ratios:
        return {}
    return {
        "runs": len(ratios),
        "median": median(ratios),
        "p90": ratios[min(int(0.9 * len(ratios)), len(ratios) - 1)],
        "worst": ratios[-1],
        "lost": [run["name"] for run, end in healthy if end is not None and end["fate"] != LEARNING],
        "changed by warnings": [
            run["name"] for run, _ in healthy if abs(run[WARN]["final"] / run["final"] - 1) > ROUNDING
        ],
    }


def near(runs: list[Run]) -> tuple[float, float, float]:
    """Shares of the healthy runs within 1.5x and 1.1x of the best, and 1.5x of the best constant rate's.

    A rescue cannot hope for more.
    """
    healthy = [run for run in runs if run["healthy"]]
    size = max(len(healthy), 1)
    bars = ((NEAR, "best"), (NEARER, "best"), (NEAR, "best constant"))
    first, second, third = (sum(run["final"] <= bar * run[name] for run in healthy) / size for bar, name in bars)
    return first, second, third


def thrown(runs: list[Run]) -> dict[str, Any]:
    """Progress that rollbacks threw away, as shares of the steps so far."""
    shares = [share for run in runs for share in thrown_away(run[RESCALE])]
    if not shares:
        return {"rollbacks": 0}
    whole = sum(share == 1 for share in shares)
    return {"rollbacks": len(shares), "median": median(shares), "to the start": whole}


def work(runs: list[Run]) -> dict[int, float]:
    """Counted work of the checks of healthy runs, as a share of the run, by its length: medians."""
    healthy = [run for run in runs if run["healthy"]]
    by_length: dict[int, list[float]] = {}
    for run in healthy:
        by_length.setdefault(run["steps"], []).append(run[WARN]["work"] / run["steps"])
    return {steps: median(shares) for steps, shares in sorted(by_length.items())}


def figures(runs: list[Run]) -> dict[str, Any]:
    """Compute every figure of a group of runs."""
    return {
        "runs": len(runs),
        "fates": {each: sum(run["fate"] == each for run in runs) for each in FATES},
        "healthy": sum(run["healthy"] for run in runs),
        "near": near(runs),
        "deaths": deaths(runs),
        "detection": detection(runs),
        "told": told(runs),
        "told by peers": told_by_peers(runs),
        "false alarms": false_alarms(runs),
        "rescue": {remedy: rescue(runs, remedy) for remedy in REMEDIES},
        "harm": harm(runs),
        "thrown": thrown(runs),
        "work": work(runs),
    }
