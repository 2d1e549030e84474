"""What a guard remembers goes into a checkpoint and comes back; so does what an older one wrote."""

import copy
import io
import json
import math
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path

import pytest
import torch

from lightning_maml_guard import ConvergenceGuard
from lightning_maml_guard.guard.report import CheckReport
from lightning_maml_guard.guard.schedule import Rise, ScheduleState
from lightning_maml_guard.guard.state import VERSION, Event, GuardState, StateError, from_checkpoint, to_checkpoint
from lightning_maml_guard.guard.state_machine import Watch
from lightning_maml_guard.linalg.lanczos import Tridiagonal
from lightning_maml_guard.linalg.pyhessian import PowerIteration
from lightning_maml_guard.lookahead.ceiling import Ceiling
from lightning_maml_guard.lookahead.divergence import RunningStatistics
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.lookahead.loss_curve import LossCurve, LossPoint
from lightning_maml_guard.messages.advice import Advice, Cause
from lightning_maml_guard.messages.reasons import Kind, Reason, Remedy
from lightning_maml_guard.messages.sentences import cause as cause_of
from lightning_maml_guard.messages.spelling import IN_PYTHON
from lightning_maml_guard.pages.events import happened
from lightning_maml_guard.stability.estimators import Spectrum
from lightning_maml_guard.stability.hvp import NetworkFacts
from lightning_maml_guard.utils.lightning_compat import Callback
from tests.helpers import fit, guard_warns, is_free_of_hooks, linear_module, quadratic_batch

OLDER = Path(__file__).parents[1] / "resume" / "state_of_issue_2.json"
nan, inf = math.nan, math.inf


