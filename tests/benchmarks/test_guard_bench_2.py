"""GuardBench 2's fates, deaths, words and scores, on sequences made by hand."""

import math

import pytest
import torch

from benchmarks.common.detectors import time_matched
from benchmarks.guard_bench_2.families import FAMILIES, HELD_OUT, State, batch, constant_loss, evaluate, make_module
from benchmarks.guard_bench_2.fates import COLLAPSED, DIVERGED, LEARNING, STALLED, death, fate, had_excursion, onset
from benchmarks.guard_bench_2.peers import ALERTS
from benchmarks.guard_bench_2.scenarios import FACTORS, REFERENCES, SCENARIOS
from benchmarks.guard_bench_2.score import GUARD, detection, figures
from benchmarks.guard_bench_2.study import RESCALE, WARN, columns
from benchmarks.guard_bench_2.training import Setting
from benchmarks.guard_bench_2.words import Word, is_true, thrown_away, words

LEARNS = [1.0, 0.9, 0.7, 0.5, 0.4, 0.3, 0.25, 0.22, 0.2, 0.2]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (LEARNS, LEARNING),
        ([1.0] * 10, STALLED),
        ([1.0] * 7 + [1.5] * 3, STALLED),  # worse than its start, but not as far as the best is below it
        ([1.0] * 7 + [1.9] * 3, DIVERGED),
        ([*LEARNS[:7], math.nan, math.nan, math.nan], DIVERGED),
        ([*LEARNS[:7], 0.7, 0.7, 0.7], COLLAPSED),  # .94 of the way, then .375
        ([*LEARNS[:7], 0.6, 0.6, 0.6], LEARNING),  # .94, then .5
        ([1.0, 0.3, *[0.95] * 8], STALLED),  # one lucky loss is nothing learned
        ([1.0] * 6 + [0.9] * 4, STALLED),
        ([1.0, math.inf, math.inf, *LEARNS], LEARNING),
    ],
)
def test_fates(losses, expected):
    assert fate(losses, 1.0, 0.2) == expected


@pytest.mark.parametrize(
    ("after", "died", "excursion"),
    [
        ([0.2] * 20, None, False),
        ([0.9] * 20, 20, True),
        ([0.2] * 5 + [9.0] * 15, 25, True),
        ([9.0] * 5 + [0.2] * 15, None, True),  # it came back
        ([9.0] + [0.2] * 19, None, False),  # one odd step
        ([9.0] * 8 + [0.2] + [9.0] * 11, 20, True),  # it came back for one step
    ],
)
def test_when_a_run_dies(after, died, excursion):
    losses = [1.0] * 10 + [0.2] * 10 + after
    assert death(losses, 1.0, 0.2) == died and had_excursion(losses, 1.0, 0.2) == excursion


def test_a_run_that_never_learned_dies_where_it_diverges():
    assert death([1.0, 1.2, 1.5, 1.9, 2.5, math.nan], 1.0, 0.2) == 3
    assert onset(LEARNS, 1.0, 0.2) == 3 and onset([1.0] * 5, 1.0, 0.2) == 5


def test_scores_are_compared_at_the_same_time():
    rising = [(step, float(step)) for step in range(100)]
    # A score that only rises with time tells nothing, however late the death.
    assert time_matched([(rising, 90), (rising, 20)], [(rising, 100)], 1) == 0.5
    alarmed = [(step, 200.0 if step >= 85 else float(step)) for step in range(100)]
    assert time_matched([(alarmed, 90)], [(rising, 100)], 5) == 1.0
    assert time_matched([(alarmed, 90)], [(rising, 100)], 10) == 0.5
    assert time_matched([(alarmed, 90)], [(rising, 50)], 5) is None and time_matched([], [(rising, 50)], 5) is None
    assert time_matched([([], 90)], [(rising, 100)], 1) == 0.0  # no check at all


