"""What a guard knows of a run: one tree of dataclasses, and how it is written to a checkpoint and read from it."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from torch import Tensor

from lightning_maml_guard.guard.report import CheckReport
from lightning_maml_guard.guard.schedule import ScheduleState
from lightning_maml_guard.guard.state_machine import Watch
from lightning_maml_guard.lookahead.ceiling import Ceiling
from lightning_maml_guard.lookahead.divergence import RunningStatistics
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.lookahead.loss_curve import LossCurve
from lightning_maml_guard.messages.advice import Advice, Cause
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.stability.hvp import NetworkFacts
from lightning_maml_guard.theory.limits import EDGE, SAFE, UNRESOLVED, UNSAFE

VERSION = 1
_EVENTS = 1000  # kept at most

# A network has collapsed if its curvature is below this share of the largest so far, and its loss between these shares
# of the loss at the start.
_COLLAPSED, _BACK_AT_START = 0.15, (0.8, 1.5)


@dataclass(frozen=True)
class Event:
    """One event of a run: ``kind`` is ``"rolled back"``, ``"stopped"`` or ``"notice"``; the step may be unknown."""

    step: int | None
    kind: str
    reasons: tuple[Reason, ...]


@dataclass
class GuardState:
    """All that a guard remembers of a run.

    Attributes:
        history: The latest checks.
        severities: Steps and severities of the latest lookaheads, those between checks included.
        events: Rollbacks, stops and notices, the latest ones.
        losses: The losses of the steps.
        announced: Keys of the reasons that were announced, each once.
        schedule: When to check next.
        statistics: The running loss and gradient norm.
        watches: The states of the rates, by what is watched.
        sharpest: The largest ``lambda_max`` so far.
        caps: The caps on the rates.
        capped: Indices of the optimizers that are capped.
        rollbacks: Rollbacks so far.
        stopped_step: Step at which the guard stopped the run; None if it did not.
        stopping: Why it did.
        facts: What is known of the network.
        clipped_to: Length to which training_step was seen to clip a gradient by itself; ``nan`` where it was not.
        batches: The lookahead's batches, on the host.
        spike: Step, loss and batches of the highest spike since the run was at its best; empty without one.
        snapshots: The states to roll back to, the oldest first.
        wasted: Steps that rollbacks discarded.
        ceiling: Rates that failed, to which capped rates are not raised again at once.
        advice: The latest advice.
        advised: Kinds of findings that were advised on although the run survived the next steps, each once.
        searches: Searches for rates to set so far.
        version: Of this layout.
    """

    history: list[CheckReport] = field(default_factory=list)
    severities: list[tuple[int, float]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    losses: LossCurve = field(default_factory=LossCurve)
    announced: set[str] = field(default_factory=set)
    schedule: ScheduleState = field(default_factory=ScheduleState)
    statistics: RunningStatistics = field(default_factory=RunningStatistics)
    watches: dict[str, Watch] = field(default_factory=dict)
    sharpest: float = 0.0
    caps: Caps = field(default_factory=Caps)
    capped: list[int] = field(default_factory=list)
    rollbacks: int = 0
    stopped_step: int | None = None
    stopping: list[Reason] = field(default_factory=list)
    facts: NetworkFacts = field(default_factory=NetworkFacts)
    clipped_to: float = math.nan
    batches: list[Any] = field(default_factory=list)
    spike: list[Any] = field(default_factory=list)
    snapshots: list[Any] = field(default_factory=list)
    wasted: int = 0
    ceiling: Ceiling = field(default_factory=Ceiling)
    advice: Advice | None = None
    advised: list[str] = field(default_factory=list)
    searches: int = 0
    version: int = VERSION

    @property
    def blames_alpha(self) -> bool:
        """Whether the latest advice is to lower the inner rate alone."""
        return self.advice is not None and self.advice.cause is Cause.ALPHA

    def collapse_reason(self, lambda_max: float, step: int) -> Reason | None:
        """The reason that nearly all curvature is gone and the loss is back where it began, if so and not yet said."""
        loss, scale = self.statistics.loss, self.statistics.scale
        self.sharpest = max(self.sharpest, lambda_max)
        low, high = (scale.times(share, scale.start) for share in _BACK_AT_START)
        if not (lambda_max < _COLLAPSED * self.sharpest and low < loss <= high):
            return None
        losses = (math.nan, loss, scale.start)
        reason = Reason(Kind.NETWORK_COLLAPSED, value=lambda_max, limit=self.sharpest, losses=losses, step=step)
        return None if reason.key in self.announced else reason

    def add_event(self, kind: str, *reasons: Reason, step: int | None) -> None:
        """Keep an event, for the run's report."""
        self.events = [*self.events, Event(step, kind, reasons)][-_EVENTS:]


