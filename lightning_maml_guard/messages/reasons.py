"""Reasons as data: what was found, with its numbers and its remedy. ``messages.sentences`` puts them into words."""

from __future__ import annotations

import math
import traceback
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import torch

from lightning_maml_guard.theory.multiplier import Interval
from lightning_maml_guard.utils.batch_copy import BatchCopyError
from lightning_maml_guard.utils.checks import encodable
from lightning_maml_guard.utils.distributed import SharedError

UNKNOWN_INTERVAL: Interval = (math.nan, math.nan)
# Effect of a failure that comes from a file of the user's.
IN_USERS_CODE = "in the user's code"


class Kind(str, Enum):
    """What a reason is about. The values stand in checkpoints."""

    # A rate beside its critical value.
    ABOVE_LIMIT = "above limit"
    TOO_CLOSE = "too close to limit"
    NOT_JUDGED = "not judged"
    # A measurement.
    NO_CURVATURE = "no curvature"
    NOT_MEASURED = "not measured"
    NAN_IN_DATA = "nan in data"
    NO_EXACT_LIMIT = "no exact limit"
    NO_DOUBLE_BACKWARD = "no double backward"
    WRONG_DOUBLE_BACKWARD = "wrong double backward"
    # A lookahead.
    LOOKAHEAD_DIVERGES = "lookahead diverges"
    LOSS_NOT_FINITE = "loss not finite"
    LOSS_DIVERGED = "loss diverged"
    RATES_TRIED = "rates tried"
    ADAPTATION_HARMFUL = "adaptation harmful"
    SCHEDULE_AHEAD = "schedule ahead"
    ODD_BATCH = "odd batch"
    UNITS_DIED = "units died"
    RATES_MOVED = "rates moved"
    NOT_LEARNING = "not learning"
    LEARNING_LOST = "learning lost"
    STALLED = "stalled"
    SCHEDULE_NOT_READ = "schedule not read"
    # What a guard has to say once.
    CHECK_FAILED = "check failed"
    NO_CURVATURE_MEASURED = "no curvature measured"
    TASK_FAILED = "task failed"
    BATCH_NOT_COPIED = "batch not copied"
    STATE_NOT_READ = "state not read"
    NO_LOOKAHEAD = "no lookahead"
    NO_GRADIENT_NORM = "no gradient norm"
    NO_SNAPSHOT = "no snapshot"
    NETWORK_COLLAPSED = "network collapsed"
    BAREBONES = "barebones"
    MAXIMIZES = "maximizes"
    NO_OPTIMIZER = "no optimizer"
    OWN_BATCHES = "own batches"
    # What a guard cannot see of training, and a problem that is not training's.
    PROBLEM_DIFFERS = "problem differs from training"
    CAP_IGNORED = "inner rate ignores its cap"
    NO_STEP_LOSS = "no loss per step"
    OWN_GRADIENTS = "own gradients"
    OPTIMIZERS_TAKE_TURNS = "optimizers take turns"
    CLIPPING_NOT_SEEN = "clipping not seen"
    CLIPPING_FAILED = "clipping failed"
    # What a guard did.
    ROLLED_BACK = "rolled back"
    ROLLED_BACK_AT_END = "rolled back at the end"
    TOO_MANY_ROLLBACKS = "too many rollbacks"
    # What a tuner has to say of its suggestion.
    NO_BETA_SUGGESTED = "no beta suggested"
    NO_RATE_TRAINS = "no rate trains"
    LITTLE_LEARNED = "little learned"
    # A sentence of an older version, read from a checkpoint.
    TEXT = "text"


# What tells nothing of a rate, and is left out where trials do.
INCONCLUSIVE = (Kind.NOT_JUDGED, Kind.TOO_CLOSE, Kind.NOT_MEASURED)


class Remedy(str, Enum):
    """What to do about it."""

    NONE = ""
    LOWER_ALPHA = "lower alpha"
    LOWER_ALPHA_FIRST = "lower alpha first"
    LOWER_BETA = "lower beta"
    LOWER_BETA_IF_STILL_ABOVE = "lower beta if it is above the limit at the lowered alpha too"
    LOWER_BETA_UNSPECIFIED = "lower beta, no limit known"
    MEASURE_SHARPER = "measure sharper"
    START_AGAIN = "start again"