def _run(name, outcome, death_at, severities, cause="beta", acted=(LEARNING, 0.2), checks=(), events=(), **more):
    silent = {"checks": list(checks), "events": list(events), "work": 30.0}
    known = 300 if death_at is None else death_at
    losses = [1.0] * known + [9.0] * (300 - known)
    return {
        "name": name,
        "family": "lstm",
        "scenario": "ramp",
        "cause": cause,
        "seed": 0,
        "steps": 300,
        "start": 1.0,
        "best": 0.2,
        "best constant": 0.25,
        "fate": outcome,
        "final": 0.2 if outcome == LEARNING else math.inf,
        "death": death_at,
        "due": known if outcome != LEARNING else 100,
        "excursion": False,
        "healthy": outcome == LEARNING,
        "not finite": None,
        "harmful": [],
        "losses": losses,
        "norms": losses,
        "peers": {ALERTS[0]: [[step, float(loss > 1)] for step, loss in enumerate(losses)]},
        "alerts": {each: [] for each in ALERTS} | {ALERTS[0]: [known] if known < 300 else []},
        WARN: silent | {"severities": severities, "logged": [], "final": 0.2},
        RESCALE: silent | {"fate": acted[0], "final": acted[1]},
    } | more


def _advice(step, cause, *evidence):
    return {"step": step, "cause": cause, "evidence": list(evidence)}


def _event(step, kind, back_to=0):
    return {"step": step, "kind": "notice", "reasons": [(kind, back_to)]}


def test_figures_by_hand():
    rolled = {"checks": [], "events": [_event(200, "ROLLED_BACK", 180)], "work": 0.0, "fate": LEARNING, "final": 0.28}
    runs = [
        _run("well", LEARNING, None, [(0, 0.1), (150, 0.2)], acted=(LEARNING, 0.22)),
        _run("alarmed", LEARNING, None, [(0, 2.0)], checks=[_advice(0, "beta"), _advice(299, "beta")]),
        _run("late", DIVERGED, 200, [(0, 0.1), (196, 3.0)], checks=[_advice(150, "beta")], **{RESCALE: rolled}),
        _run("lost", COLLAPSED, 250, [(0, 0.0)], acted=(LEARNING, 0.5), checks=[_advice(299, "beta")]),
        _run("batch", DIVERGED, 100, [(0, 9.0)], cause="batch", acted=(DIVERGED, math.inf)),
        _run("still", STALLED, None, [], acted=(STALLED, 1.0), events=[_event(200, "NETWORK_COLLAPSED")], due=190),
    ]
    found = figures(runs)
    assert list(found["fates"].values()) == [2, 1, 1, 2] and found["healthy"] == 2
    # Until three steps ahead "late" is above both healthy runs, and "lost" always below both.
    assert found["detection"][GUARD] == {1: 0.5, 3: 0.5, 5: 0.0, 10: 0.0, 30: 0.0}
    assert found["detection"]["loss-spike ratio"][1] == 0.5 and found["deaths"][30] == 2
    assert found["told"] == {DIVERGED: (1, 2), COLLAPSED: (0, 1), STALLED: (1, 1)}
    assert found["told by peers"][ALERTS[0]] == (3, 4)
    assert found["false alarms"] == {GUARD: (1, 540), ALERTS[0]: (0, 540)}
    died = {"runs": 3, "finite": 2 / 3, "learning": 2 / 3, "within 1.5x": 1 / 3, "within 1.1x": 0.0}
    died["within 1.5x of constant"] = 1 / 3
    assert found["rescue"][RESCALE]["died"] == died and found["rescue"][RESCALE]["stalled"]["learning"] == 0
    assert found["near"] == (1.0, 1.0, 1.0)
    assert found["harm"] == {
        "runs": 2,
        "median": pytest.approx(1.05),
        "p90": pytest.approx(1.1),
        "worst": pytest.approx(1.1),
        "lost": [],
        "changed by warnings": [],
    }
    assert found["thrown"] == {"rollbacks": 1, "median": pytest.approx(0.1), "to the start": 0}
    assert found["work"] == {300: 0.1}
    assert detection(runs[:2]) == {}