def assert_same(one, other, where="state"):
    """Equal in type and value, all the way down; NaN equals NaN."""
    assert type(one) is type(other), where
    if is_dataclass(one):
        for each in fields(one):
            assert_same(getattr(one, each.name), getattr(other, each.name), f"{where}.{each.name}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, theirs, f"{where}[{index}]")
    else:
        assert repr(one) == repr(other) if isinstance(one, float) else one == other, where


def through_a_file(state):
    file = io.BytesIO()
    torch.save(to_checkpoint(state), file)
    file.seek(0)
    return from_checkpoint(torch.load(file, weights_only=True))


BEHIND = Reason(Kind.NOT_JUDGED, rate="beta", detail="Adamax is not known.")
# Every field of a Reason has a value of its own here.
EVERYTHING = Reason(
    Kind.ABOVE_LIMIT,
    rate="alpha",
    value=0.4,
    limit=0.25,
    interval=(0.2, inf),
    margin=0.9,
    growth=3.5,
    effect="inner loop",
    order="exact",
    remedy=Remedy.LOWER_ALPHA,
    step=7,
    alpha=0.1,
    beta=0.2,
    losses=(1.0, inf, nan),
    steps=10,
    counts=(2, 10),
    what="meta-update",
    error="OSError",
    detail="disk full",
    where="a.py, line 3, in f",
    because=replace(BEHIND, because=Reason(Kind.NO_CURVATURE)),
)
# And every field of an Advice.
ADVICE = Advice(
    cause=Cause.DEAD_UNITS,
    setting="max_lr",
    alpha=0.02,
    beta=0.3,
    gradient_clip_val=1.5,
    step=4,
    evidence=(EVERYTHING, BEHIND),
    configured_alpha=0.05,
    configured_beta=1.5,
    peak_step=60,
    several=True,
)
LANCZOS = Spectrum(
    runs=(Tridiagonal((2.0, 3.5), (0.5, 1e-9)), Tridiagonal((1.0,), (0.0,))),
    rounding=1e-7,
    matvecs=3,
    resolution=1e-3,
    size=40,
)
REPORT = CheckReport(
    alpha=0.05, alpha_c=0.25, beta=1.5, beta_c=0.625, sgd_beta_c=0.6, exact_beta_c=0.7, lambda_max=4.0, lambda_min=-0.5,
    status="edge", findings=(EVERYTHING, BEHIND), alpha_status="safe", beta_status="unsafe", safe_alpha=0.04,
    safe_beta=0.5, safe_beta_c=0.61, lambda_max_interval=(3.9, 4.1), alpha_c_interval=(0.24, 0.26),
    beta_c_interval=(0.6, inf), spectrum=LANCZOS, inner_steps=2, hvps=12, seconds=0.01, exact_beta_c_interval=(0.6, 0.8),
    beta_c_noise=0.3, mean_alpha_c=0.3, predicted_change=-0.1, criterion="exact", notes=(BEHIND,), step=4, cost=30.5,
    alpha_applied=0.045, beta_applied=0.5, severity=-inf, growth=0.9, adaptation_gain=0.4, advice=ADVICE,
)  # fmt: skip
POWER = replace(
    REPORT,
    spectrum=Spectrum(power=PowerIteration(4.0, -0.5, 1e-3, 17), matvecs=17),
    findings=(),
    alpha=nan,
    beta_c=inf,
    severity=nan,
    step=None,
)
BY_USER = replace(REPORT, spectrum=Spectrum(values=(0.5, 4.0), matvecs=2))


SNAPSHOT = {
    "step": 2,
    "progress": 1,
    "alpha": 0.25,
    "tensors": [torch.ones(2, 2), torch.zeros(0)],
    "states": [[{"step": torch.tensor(3.0), "betas": (0.9, 0.999), "flag": None}, {}]],
}


def full():
    return GuardState(
        history=[REPORT, POWER, BY_USER],
        severities=[(0, 2.5), (3, inf), (4, nan)],
        events=[
            Event(
                3, "rolled back", (Reason(Kind.ROLLED_BACK, step=3, steps=2, losses=(nan, nan, nan), counts=(1, 10)),)
            ),
            Event(None, "notice", (EVERYTHING, BEHIND)),
        ],
        losses=LossCurve([LossPoint(0, 1.25, 1.0, inf, 1), LossPoint(2, nan, inf, inf, 0)], 2, [(0, 2.0, 1.0)], 4),
        announced={BEHIND.key, "another"},
        schedule=ScheduleState(
            last=4,
            spiked=True,
            diverged=True,
            gap=8,
            unjudged=True,
            spent=40.5,
            paid=10.5,
            latest=20.25,
            full=15.5,
            lost=True,
            alarms=2,
            outer=Rise(0.1, 0.2),
            inner=Rise(0.3, 0.4),
            slipped=True,
            ease_at=7,
            ease_gap=24,
            lowest=0.75,
            lowest_at=3,
            moved_at=2,
            raised_from=0.05,
            waits=1,
        ),
        statistics=RunningStatistics(
            first=(1.0, 1.5),
            loss=1.25,
            norm=0.5,
            last=1.5,
            lowest=-0.5,
            spread=0.25,
            looked=1.0,
            steps=2,
            before=1.5,
            stalled=True,
            best=1.0,
            since=3,
            chance=1.6,
            recent=(1.5, inf),
        ),
        watches={"run": Watch("unsafe", 2), "alpha": Watch("edge", 1)},
        sharpest=4.5,
        caps=Caps(0.045, 0.5),
        capped=[0, 2],
        rollbacks=1,
        stopped_step=9,
        stopping=[EVERYTHING],
        facts=NetworkFacts(
            checked={"Hessian", "meta-update"},
            finite={"Hessian": Reason(Kind.WRONG_DOUBLE_BACKWARD, what="Hessian", value=0.25)},
            looped=True,
        ),
        batches=[[[torch.arange(3), torch.ones(2, dtype=torch.float64), 7, "name", None], 4]],
        spike=[30, 708.0, [[[torch.ones(2)], 30]]],
        snapshots=[SNAPSHOT],
        wasted=5,
        ceiling=Ceiling(0.1, 0.4, 40, 64),
        advice=ADVICE,
        advised=[Kind.ADAPTATION_HARMFUL.value],
        searches=2,
    )


def test_the_full_state_is_full():
    """So that a field that is added is thought of here."""
    state = full()
    for value in (
        state,
        state.schedule,
        state.statistics,
        state.losses,
        state.caps,
        state.facts,
        EVERYTHING,
        REPORT,
        ADVICE,
    ):
        for each in fields(value):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            assert each.name in {"version", "kind"} or getattr(value, each.name) != default, each.name
    used = {each.name for report in state.history for each in fields(Spectrum) if getattr(report.spectrum, each.name)}
    assert used == {each.name for each in fields(Spectrum)}


def test_everything_comes_back_equal_from_a_file():
    assert_same(full(), through_a_file(full()))
    assert_same(GuardState(), through_a_file(GuardState()))


def test_a_checkpoint_holds_plain_values_and_the_version():
    def check(value):
        assert type(value) in {dict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
        assert not isinstance(value, Enum)
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            check(each)

    plain = to_checkpoint(full())
    check(plain)
    assert plain["version"] == VERSION and list(plain) == [each.name for each in fields(GuardState)]
    plain = {key: value for key, value in plain.items() if key not in {"batches", "spike", "snapshots"}}
    back = from_checkpoint(json.loads(json.dumps(plain)))
    assert_same(back, replace(full(), batches=[], spike=[], snapshots=[]))


def test_every_kind_and_remedy_comes_back():
    for kind in Kind:
        for remedy in Remedy:
            reason = Reason(kind, remedy=remedy)
            (back,) = through_a_file(GuardState(stopping=[reason])).stopping
            assert back.kind is kind and back.remedy is remedy and back.key == reason.key


def test_the_snapshot_of_a_checkpoint_from_before_there_were_several_is_one_of_them():
    old = {key: value for key, value in SNAPSHOT.items() if key != "progress"}
    guard = ConvergenceGuard(action="rescale")
    guard.load_state_dict({"version": VERSION, "snapshot": old})
    assert guard._run.ring.latest.step == 2 and guard._run.ring.latest.progress == 2
    assert from_checkpoint({"version": VERSION, "snapshot": None}).snapshots == []


def test_a_guard_hands_its_state_on():
    first, second = (ConvergenceGuard(action="rescale", rollback=True) for _ in range(2))
    first.load_state_dict(to_checkpoint(full()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same(first.state_dict(), to_checkpoint(full()))
    assert_same(second.state_dict(), first.state_dict())
    assert second.stopping_reason == f"{ADVICE} {cause_of(EVERYTHING)}" and second.stopped_step == 9
    assert repr(second.advice) == repr(ADVICE) and str(second.advice).endswith(
        "Set the inner rate (inner_lr) to 0.02 and the schedule's max_lr to 0.3 (the largest of several; lower the others in "
        "proportion) and Trainer(gradient_clip_val=1.5), or fix "
        "the batch."
    )
    assert second._run.ring.latest.step == 2 and second._run.caps.caps == Caps(0.045, 0.5)
    assert second._run.machine.unsafe and second._run.schedule.state.last == 4


def test_what_is_not_known_is_left_out_and_what_is_missing_has_its_default():
    plain = to_checkpoint(full())
    newer = copy.deepcopy(plain)
    newer |= {"invented": {"a": 1}, "version": VERSION + 1}
    newer["history"][0]["invented"] = 3
    newer["history"][0]["spectrum"]["invented"] = [1.0]
    newer["history"][0]["findings"][0]["invented"] = "x"
    newer["schedule"]["invented"] = newer["facts"]["invented"] = newer["caps"]["invented"] = True
    assert_same(replace(from_checkpoint(newer), version=VERSION), full())
    bare = {"version": VERSION, "rollbacks": 2, "schedule": {"last": 5}}
    assert_same(from_checkpoint(bare), GuardState(rollbacks=2, schedule=ScheduleState(last=5)))


def flat():
    """A state as releases before the tree wrote it, with every key they had."""
    report = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(REPORT).items()
        if name not in {"findings", "notes", "spectrum", "adaptation_gain", "advice"}
    }
    spectrum = {
        "runs": [[[2.0, 3.5], [0.5, 1e-9]], [[1.0], [0.0]]],
        "power": None,
        "values": [],
        "rounding": 1e-7,
        "matvecs": 3,
        "resolution": 1e-3,
    }
    report |= {"reasons": ["beta = 1.5 exceeds beta_c."], "notices": ["Adamax is not known."], "spectrum": spectrum}
    power = {
        "runs": [],
        "power": [4.0, -0.5, 1e-3, 17],
        "values": [],
        "rounding": 0.0,
        "matvecs": 17,
        "resolution": 0.0,
    }
    return {
        "history": [report, report | {"spectrum": power}],
        "severities": [[0, 2.5], [3, inf]],
        "stopped_step": 9,
        "stopping_reason": "beta = 1.5 exceeds beta_c.",
        "last_step": 4,
        "range": {"first": [1.0, 1.5], "loss": 1.25, "norm": 0.5},
        "triggered": [True, True, 8],
        "unjudged": True,
        "spent": [40.5, 20.25],
        "watches": {"run": ["unsafe", 2], "alpha": ["edge", 1]},
        "said": ["ConvergenceGuard: step #: Adamax is not known."],
        "sharpest": 4.5,
        "events": [
            [3, "rolled back", "ConvergenceGuard: the loss was 9 at step 3."],
            [4, "notice", "ConvergenceGuard: step 4: Adamax is not known."],
            [-1, "notice", "ConvergenceGuard could not copy parameters."],
        ],
        "alpha_cap": 0.045,
        "beta_cap": 0.5,
        "governed": [0, 2],
        "rollbacks": 1,
        "checked": ["Hessian", "meta-update"],
        "finite": {"Hessian": "Hessian: no second derivative."},
        "looped": True,
        "batches": full().batches,
        "snapshot": SNAPSHOT,
    }


def text(words):
    return Reason(Kind.TEXT, detail=words)


def test_a_flat_state_of_before_the_tree_loads_into_the_same_values():
    words, notes = (text("beta = 1.5 exceeds beta_c."),), (text("Adamax is not known."),)
    # An older version knew no size, and gave no advice.
    newer = {"advice": None, "adaptation_gain": nan}
    report = replace(REPORT, findings=words, notes=notes, spectrum=replace(LANCZOS, size=None), **newer)
    expected = replace(
        full(),
        history=[report, replace(report, spectrum=POWER.spectrum)],
        severities=[(0, 2.5), (3, inf)],
        losses=LossCurve(),
        spike=[],
        schedule=replace(
            full().schedule,
            paid=0.0,
            full=0.0,
            lost=False,
            alarms=0,
            outer=Rise(),
            inner=Rise(),
            slipped=False,
            ease_at=0,
            ease_gap=8,
            lowest=inf,
            lowest_at=0,
            moved_at=0,
            raised_from=nan,
            waits=0,
        ),
        wasted=0,
        ceiling=Ceiling(),
        advice=None,
        advised=[],
        searches=0,
        statistics=RunningStatistics(first=(1.0, 1.5), loss=1.25, norm=0.5),
        stopping=[*words],
        announced={"ConvergenceGuard: step #: Adamax is not known."},
        events=[
            Event(3, "rolled back", (text("the loss was 9 at step 3."),)),
            Event(4, "notice", notes),
            Event(None, "notice", (text("could not copy parameters."),)),
        ],
        facts=NetworkFacts(
            {"Hessian", "meta-update"}, {"Hessian": text("Hessian: no second derivative.")}, looped=True
        ),
    )
    assert_same(from_checkpoint(flat()), expected)
    assert_same(through_a_file(from_checkpoint(flat())), expected)
    assert from_checkpoint(flat()).history[0].reasons == ("beta = 1.5 exceeds beta_c.",)
    guard = ConvergenceGuard(action="rescale", rollback=True)
    guard.load_state_dict(flat())
    assert guard.stopping_reason == "beta = 1.5 exceeds beta_c." and guard._run.ring.latest.step == 2
    told = happened([], guard.events, IN_PYTHON)
    assert [(row.step, row.why) for row in told][:2] == [(3, "The loss was 9 at step 3."), (4, "Adamax is not known.")]


@pytest.mark.parametrize("left_out", list(flat()))
def test_a_flat_state_without_a_key_has_the_default_there(left_out):
    state = flat()
    del state[left_out]
    assert_same(from_checkpoint(state | {"invented": 1}), from_checkpoint(state))
    assert from_checkpoint(state).sharpest == (0.0 if left_out == "sharpest" else 4.5)


def test_the_state_of_issue_2_loads_into_the_same_values():
    state = json.loads(OLDER.read_text())
    loaded = from_checkpoint(state)
    assert len(loaded.history) == len(state["history"]) == 2
    for report, plain in zip(loaded.history, state["history"], strict=True):
        assert report.reasons == tuple(plain["reasons"]) and report.notices == tuple(plain["notices"])
        for name, value in plain.items():
            if name not in {"reasons", "notices", "spectrum"}:
                assert_same(getattr(report, name), tuple(value) if isinstance(value, list) else value, name)
        assert [[list(part) for part in run] for run in report.spectrum.runs] == plain["spectrum"]["runs"]
        assert report.spectrum.matvecs == plain["spectrum"]["matvecs"]
    assert loaded.caps == Caps(state["alpha_cap"], state["beta_cap"]) and loaded.capped == state["governed"] == [0]
    assert loaded.schedule == ScheduleState(last=state["last_step"])
    assert loaded.stopped_step is None and loaded.stopping == [] and loaded.announced == set()
    empty = from_checkpoint({})
    assert_same(empty, GuardState())


def without(name, report):
    return {key: value for key, value in report.items() if key != name}


WRONG = {
    "no dict": lambda p: [1, 2],
    "a cap below zero": lambda p: p | {"caps": {"alpha": None, "beta": -5}},
    "a flat cap below zero": lambda p: flat() | {"beta_cap": -5},
    "a cap of nan": lambda p: p | {"caps": {"beta": nan}},
    "a text for a number": lambda p: p | {"sharpest": "high"},
    "a flag for a number": lambda p: p | {"rollbacks": True},
    "a number for a list": lambda p: p | {"history": 3},
    "a flat number for a list": lambda p: flat() | {"history": 3},
    "a report without a field": lambda p: p | {"history": [without("alpha_c", p["history"][0])]},
    "a flat report without a field": lambda p: flat() | {"history": [without("beta", flat()["history"][0])]},
    "an unknown state": lambda p: p | {"watches": {"run": {"state": "odd", "failed": 0}}},
    "an unknown kind": lambda p: p | {"stopping": [{"kind": "odd"}]},
    "a gap of 0": lambda p: p | {"schedule": {"gap": 0}},
    "a step below zero": lambda p: p | {"schedule": {"last": -1}},
    "an optimizer below zero": lambda p: p | {"capped": [-1]},
    "a spike without its loss": lambda p: p | {"spike": [3, [[[torch.ones(2)], 3]]]},
    "a spike without a batch's number": lambda p: p | {"spike": [3, 9.0, [[torch.ones(2)]]]},
    "batches without numbers": lambda p: p | {"batches": [[torch.ones(2)]]},
    "half a snapshot": lambda p: p | {"snapshot": {"step": 3}},
    "a snapshot of numbers": lambda p: p | {"snapshot": {"step": 3, "tensors": [1.0], "states": []}},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_state_that_cannot_be_read_is_one_warning_and_the_guard_starts_anew(what):
    guard = ConvergenceGuard(action="rescale", rollback=True)
    with guard_warns("the guard's state in the checkpoint cannot be read, so it starts anew. Cause: [`i]") as caught:
        guard.load_state_dict(WRONG[what](to_checkpoint(full())))
    assert len(caught) == 1 and [event.kind for event in guard.events] == ["notice"]
    fresh = GuardState(events=guard.events, announced=guard._run.state.announced)
    assert_same(guard._run.saved(), fresh)


def test_the_cause_of_a_state_that_is_not_read_is_named():
    for plain, cause in (
        ({"version": 1, "caps": {"beta": -5}}, r"`caps\.beta` is out of its range \(-5\)"),
        ({"version": 1, "schedule": {"spent": [1]}}, r"`schedule\.spent` is of a wrong kind \(list\)"),
        ({"version": 1, "history": [{"alpha": 1.0}]}, r"`history\.alpha_c` is missing"),
        ({"watches": 3}, r"it is not laid out as release 0\.1 did \(AttributeError"),
    ):
        with pytest.raises(StateError, match=cause):
            from_checkpoint(plain)


def leaves(plain, path=()):
    yield path
    for key, each in plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ():
        yield from leaves(each, (*path, key))


def test_any_value_anywhere_loads_or_is_a_state_error():
    """And what loads can be saved and loaded again."""
    plain = to_checkpoint(replace(full(), history=[POWER], events=[], stopping=[BEHIND], snapshots=[]))
    tried = refused = 0
    for path in leaves(plain):
        for value in ("x", -5, None, 2.5, [], {}, [[1]]):
            changed = [copy.deepcopy(plain)]
            holder = changed
            for key in (0, *path[:-1]):
                holder = holder[key]
            if path:
                holder[path[-1]] = value
            else:
                changed[0] = value
            tried += 1
            try:
                state = from_checkpoint(changed[0])
            except StateError:
                refused += 1
                continue
            assert_same(from_checkpoint(to_checkpoint(state)), state)
    assert tried > 700 and 0.5 < refused / tried < 0.95


@pytest.mark.parametrize("action", ["log", "rescale"])
@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
def test_a_state_loaded_into_a_run_that_trains_leaves_its_caps_and_batches_in_force(action, applied):
    """As Lightning's LearningRateFinder does at a milestone."""
    batch = quadratic_batch([0.3, 1.0, 2.0, 4.0], target=1.0)

    class Reload(Callback):
        def __init__(self, at):
            self.at, self.held = at, []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == self.at:
                guard.load_state_dict(copy.deepcopy(guard.state_dict()))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.held.append([index for _, index in guard._run.replay.earlier()])

    ends = []
    for other in (Reload(None), Reload(5)):
        guard = ConvergenceGuard(every_n_steps=4, action=action, rollback=action == "rescale")
        module = linear_module(4, 1.5, inner_lr=0.05, order="simplified")
        reached = applied(module.network.weight)
        trainer = fit(module, batch, 10, [other, guard])
        assert is_free_of_hooks(trainer) and trainer.optimizers[0].param_groups[0]["lr"] == 1.5
        assert all(rate < 1.5 for rate in reached) == (action == "rescale")
        history = [replace(report, seconds=0.0) for report in guard.history]
        ends.append((reached, history, guard.severities, other.held))
    assert_same(ends[0], ends[1])