def to_checkpoint(state: GuardState) -> dict[str, Any]:
    """Convert a state to primitives and tensors, so that a checkpoint loads with ``weights_only``."""
    # Plain already, tuples of optimizers' included.
    own = {"batches": state.batches, "spike": state.spike, "snapshots": state.snapshots}
    return {each.name: own.get(each.name, _to_plain(getattr(state, each.name))) for each in fields(state)}


class StateError(ValueError):
    """A checkpoint holds something else than a guard's state."""


def from_checkpoint(plain: Any) -> GuardState:
    """Restore a state; entries that are not known here are left out, those that are missing keep their defaults.

    Raises a StateError if an entry has a wrong type or is out of its range.
    """
    if not isinstance(plain, dict):
        raise StateError(f"it is a {type(plain).__name__} and no dict")
    if "version" not in plain:
        try:
            plain = _from_release_0_1(plain)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"it is not laid out as release 0.1 did ({type(error).__name__}: {error})") from error
    if plain.get("snapshot") is not None:  # written before there were several
        plain = plain | {"snapshots": [plain["snapshot"]]}
    state: GuardState = _from_plain(GuardState, plain, "")
    _check_ranges(state)
    return state


def _check_ranges(state: GuardState) -> None:
    schedule, caps = state.schedule, state.caps
    numbers = {"caps.alpha": caps.alpha, "caps.beta": caps.beta, "ceiling.wait": state.ceiling.wait - 1}
    numbers |= {"rollbacks": state.rollbacks, "stopped_step": state.stopped_step, "schedule.last": schedule.last}
    numbers |= {f"schedule.{name}": getattr(schedule, name) for name in ("spent", "latest", "alarms")}
    numbers |= {f"watches.{name}.failed": watch.failed for name, watch in state.watches.items()}
    numbers |= {"capped": min(state.capped, default=0), "searches": state.searches, "wasted": state.wasted}
    numbers |= {"sharpest": state.sharpest, "losses.end": state.losses.end, "losses.stride": state.losses.stride - 1}
    numbers |= {f"schedule.{name}": getattr(schedule, name) - 1 for name in ("gap", "ease_gap")}
    for name, value in numbers.items():
        if value is not None and not value >= 0:
            raise StateError(f"`{name}` is out of its range ({value})")
    for name, watch in state.watches.items():
        if watch.state not in (SAFE, EDGE, UNSAFE, UNRESOLVED):
            raise StateError(f"`watches.{name}.state` is {watch.state!r}")
    kinds, spiked = [type(each) for each in state.spike[:2]], state.spike[2] if len(state.spike) == 3 else None
    _expect(not state.spike or (kinds == [int, float] and isinstance(spiked, (list, tuple))), "spike", state.spike)
    for batch in (*state.batches, *(spiked or ())):
        pair = isinstance(batch, (list, tuple)) and len(batch) == 2
        _expect(pair and isinstance(batch[0], (list, tuple)) and type(batch[1]) is int, "batches", batch)
    for snapshot in state.snapshots:
        _expect(isinstance(snapshot, dict), "snapshots", snapshot)
        _check_snapshot(snapshot)


def _check_snapshot(snapshot: dict[str, Any]) -> None:
    step, tensors, states = (snapshot.get(name) for name in ("step", "tensors", "states"))
    _expect(type(step) is int, "snapshot.step", step)
    _expect(
        isinstance(tensors, list) and all(isinstance(each, Tensor) for each in tensors), "snapshot.tensors", tensors
    )
    held = isinstance(states, list) and all(isinstance(each, list) for each in states)
    _expect(held and all(isinstance(one, dict) for each in states or () for one in each), "snapshot.states", states)


def _to_plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _to_plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {key: _to_plain(each) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_to_plain(each) for each in value]
    return value


