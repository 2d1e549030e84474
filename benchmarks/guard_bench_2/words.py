"""What a guard said of a run, and whether it was true.

A word is true if it names what the scenario broke, at any time before the deadline, or if it tells of a state the run
is in: that one only from a tenth of the run before the run died. Which words are true was fixed before any run under a
guard was looked at; kinds that are added later are recognised by their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.guard_bench_2.fates import COLLAPSED, DIVERGED
from benchmarks.guard_bench_2.scenarios import ALPHA, BATCH, BETA, DRIFT, NOTHING

WITHIN = 0.1  # share of the run within which a word has to come
RIGHT: dict[str, frozenset[str]] = {
    BETA: frozenset({"beta", "both", "schedule"}),
    ALPHA: frozenset({"alpha", "both"}),
    BATCH: frozenset({"batch"}),
    DRIFT: frozenset({"alpha", "beta", "both"}),
    NOTHING: frozenset(),
}
# Parts of the names of reasons that tell of a state, and those of them that blame ReLUs.
STATES = ("COLLAPS", "STALL", "NOT_LEARNING", "DIVERG", "NOT_FINITE", "HARMFUL", "LOST", "DIED", "ROLLED_BACK")
OF_RELUS = ("UNITS_DIED",)
DEAD_UNITS = "dead units"
WITH_RELUS = ("relu", "conv", "plain conv")


@dataclass(frozen=True)
class Word:
    """Something a guard said.

    Attributes:
        step: When.
        cause: What an advice blames; None of an event.
        reasons: Names of the kinds of its reasons.
    """

    step: int
    cause: str | None
    reasons: tuple[str, ...]

    @property
    def states(self) -> tuple[str, ...]:
        """The reasons that tell of a state."""
        return tuple(name for name in self.reasons if any(part in name for part in STATES))


def words(said: dict[str, Any]) -> list[Word]:
    """Collect what a guard said of a run: advice, and events that tell of a state."""
    found = [Word(each["step"], each["cause"], tuple(each["evidence"])) for each in said["checks"] if each["cause"]]
    for event in said["events"]:
        word = Word(event["step"] or 0, None, tuple(name for name, _ in event["reasons"]))
        if word.states:
            found.append(word)
    return sorted(found, key=lambda each: each.step)


def is_true(word: Word, run: dict[str, Any]) -> bool:
    """Return True if a word is true of a run.

    Args:
        word: The word.
        run: ``family``, ``cause``, ``fate``, ``steps``, ``due`` (the step of the death, or at which a stalled run should
            have learned), ``not finite`` (the first step whose loss is not) and ``harmful`` (the steps at which
            adaptation makes the loss worse).
    """
    relus = run["family"] in WITH_RELUS
    if word.cause in RIGHT[run["cause"]]:
        return True
    if word.cause == DEAD_UNITS:
        return relus and run["cause"] in {BETA, DRIFT}
    if word.step < run["due"] - WITHIN * run["steps"]:
        return False
    return any(_holds(name, word.step, run, relus) for name in word.states)


def _holds(name: str, step: int, run: dict[str, Any], relus: bool) -> bool:
    if name in OF_RELUS:
        return relus
    if "HARMFUL" in name:
        return step in run["harmful"]
    if "NOT_FINITE" in name:
        return run["not finite"] is not None and step >= run["not finite"]
    if "DIVERG" in name or "ROLLED_BACK" in name:
        return run["fate"] in {DIVERGED, COLLAPSED}
    return True


def first_true(said: dict[str, Any], run: dict[str, Any]) -> int | None:
    """Find the step of the first true word; None if there is none in time."""
    deadline = run["due"] + WITHIN * run["steps"]
    steps = [word.step for word in words(said) if word.step <= deadline and is_true(word, run)]
    return steps[0] if steps else None


def thrown_away(said: dict[str, Any]) -> list[float]:
    """Shares of the steps so far that rollbacks threw away."""
    found = []
    for event in said["events"]:
        for name, back_to in event["reasons"]:
            if name.startswith("ROLLED_BACK") and event["step"] and back_to >= 0:
                found.append((event["step"] - back_to) / event["step"])
    return found