@dataclass(frozen=True)
class Reason:
    """Why a check came out as it did, or what happened in a run. Fields that do not apply keep their defaults.

    Attributes:
        kind: What it is about.
        rate: ``"alpha"`` or ``"beta"``, where it is about one of them.
        value: The rate as configured.
        limit: Its critical value.
        interval: Where the critical value lies.
        margin: Fraction of the critical value that counts as the threshold.
        growth: Factor per step by which the error along the sharpest direction grows.
        effect: What a rate beyond its limit does: a key of ``messages.sentences``.
        order: Order of MAML whose own condition differs from the one judged; empty where they agree.
        remedy: What to do about it.
        step: Training step.
        alpha: Inner rate that was tried or is applied.
        beta: Outer rate that was tried or is applied.
        losses: Loss before, loss after, and the loss that training started from.
        steps: Number of steps a lookahead took; of rollbacks the step returned to, and ``value`` the steps thrown away.
        counts: How many of how many: rollbacks so far and at most, or units that are dead.
        what: What it is about in the code: an operator's name, or what could not be done.
        error: Type of an exception.
        detail: Text that came from elsewhere: an exception's, or an optimizer's.
        where: File, line and function an exception came from.
        because: The reason behind this one.
    """

    kind: Kind
    rate: str = ""
    value: float = math.nan
    limit: float = math.nan
    interval: Interval = UNKNOWN_INTERVAL
    margin: float = 1.0
    growth: float = math.nan
    effect: str = ""
    order: str = ""
    remedy: Remedy = Remedy.NONE
    step: int | None = None
    alpha: float = math.nan
    beta: float = math.nan
    losses: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    steps: int = 0
    counts: tuple[int, int] = (0, 0)
    what: str = ""
    error: str = ""
    detail: str = ""
    where: str = ""
    because: Reason | None = None

    @property
    def key(self) -> str:
        """What makes two reasons the same one at another step: numbers are left out."""
        # The text of an exception may hold numbers that change; where it was raised does not.
        return "|".join((self.kind.value, self.rate, self.what, self.error, self.where if self.error else self.detail))


Reasons = tuple[Reason, ...]


def of_error(kind: Kind, error: BaseException, *, what: str = "", step: int | None = None) -> Reason:
    """State a failure as a reason: its type, its text, and the place in the user's code that it came from."""
    detail, (where, users) = encodable(str(error)), _place(error)
    effect = IN_USERS_CODE if users else ""
    return Reason(kind, what=what, error=type(error).__name__, detail=detail, where=where, effect=effect, step=step)


def of_check(error: Exception, step: int) -> Reason:
    """State why a check failed, and what kind of failure it was."""
    if isinstance(error, BatchCopyError):
        return Reason(Kind.BATCH_NOT_COPIED, what=error.kind, error=type(error).__name__, detail=error.cause, step=step)
    reason = of_error(Kind.CHECK_FAILED, error, step=step)
    if isinstance(error, torch.OutOfMemoryError):
        return replace(reason, effect="out of memory")
    return replace(reason, effect="other rank", where="") if isinstance(error, SharedError) else reason


def _place(error: BaseException) -> tuple[str, bool]:
    """Name the innermost frame in a file of the user's, of what an error was raised from or its own; else its last.

    Returns whether it is the user's as well.
    """
    errors = [error]
    while errors[0].__cause__ is not None:
        errors.insert(0, errors[0].__cause__)
    for each in errors:
        for frame in reversed(traceback.extract_tb(each.__traceback__)):
            if _is_users(frame.filename):
                return _named(frame), True
    trace = traceback.extract_tb(error.__traceback__)
    return _named(trace[-1]) if trace else "", False


def _is_users(filename: str) -> bool:
    path = Path(filename)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    generated = filename.startswith("<")  # a dataclass's __init__, Python's own frozen modules
    return not installed and not generated and not set(_NOT_THE_USERS) & set(path.parents)


def _named(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"


# This package and Python's own library.
_NOT_THE_USERS = (Path(__file__).parents[1], Path(traceback.__file__).parent)