def _expect(right: bool, where: str, value: Any) -> None:
    if not right:
        raise StateError(f"`{where}` is of a wrong kind ({type(value).__name__})")


def _from_plain(kind: Any, value: Any, where: str) -> Any:
    """Make a value of a type from what :func:`_to_plain` made of it; ``where`` it stands, for errors."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _from_plain(next(each for each in arguments if each is not type(None)), value, where)
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass_from_plain(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        _expect(value in [each.value for each in kind], where, value)
        return kind(value)
    named = isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")
    if named or origin in (list, set, tuple):
        _expect(isinstance(value, (list, tuple, set)), where, value)
    if origin in (list, set):
        return origin(_from_plain(arguments[0], each, where) for each in value)
    if origin is tuple and arguments[-1] is ...:
        return tuple(_from_plain(arguments[0], each, where) for each in value)
    if named or origin is tuple:
        hints = list(_hints(kind).values()) if named else arguments
        _expect(len(hints) == len(value), where, value)
        parts = [_from_plain(hint, each, where) for hint, each in zip(hints, value, strict=True)]
        return kind(*parts) if named else tuple(parts)
    if origin is dict:
        _expect(isinstance(value, dict) and all(isinstance(key, str) for key in value), where, value)
        return {key: _from_plain(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if kind in (str, bool):
        _expect(isinstance(value, kind), where, value)
    if kind in (int, float):
        _expect(isinstance(value, (int, kind)) and not isinstance(value, bool), where, value)
    return value


def _dataclass_from_plain(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), where, value)
    hints, inside = _hints(kind), f"{where}." if where else ""
    given = {name: _from_plain(hints[name], each, inside + name) for name, each in value.items() if name in hints}
    for each in fields(kind):
        if each.name not in given and each.default is MISSING and each.default_factory is MISSING:
            raise StateError(f"`{inside}{each.name}` is missing")
    return kind(**given)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _from_release_0_1(old: dict[str, Any]) -> dict[str, Any]:
    """Convert the flat state of release 0.1 and earlier."""
    given = {name: old[name] for name in _SAME_KEYS if name in old}
    spiked, diverged, gap = old.get("triggered", (False, False, 2))
    spent, latest = old.get("spent", (0.0, 0.0))
    schedule = {"last": old.get("last_step"), "spiked": spiked, "diverged": diverged, "gap": gap}
    schedule |= {"unjudged": bool(old.get("unjudged")), "spent": spent, "latest": latest}
    watches = {name: {"state": state, "failed": failed} for name, (state, failed) in old.get("watches", {}).items()}
    stopping = old.get("stopping_reason")
    return given | {
        "history": [_report_of_0_1(report) for report in old.get("history", [])],
        "events": [_event_of_0_1(*event) for event in old.get("events", [])],
        "announced": old.get("said", []),
        "schedule": schedule,
        "statistics": old.get("range", {}),
        "watches": watches,
        "caps": {"alpha": old.get("alpha_cap"), "beta": old.get("beta_cap")},
        "capped": old.get("governed", []),
        "stopping": [] if stopping is None else [_text(stopping)],
        "facts": {
            "checked": old.get("checked", []),
            "finite": {name: _text(text) for name, text in old.get("finite", {}).items()},
            "looped": bool(old.get("looped")),
        },
    }


_SAME_KEYS = ("severities", "sharpest", "rollbacks", "stopped_step", "batches", "snapshot")


def _report_of_0_1(report: dict[str, Any]) -> dict[str, Any]:
    words = {"findings": report.get("reasons", []), "notes": report.get("notices", [])}
    reasons = {name: [_text(text) for text in texts] for name, texts in words.items()}
    applied = {f"{name}_applied": report.get(f"{name}_applied", report[name]) for name in ("alpha", "beta")}
    return report | reasons | applied


def _event_of_0_1(step: int, kind: str, text: str) -> dict[str, Any]:
    # Without the guard's name and the step, which the report of a run has beside the text.
    text = text.removeprefix("ConvergenceGuard").removeprefix(":").removeprefix(" ").removeprefix(f"step {step}: ")
    return {"step": None if step == -1 else step, "kind": kind, "reasons": [_text(text)]}


def _text(text: str) -> dict[str, Any]:
    return {"kind": Kind.TEXT.value, "detail": text}