@pytest.mark.parametrize(
    ("word", "about", "expected"),
    [
        (Word(0, "schedule", ()), {}, True),  # what the scenario broke, however early
        (Word(0, "alpha", ()), {}, False),
        (Word(0, "alpha", ()), {"cause": "alpha"}, True),
        (Word(190, "unknown", ("LOOKAHEAD_DIVERGES",)), {}, True),
        (Word(100, "unknown", ("LOOKAHEAD_DIVERGES",)), {}, False),  # it died at 200: too early to be about that
        (Word(190, "dead units", ("UNITS_DIED",)), {}, False),  # an LSTM has no ReLUs
        (Word(190, "dead units", ("UNITS_DIED",)), {"family": "relu"}, True),
        (Word(190, None, ("ADAPTATION_HARMFUL",)), {}, False),
        (Word(190, None, ("ADAPTATION_HARMFUL",)), {"harmful": [190]}, True),
        (Word(201, None, ("LOSS_NOT_FINITE",)), {}, False),
        (Word(201, None, ("LOSS_NOT_FINITE",)), {"not finite": 201}, True),
    ],
)
def test_which_words_are_true(word, about, expected):
    assert is_true(word, _run("late", DIVERGED, 200, []) | about) == expected


def test_what_counts_as_a_word():
    said = {
        "checks": [_advice(5, None), _advice(7, "beta")],
        "events": [_event(6, "CHECK_FAILED"), _event(3, "STALLED")],
    }
    assert [each.step for each in words(said)] == [3, 7]
    assert thrown_away({"events": [_event(10, "ROLLED_BACK", 4), _event(10, "STALLED", 4)]}) == [0.6]


@pytest.mark.parametrize("name", [each for each in FAMILIES if FAMILIES[each].data not in {"omniglot", "characters"}])
def test_a_family_is_evaluated_at_several_states_at_once(name):
    family = FAMILIES[name]
    module = make_module(name, 0, alpha=family.alpha, beta=family.beta, schedule="", steps=10)
    net = module.net if hasattr(module, "net") else module.network
    params = {n: p.detach() for n, p in net.named_parameters()}
    given = batch(family, 0, "val", 0)
    states = [State(params, family.alpha, 1.0), State(params, 0.0, 1.0), State(params, family.alpha, 2.0)]
    (before, after), unadapted, drifted = evaluate(net, family, states, given)
    assert unadapted == pytest.approx((before, before)) and drifted[0] != pytest.approx(before)
    assert (after == before) == (name == "plain") and constant_loss(family, given) > 0
    assert evaluate(net, family, states[:1], given)[0] == pytest.approx((before, after))


def test_settings_do_what_their_scenario_says():
    ramp, rises = Setting("lstm", "ramp", 0), Setting("lstm", "inner rate rises", 0)
    drift, spoilt = Setting("lstm", "drift", 0), Setting("lstm", "bad batch", 0)
    assert [ramp.factor(0), ramp.alpha(299), ramp.gain(299)] == [1.0, 0.1, 1.0]
    assert ramp.factor(300) == pytest.approx(FAMILIES["lstm"].rate)
    assert rises.factor(299) == 1.0 and rises.alpha(300) == pytest.approx(0.1 * FAMILIES["lstm"].inner)
    assert drift.factor(299) == 1.0 and drift.gain(300) == pytest.approx(FAMILIES["lstm"].gain)
    assert Setting("lstm", "slow", 0).factor(0) == pytest.approx(1 / 3)
    plain = Setting("lstm", "steady", 0)
    assert torch.equal(spoilt.batch(149)[1], plain.batch(149)[1])
    assert torch.equal(spoilt.batch(150)[1][:2], 10 * plain.batch(150)[1][:2])
    assert torch.equal(spoilt.batch(150)[1][2:], plain.batch(150)[1][2:])


def test_the_held_out_family_is_in_the_report_set_alone():
    families = {name for name, *_ in columns((0, 1), quick=False, held_out=False)}
    assert HELD_OUT not in families and families | {HELD_OUT} == set(FAMILIES)
    assert HELD_OUT in {name for name, *_ in columns((0,), quick=True, held_out=True)}
    assert set(REFERENCES) <= set(SCENARIOS) | set(FACTORS)


def test_a_capped_module_trains_as_the_one_without_the_attribute_until_it_is_capped():
    plain, capped = (
        make_module("softplus", 0, alpha=0.03, beta=0.005, schedule="", steps=3, capped=each) for each in (False, True)
    )
    given = batch(FAMILIES["softplus"], 0, "train", 0)
    assert torch.equal(plain.training_step(given, 0), capped.training_step(given, 0))
    capped.inner_lr_cap = 0.01
    assert capped.alpha == 0.01 and not torch.equal(plain.training_step(given, 0), capped.training_step(given, 0))
