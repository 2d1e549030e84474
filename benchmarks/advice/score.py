"""From studies to figures: shares by cause, family and optimizer, false advice, and the peers."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.advice.configurations import CAUSES, HEALTHY
from benchmarks.advice.study import CLIPPED, FOUND, HALVED

EARLY_STOPPING = "EarlyStopping's message"  # names no rate, so what is run again is the run that broke
PEERS = (FOUND, HALVED, CLIPPED, EARLY_STOPPING)
GUARD = "guard's first advice"
BASE = "the base's own rates"  # what the best advice can reach: they are near the best, by hand

Study = dict[str, Any]


def broken(studies: list[Study]) -> list[Study]:
    """Select what is scored: broken by construction, and it did break."""
    return [each for each in studies if each["cause"] != HEALTHY and not each["trains"]]


def not_scored(studies: list[Study]) -> list[str]:
    """Name what did not break, and what was meant to be healthy and is not."""
    return [
        f"{each['name']} (seed {each['seed']}): {'trains' if each['trains'] else 'does not train'}"
        for each in studies
        if each["trains"] != (each["cause"] == HEALTHY)
    ]


def _share(studies: list[Study], holds: Callable[[Study], bool]) -> float:
    return sum(map(holds, studies)) / len(studies)


def row(studies: list[Study]) -> dict[str, Any]:
    """Compute the figures of a group of broken runs."""
    guarded = [each for each in studies if "advice" in each]
    found: dict[str, Any] = {"runs": len(studies), BASE: _share(studies, lambda each: each["base trains"])}
    if guarded:
        advised = [each for each in guarded if each["advice"] is not None]
        # Where the loss never left its start, the advice led by the rest of the run.
        leads = [(e["steps"] if e["left"] is None else e["left"]) - e["advice"]["step"] for e in advised]
        found |= {
            "right": _share(guarded, lambda each: each["right"]),
            "ahead": _share(guarded, lambda each: each["ahead"]),
            "lead": median(leads) if leads else None,
            "no advice": len(guarded) - len(advised),
            GUARD: _share(guarded, lambda each: each["second trains"]),
            "learns": _share(guarded, lambda each: each["second learns"]),
        }
    beside = [each for each in studies if "peers" in each]
    if beside:
        found["runs of peers"] = len(beside)
        found |= {peer: sum(each["peers"][peer]["trains"] for each in beside) / len(beside) for peer in PEERS[:-1]}
        found[EARLY_STOPPING] = 0.0
    return found


def grouped(studies: list[Study], field: str, names: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Compute the figures by the values of a field, and over all."""
    values = names or tuple(dict.fromkeys(each[field] for each in studies))
    groups = {value: [each for each in studies if each[field] == value] for value in values}
    return {value: row(group) for value, group in groups.items() if group}


def figures(studies: list[Study]) -> dict[str, Any]:
    """Compute every figure of the report."""
    scored = broken(studies)
    healthy = [each for each in studies if each["cause"] == HEALTHY and each["trains"]]
    listened = [each for each in healthy if "advice" in each]
    steps = sum(each["steps"] for each in listened)
    false = [each for each in listened if each["advice"] is not None]
    return {
        "broken": len(scored),
        "healthy": len(healthy),
        "not scored": not_scored(studies),
        "all": row(scored) if scored else {},
        "by cause": grouped(scored, "cause", CAUSES),
        "by family": grouped(scored, "family"),
        "by optimizer": grouped(scored, "optimizer"),
        "healthy steps": steps,
        "false advice": [f"{e['name']} (seed {e['seed']}): {e['advice']}" for e in false],
        "false advice per 1000 steps": 1000 * len(false) / steps if steps else None,
        "changed by the guard": [f"{e['name']} (seed {e['seed']})" for e in listened if not e["unchanged"]],
        "failures": [_failure(each) for each in scored if "advice" in each and not _served(each)],
    }


def _served(study: Study) -> bool:
    return study["right"] and study["ahead"] and study["second trains"]


def _failure(study: Study) -> str:
    advice = study["advice"]
    said = "no advice"
    if advice is not None:
        set_ = {k: advice[k] for k in ("alpha", "beta", "gradient_clip_val") if advice[k] is not None}
        said = f"step {advice['step']}: {advice['cause']}, {_numbers(set_)}"
    wrong = [
        name for name, fine in (("cause", "right"), ("late", "ahead"), ("rate", "second trains")) if not study[fine]
    ]
    return (
        f"{study['name']} (seed {study['seed']}), left {study['left']}: {said}; second run "
        f"{study['second'] / study['best']:.3g}x; {', '.join(wrong)}"
    )


def _numbers(values: dict[str, float]) -> str:
    return ", ".join(f"{name} = {value:.3g}" for name, value in values.items()) or "nothing to set"
