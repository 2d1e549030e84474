"""All runs of one configuration and seed: references, unguarded, under the guard, as advised, and the peers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.advice.configurations import HEALTHY, Configuration
from benchmarks.advice.training import FINDER, Setting, find_lr, train
from benchmarks.common.kept import Kept
from benchmarks.common.lightning import quiet
from benchmarks.common.schedules import peak_step

RUNS_VERSION = 3  # of what the cache holds: raise it where runs without a guard change
LEFT = 3.0
WINDOW = 5
TRAINS = 1.5
# The references: factors of the base's (alpha, beta).
CROSS = ((1, 1), (1, 0.25), (1, 0.5), (1, 2), (0.5, 1), (2, 1))
FOUND, HALVED, CLIPPED = "LearningRateFinder", "both rates halved", "gradient clipping 1.0"


class Runs:
    """Runs without a guard, kept on disk: they depend on their setting and seed alone."""

    def __init__(self, folder: Path) -> None:
        self.kept = Kept(folder)

    def _kept(self, what: str, setting: Setting, seed: int, compute: Callable[[], Any]) -> Any:
        return self.kept.get(f"{what} {RUNS_VERSION} {torch.__version__} {setting!r} {setting.steps} {seed}", compute)

    def plain(self, setting: Setting, seed: int) -> dict[str, Any]:
        """Train without a guard."""
        return self._kept("plain", setting, seed, lambda: train(setting, seed))

    def suggested(self, setting: Setting, seed: int) -> float | None:
        """Ask the learning-rate finder."""
        return self._kept(f"finder {FINDER}", setting, seed, lambda: find_lr(setting, seed))

    def references(self, base: Setting, seed: int) -> list[dict[str, Any]]:
        """Train the references; the first is the base itself."""
        return [self.plain(replace(base, alpha=base.alpha * a, beta=base.beta * b), seed) for a, b in CROSS]


def leaving_step(losses: list[float], start: float, outlier: int | None = None) -> int | None:
    """Find the first step whose loss exceeds LEFT times the start, in most of WINDOW steps and not in one bad batch.

    The outlier batch's own loss does not count.
    """
    over = [(step, not loss <= LEFT * start) for step, loss in enumerate(losses) if step != outlier]
    for at, (step, left) in enumerate(over):
        window = [flag for _, flag in over[at : at + WINDOW]]
        if left and 2 * sum(window) > len(window):
            return step
    return None


def advised(setting: Setting, advice: dict[str, Any] | None) -> Setting:
    """Apply an advice to a configuration, to the letter."""
    if advice is None:
        return setting
    changed = {
        "alpha": advice["alpha"],
        "beta": advice["beta"],
        "clip": advice["gradient_clip_val"],
    }
    return replace(setting, **{name: value for name, value in changed.items() if value is not None})


def study(
    config: Configuration, seed: int, folder: Path, *, guarded: bool = True, peers: bool = True
) -> dict[str, Any]:
    """Run a configuration in every way.

    Args:
        config: The configuration.
        seed: The seed.
        folder: Where runs without a guard are kept.
        guarded: Run it under the guard, too.
        peers: Run the peers, too.

    Returns:
        Plain data: what ``score`` reads.
    """
    torch.set_num_threads(1)
    quiet()
    began = time.perf_counter()
    runs, setting = Runs(folder), config.setting
    references = runs.references(config.healthy_setting, seed)
    best, healthy_start = min(each["final"] for each in references), references[0]["start"]
    plain = runs.plain(setting, seed)
    found: dict[str, Any] = {
        "name": config.name,
        "cause": config.cause,
        "family": setting.family,
        "optimizer": setting.optimizer,
        "seed": seed,
        "rates": [setting.alpha, setting.beta],
        "base rates": [config.healthy_setting.alpha, config.healthy_setting.beta],
        "best": best,
        "base trains": references[0]["final"] <= TRAINS * best,
        "start": plain["start"],
        "final": plain["final"],
        "dead": plain.get("dead"),
        "left": leaving_step(plain["losses"], plain["start"], setting.outlier),
        "peak": peak_step(setting.schedule, setting.steps),
        "steps": setting.steps,
        "plain seconds": plain["seconds"],
    }
    found["trains"] = plain["final"] <= TRAINS * best
    broken = config.cause != HEALTHY
    if guarded and not (broken and found["trains"]):
        run = train(setting, seed, guarded=True, ends=broken)
        advice = run["advice"]
        found |= {"advice": advice, "messages": run["messages"], "checks": run["checks"]}
        found["guarded seconds"] = run["seconds"]
        if broken:
            found["right"] = config.is_right(advice)
            found["ahead"] = _ahead(advice, found["left"], found["peak"])
            second = runs.plain(advised(setting, advice), seed)
            found |= {"second": second["final"], "second trains": second["final"] <= TRAINS * best}
            # A weaker notion, beside it: half of the way from the start to the best.
            found["second learns"] = second["final"] <= (healthy_start + best) / 2
        else:
            same = _same(run["losses"], plain["losses"]) and run["final"] == plain["final"]
            found["unchanged"] = same
    if peers and broken and not found["trains"]:
        found["peers"] = _peers(runs, setting, seed, best)
    found["seconds"] = time.perf_counter() - began
    return found


def _ahead(advice: dict[str, Any] | None, left: int | None, peak: int | None) -> bool:
    """Return True if the advice came before the loss left its start, if it did, and before the schedule's peak."""
    if advice is None:
        return False
    return advice["step"] <= min(math.inf if left is None else left, math.inf if peak is None else peak)


def _same(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(
        a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True)
    )


def _peers(runs: Runs, setting: Setting, seed: int, best: float) -> dict[str, Any]:
    rate = runs.suggested(setting, seed)
    changed = {
        FOUND: setting if rate is None else replace(setting, beta=rate),
        HALVED: replace(setting, alpha=setting.alpha / 2, beta=setting.beta / 2),
        CLIPPED: replace(setting, clip=1.0),
    }
    finals = {name: runs.plain(each, seed)["final"] for name, each in changed.items()}
    return {name: {"final": final, "trains": final <= TRAINS * best} for name, final in finals.items()} | {
        "suggested": rate
    }
