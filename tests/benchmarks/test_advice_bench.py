"""AdviceBench's configurations, its notions of leaving and of the right cause, and its figures."""

import math

import pytest
import torch

from benchmarks.advice.configurations import BASES, BY_BETA, CAUSES, HEALTHY, Configuration, configurations
from benchmarks.advice.families import FAMILIES, evaluate, make_module
from benchmarks.advice.score import BASE, GUARD, figures
from benchmarks.advice.study import advised, leaving_step
from benchmarks.advice.training import Setting
from benchmarks.common.schedules import SCHEDULES, peak_step


def _advice(cause, step=0, alpha=None, beta=None, clip=None):
    return {"step": step, "cause": cause, "alpha": alpha, "beta": beta, "gradient_clip_val": clip}


def test_there_are_enough_configurations_and_their_causes_are_known():
    found = configurations()
    broken = [each for each in found if each.cause != HEALTHY]
    assert len(broken) >= 60 and len(found) - len(broken) >= 20
    assert len({each.name for each in found}) == len(found)
    assert {each.cause for each in broken} == set(CAUSES)
    assert {each.setting.family for each in found} == set(FAMILIES)
    assert {each.schedule for each in found} == set(SCHEDULES)


def test_one_thing_is_broken():
    for config in configurations():
        changed = (config.alpha_factor != 1, config.beta_factor != 1, config.outlier is not None)
        expected = {
            "alpha": (True, False, False),
            "both": (True, True, False),
            "batch": (False, False, True),
            HEALTHY: (False, config.beta_factor == 1.5, False),
        }
        assert changed == expected.get(config.cause, (False, True, False)), config.name
        assert bool(config.schedule) == (config.cause == "schedule") or config.cause == HEALTHY


@pytest.mark.parametrize(
    ("losses", "left"),
    [
        ([1.0] * 10, None),
        ([1, 1, 9, 1, 1, 1, 1], None),  # one bad batch
        ([1, 1, 4, 1, 5, 6, 7], 2),
        ([1, 1, 2, 2, math.nan], 4),  # the run ended there
        ([9, 9, 9, 1, 1, 1], 0),
    ],
)
def test_when_a_loss_leaves_its_start(losses, left):
    assert leaving_step(losses, 1.0) == left


def test_an_outlier_batch_does_not_leave_by_itself():
    assert leaving_step([1, 1, 900, 5, 6, 7, 8, 9], 1.0, outlier=2) == 3


@pytest.mark.parametrize("cause", CAUSES)
def test_which_cause_is_right(cause):
    config = Configuration("relu sgd", cause)
    assert config.is_right(_advice(cause)) and not config.is_right(None) and not config.is_right(_advice("unknown"))
    assert config.is_right(_advice("beta", beta=0.1)) == (cause == "beta" or cause in BY_BETA)
    assert config.is_right(_advice("beta", alpha=0.1, beta=0.1)) == (cause == "beta")


def test_an_advice_is_applied_to_the_letter():
    setting = BASES["relu sgd"]
    assert advised(setting, None) == setting == advised(setting, _advice("unknown"))
    new = advised(setting, _advice("both", alpha=0.1, beta=0.2, clip=3.0))
    assert (new.alpha, new.beta, new.clip) == (0.1, 0.2, 3.0)


def test_where_schedules_peak():
    found = {name: peak_step(name, 100) for name in SCHEDULES}
    expected = {"": None, "cosine": 0, "restarts": 0, "warmup": 69, "warmup restarts": 39, "onecycle": 39}
    assert found == expected | {"warmup epochs": 70}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_module_trains_and_is_evaluated(name):
    module = make_module(name, Setting(name, "sgd", 0.01, 0.01), seed=0)
    size = {"sinusoid": (2, 3, 1), "sequence": (2, 3, 6, 1), "omniglot": (2, 3, 1, 28, 28)}[FAMILIES[name].data]
    x = torch.randn(size)
    y = torch.arange(3).expand(2, 3) if "conv" in name else torch.randn(2, 3, 1)
    before, after = evaluate(name, module, 0.01, 1, (x, y, x, y))
    assert 0 < after < before


def _study(cause, trains, advice, **found):
    return {
        "name": cause,
        "seed": 0,
        "cause": cause,
        "family": "relu",
        "optimizer": "sgd",
        "trains": trains,
        "advice": advice,
        "steps": 100,
        "left": 20,
        "best": 1.0,
        "second": 1.0,
        "base trains": True,
        **found,
    }


def test_figures_by_hand():
    served = {"right": True, "ahead": True, "second trains": True, "second learns": True}
    studies = [
        _study("alpha", False, _advice("alpha", step=4), **served),
        _study("alpha", False, None, **dict.fromkeys(served, False)),
        _study("beta", True, None),  # did not break: listed, not scored
        _study(HEALTHY, True, _advice("beta", beta=0.1), unchanged=True),
        _study(HEALTHY, True, None, unchanged=False),
    ]
    found = figures(studies)
    assert found["all"] == {
        "runs": 2,
        "right": 0.5,
        "ahead": 0.5,
        "lead": 16,
        "no advice": 1,
        GUARD: 0.5,
        "learns": 0.5,
        BASE: 1.0,
    }
    assert list(found["by cause"]) == ["alpha"] and len(found["not scored"]) == len(found["failures"]) == 1
    assert found["false advice per 1000 steps"] == 5 and found["changed by the guard"] == ["healthy (seed 0)"]
