"""All runs of one column: references, without a guard, with remedies, and under a guard that warns and one that acts."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.kept import Kept
from benchmarks.common.lightning import quiet
from benchmarks.common.options import guard_arguments
from benchmarks.guard_bench_2.families import BY_HAND, FAMILIES, HELD_OUT, PLAIN
from benchmarks.guard_bench_2.fates import COLLAPSED, DIVERGED, LEARNING, death, fate, final_loss, had_excursion, onset
from benchmarks.guard_bench_2.fates import stride as stride_of
from benchmarks.guard_bench_2.peers import ALERTS, PACKAGES, installed, peers
from benchmarks.guard_bench_2.scenarios import ALPHA, GAIN, REFERENCES, SCENARIOS
from benchmarks.guard_bench_2.training import CLIP, SKIP, Setting, train

RUNS_VERSION = 1  # of what the cache holds: raise it where runs without a guard change
WARN, RESCALE, CAPPED = "guard warn", "guard rescale", "guard rescale, inner_lr_cap"
ARMS: dict[str, dict[str, Any]] = {WARN: {"action": "warn"}, RESCALE: {"action": "rescale"}}
LEARNS = 0.8  # share of its start below which the best reference of a column must end, or nothing is learned there
AFTERMATH = 30  # last steps of a healthy run, which only show that it stays healthy: an alarm there may be right


def _kept(kept: Kept, setting: Setting, remedy: str = "unguarded") -> Any:
    return kept.get(f"{RUNS_VERSION} {remedy} {setting.key}", lambda: train(setting, remedy))


def study(
    name: str, seed: int, steps: int, scenarios: tuple[str, ...], folder: Path, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], float]:
    """Run a column in every way.

    Args:
        name: Its family.
        seed: Seed of the weights and the data.
        steps: Steps of each run.
        scenarios: What happens to its runs, one each.
        folder: Where runs without a guard are kept.
        options: Arguments of every guard.

    Returns:
        Plain data per run, what ``score`` reads; and the CPU seconds it took.
    """
    torch.set_num_threads(1)
    quiet()
    began, kept = time.process_time(), Kept(folder)
    found = [_run(kept, Setting(name, each, seed, steps), options) for each in scenarios]
    return found, time.process_time() - began


def _run(kept: Kept, setting: Setting, options: dict[str, Any]) -> dict[str, Any]:
    drifts = setting.what.strength == GAIN
    references = {
        each: _kept(kept, Setting(setting.family, each, setting.seed, setting.steps, drifts)) for each in REFERENCES
    }
    finals = {name: final_loss(each["after"]) for name, each in references.items()}
    best = min(finals.values())
    plain = _kept(kept, setting)
    start, every = plain["start"], stride_of(setting.steps)
    sampled = plain["after"][:-1:every] + plain["after"][-1:]  # as under a guard
    run: dict[str, Any] = {
        "name": setting.name,
        "family": setting.family,
        "scenario": setting.scenario,
        "cause": setting.what.cause,
        "seed": setting.seed,
        "steps": setting.steps,
        "start": start,
        "best": best,
        "best constant": min(final for name, final in finals.items() if name != "cosine"),
        "scored": best <= LEARNS * start,
        "fate": fate(sampled, start, best),
        "final": final_loss(sampled),
        "excursion": had_excursion(plain["after"], start, best),
        "not finite": next((at for at, each in enumerate(plain["losses"]) if not math.isfinite(each)), None),
        "harmful": [at for at, (b, a) in enumerate(zip(plain["before"], plain["after"], strict=True)) if not a < b],
        "plain seconds": plain["seconds"],
    }
    died = run["fate"] in {DIVERGED, COLLAPSED}
    run["death"] = death(plain["after"], start, best) if died else None
    if run["death"] is None:  # of a stalled run, or one that died in its last steps
        run["due"] = setting.steps if died else onset(references["steady"]["after"], start, best)
    else:
        run["due"] = run["death"]
    run["healthy"] = run["fate"] == LEARNING and not run["excursion"]
    versions = [package for package in PACKAGES if installed(package)]
    run["peers"] = kept.get(f"peers {RUNS_VERSION} {versions} {setting.key}", lambda: peers(plain))
    run["alerts"] = {name: [step for step, on in run["peers"].get(name, []) if on] for name in ALERTS}
    run["losses"] = plain["losses"]
    run["norms"] = np.linalg.norm(np.array(plain["norms"]).reshape(len(plain["norms"]), -1), axis=1).tolist()
    for remedy in (CLIP, *([SKIP] if installed("stabilityguard") else [])):
        if not run["healthy"] or setting.scenario == "steady":
            run[remedy] = _outcome(_kept(kept, setting, remedy), start, best)
    for arm, arguments in ARMS.items():
        result = train(setting, guard=guard_arguments({**arguments, **options}))
        run[arm] = _outcome(result, start, best) | {
            each: result[each]
            for each in ("checks", "events", "severities", "logged", "messages", "stopped", "work", "seconds")
        }
    if FAMILIES[setting.family].module == BY_HAND and not run["healthy"]:
        run[CAPPED] = _outcome(
            train(setting, guard=guard_arguments({**ARMS[RESCALE], **options}), capped=True), start, best
        )
    return run


def _outcome(result: dict[str, Any], start: float, best: float) -> dict[str, Any]:
    losses = result["after"]
    return {"fate": fate(losses, start, best), "final": final_loss(losses)}


def overhead(steps: int, pairs: int) -> dict[str, Any]:
    """Measure what the guard at its defaults costs a healthy run of the ReLU family.

    Args:
        steps: Steps of the run.
        pairs: Runs without and under the guard, in turns.

    Returns:
        Ratios of CPU time, one per pair, and the counted work of the checks as a share of the run.
    """
    torch.set_num_threads(1)
    quiet()
    setting, ratios, work = Setting("relu", "steady", 0, steps), [], 0.0
    for _ in range(pairs):
        plain = train(setting, remedy="nothing recorded")
        guarded = train(setting, guard={})
        ratios.append(guarded["seconds"] / plain["seconds"])
        work = guarded["work"] / steps
    return {"steps": steps, "cpu": ratios, "work": work}


def columns(seeds: tuple[int, ...], *, quick: bool, held_out: bool) -> list[tuple[str, int, int, tuple[str, ...]]]:
    """List the columns: family, seed, steps and scenarios; the long ones first, so that workers end at the same time.

    Args:
        seeds: The seeds.
        quick: One seed, and fewer scenarios.
        held_out: With the family that is kept out of tuning.
    """
    found = []
    for seed in seeds[: 1 if quick else None]:
        for name in QUICK:
            if name == HELD_OUT and not held_out:
                continue
            chosen = QUICK[name] if quick else tuple(SCENARIOS)
            if FAMILIES[name].module == PLAIN:
                chosen = tuple(each for each in chosen if SCENARIOS[each].cause != ALPHA)
            found.append((name, seed, 300, chosen))
            if name in LONG:
                found.append((name, seed, 1000, LONG[name] if quick else LONG_FULL))
    return found


_LATE, _INNER = "late rise by hand", "inner rate rises"
QUICK: dict[str, tuple[str, ...]] = {
    "transformer": ("steady", "ramp", _LATE, "cosine restarts"),
    "conv": ("steady", _LATE),
    "lstm": ("steady", _LATE, "cosine restarts", _INNER),
    "blobs": ("steady", "ramp", _LATE, "cosine restarts", "drift", _INNER),
    "softplus": ("steady", "ramp", "cosine restarts", "bad batch", _INNER),
    "gelu": ("steady", "ramp", _LATE, "bad batch", "drift"),
    "relu": ("steady", "hot", _LATE, "cosine restarts", "bad batch", _INNER),
    "plain conv": ("steady", _LATE, "bad batch"),
    "plain": ("steady", "cosine", "hot", "cosine restarts", "drift"),
}
LONG: dict[str, tuple[str, ...]] = {"plain": ("steady", "ramp", _LATE), "gelu": (), "softplus": ()}
LONG_FULL = ("steady", "cosine", "ramp", _LATE, "cosine restarts", "bad batch", "drift")
