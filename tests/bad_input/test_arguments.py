"""Counts, rates, flags and words of every public constructor and function."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    LadderOptions,
    LookaheadOptions,
    MetaLearningModule,
    MetaProblem,
    RateFinder,
    TaskDataModule,
    critical_rates,
    measure,
    phase_diagram,
)
from lightning_maml_guard.maml.inner_updates import Adam, Momentum, RMSprop
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.stability.problems import PlainProblem
from lightning_maml_guard.tasks.episodes import check_episode
from lightning_maml_guard.tasks.images import Omniglot
from lightning_maml_guard.tasks.regression import LinearRegression, Sinusoid
from lightning_maml_guard.utils.checks import shown
from tests.bad_input.helpers import not_counts, not_flags, not_rates, refused
from tests.helpers import grouped_measure

PROBLEM = MetaProblem(
    params={"w": torch.ones(2)},
    task_loss=lambda params, data: ((data[0] * params["w"]) ** 2).mean(),
    support=(torch.ones(3, 2),),
    query=(torch.ones(3, 2),),
)
NETWORK = mlp(hidden=(2,))


def problem(**arguments):
    return MetaProblem(**{**{n: getattr(PROBLEM, n) for n in ("params", "task_loss", "support", "query")}, **arguments})


def module(**arguments):
    return MetaLearningModule(NETWORK, **arguments)


def data(**arguments):
    return TaskDataModule(Sinusoid(), **arguments)


def rates(**arguments):
    return critical_rates([1.0], **{"alpha": 0.1, **arguments})


def measured(**arguments):
    return measure(PROBLEM, **grouped_measure(**arguments))


def sample(family):
    return lambda **arguments: family.sample(**{"n_tasks": 1, "generator": torch.Generator(), **arguments})


def episode(**arguments):
    return check_episode(**{"n_way": 2, "k_shot": 1, "queries": 1, "classes": 9, "images": 9, **arguments})


def grid(**arguments):
    return phase_diagram(**{"problem_family": PROBLEM, "alphas": [0.1], "betas": [0.1], "steps": 1, **arguments})


COUNTS = [
    *((ConvergenceGuard, name, 1) for name in ("patience", "max_rollbacks", "history_size")),
    (CurvatureOptions, "max_iter", 1),
    (LookaheadOptions, "batches", 1),
    (LookaheadOptions, "steps", 0),
    (module, "inner_steps", 1),
    (problem, "inner_steps", 1),
    (rates, "inner_steps", 1),
    *((data, name, 1) for name in ("meta_batch_size", "steps_per_epoch", "test_episodes")),
    *((data, name, 0) for name in ("val_episodes", "num_workers", "seed")),
    *((LinearRegression, name, 1) for name in ("features", "shots", "queries")),
    *((Sinusoid, name, 1) for name in ("shots", "queries")),
    *((Omniglot, name, 1) for name in ("n_way", "k_shot", "queries")),
    (Omniglot, "split_seed", 0),
    *((episode, name, 1) for name in ("n_way", "k_shot", "queries")),
    *((mlp, name, 1) for name in ("in_features", "out_features")),
    *((conv4, name, 1) for name in ("out_features", "channels", "filters", "image_size")),
    *((sample(family), "n_tasks", 1) for family in (Sinusoid(), LinearRegression(), Omniglot())),
]
OPTIONAL_COUNTS = [
    (ConvergenceGuard, "every_n_steps", 1),
    (CurvatureOptions, "max_tasks", 1),
    (module, "eval_inner_steps", 0),
    (module, "task_chunk_size", 1),
    (problem, "task_chunk_size", 1),
    (measured, "step", 0),
]
RATES = [(module, "inner_lr"), (problem, "inner_lr"), (rates, "alpha"), (LinearRegression, "noise")]
FLAGS = [
    *((ConvergenceGuard, name) for name in ("rollback", "figures", "allow_untested")),
    (LookaheadOptions, "triggers"),
    *((grid, name) for name in ("exact", "progress")),
    (module, "learn_inner_lr"),
    (data, "resample"),
    (LinearRegression, "same_query"),
    (Omniglot, "rotations"),
    (conv4, "strided"),
]
CHOICES = [
    (ConvergenceGuard, "action", "'log'", "wran", "warn"),
    (CurvatureOptions, "criterion", "'exact'", "exakt", "exact"),
    (CurvatureOptions, "tasks", "'worst'", "Worst", "worst"),
    (CurvatureOptions, "data", "'query'", "querry", "query"),
    (CurvatureOptions, "basis", "'bfloat16'", "bfloat", "bfloat16"),
    *((make, "order", "'simplified'", "frist", "first") for make in (module, problem, rates)),
    (mlp, "activation", "'tanh'", "Relu", "relu"),
    (LinearRegression, "dtype", "'float64'", "float", "float64"),
    *((sample(family), "split", "'val'", "vall", "val") for family in (Sinusoid(), LinearRegression(), Omniglot())),
]
FEW = settings(max_examples=12, deadline=None)


def named(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: f"{getattr(row[0], '__name__', row[0])}-{row[1]}")


@named(COUNTS)
@FEW
@given(draw=st.data())
def test_what_is_no_count_is_refused_by_name(row, draw):
    make, name, least = row
    value = draw.draw(not_counts(least))
    refused(
        lambda: make(**{name: value}), name, shown(value), f"an integer of at least {least}", "Pass a Python integer"
    )


@named(OPTIONAL_COUNTS)
@FEW
@given(draw=st.data())
def test_what_is_neither_none_nor_a_count_is_refused_by_name(row, draw):
    make, name, least = row
    value = draw.draw(not_counts(least).filter(lambda x: x is not None))
    refused(
        lambda: make(**{name: value}), name, shown(value), f"an integer of at least {least}", "Pass a Python integer"
    )


@named([row for row in COUNTS + OPTIONAL_COUNTS if "seed" not in row[1]])
def test_a_count_that_no_container_holds_is_refused_by_name(row):
    make, name, _ = row
    refused(lambda: make(**{name: 2**63}), name, str(2**63), f"an integer of at most {2**63 - 1}", "Choose a smaller")


def test_a_seed_may_be_any_integer():
    assert data(seed=2**70).seed == Omniglot(split_seed=2**70).split_seed == 2**70


@named([(module, "inner_lr"), (problem, "inner_lr"), (lambda **rate: module(learn_inner_lr=True, **rate), "inner_lr")])
def test_a_rate_that_the_parameters_type_does_not_hold_is_refused(row):
    make, name = row
    for value in (1e200, 3.5e38):
        refused(lambda value=value: make(**{name: value}), name, str(value), "torch.float32 holds, 3.4e+38", "Choose")
    make(**{name: 3.4e38})


@pytest.mark.parametrize("order", ["exact", "first", "simplified"])
@pytest.mark.parametrize("rate", [1e200, 1e308])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_rate_whose_square_overflows_is_unsafe(order, rate):
    wide = {"w": torch.ones(2, dtype=torch.float64)}
    batch = (torch.ones(3, 2, dtype=torch.float64),)
    found = {"params": wide, "support": batch, "query": batch, "inner_lr": rate, "inner_steps": 2, "order": order}
    report = measure(problem(**found), beta=0.1, curvature=CurvatureOptions(criterion="simplified"))
    assert report.status == "unsafe" and report.beta_c == 0
    assert report.alpha_c == pytest.approx(0.5 if order == "simplified" else 1.0)  # 1 / (steps * curvature 1)


@named(RATES)
@FEW
@given(value=not_rates())
def test_what_is_no_rate_is_refused_by_name(row, value):
    make, name = row
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    remedy = "Choose one in that range." if number else "Pass a plain number"
    refused(lambda: make(**{name: value}), name, shown(value), "a finite number of at least 0", remedy)


@FEW
@given(value=not_rates().filter(lambda x: x is not None))
def test_a_beta_that_is_no_rate_is_refused_by_name(value):
    refused(lambda: measured(beta=value), "beta", shown(value), "a finite number of at least 0", "")


@named(FLAGS)
@FEW
@given(value=not_flags())
def test_what_is_no_flag_is_refused_by_name(row, value):
    make, name = row
    assume(not (name == "rollback" and value is None))  # None: as the action does
    remedy = f"Pass the boolean itself: {name}=True or {name}=False."
    refused(lambda: make(**{name: value}), name, shown(value), "True or False", remedy)


@named(CHOICES)
def test_a_word_out_of_the_list_is_refused_and_the_near_one_named(row):
    make, name, allowed, wrong, near = row
    refused(lambda: make(**{name: wrong}), name, repr(wrong), allowed, f"Did you mean {near!r}?")
    for other in ("", None, 3, math.nan, [near], np.zeros(2)):
        refused(lambda other=other: make(**{name: other}), name, shown(other), allowed, "Pass one of these words.")


@pytest.mark.parametrize(
    ("make", "name", "allowed", "values"),
    [
        *(
            (make, "margin", "a number above 0 and at most 1", (0, -1, 1.5, math.nan, math.inf))
            for make in (ConvergenceGuard, measured)
        ),
        (CurvatureOptions, "tol", "a number between 0 and 1", (0, 1, -1.0, math.nan)),
        (LookaheadOptions, "divergence_ratio", "a finite number above 1", (1, 0.5, math.nan, math.inf)),
        (LinearRegression, "condition", "a finite number of at least 1", (0.5, -1, math.nan, math.inf)),
        *(
            (make, name, "a number of at least 0 and below 1", (-1, 1, math.nan, math.inf))
            for make, name in ((Momentum, "momentum"), (RMSprop, "alpha"), (RMSprop, "momentum"))
        ),
        (grid, "tol", "a finite number above 0", (0, -1, math.nan, math.inf)),
        (grid, "divergence", "a finite number above 0", (0, -1, math.nan, -math.inf)),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(make, name, allowed, values):
    for value in values:
        refused(lambda value=value: make(**{name: value}), name, shown(value), allowed, "Choose one in that range.")
    for value in (None, "1", True, [1.0], torch.ones(2)):
        refused(lambda value=value: make(**{name: value}), name, shown(value), allowed, "Pass a plain number; float(x)")


@named([(LadderOptions, "alphas"), (grid, "alphas"), (grid, "betas")])
def test_what_holds_no_rates_is_refused_by_name(row):
    make, name = row
    for value in (0.1, True, "0.1", b"0.1", {"a": 1}, torch.tensor(0.1), object):
        refused(
            lambda value=value: make(**{name: value}), name, shown(value), "learning rates", "Pass a list of numbers"
        )
    for value in ("0.1", math.nan, -0.1, None):
        refused(
            lambda value=value: make(**{name: [0.1, value]}), name, shown(value), "a finite number of at least 0", ""
        )


@pytest.mark.parametrize("values", [[0.5, 1.0], (0.5, 1), np.array([0.5, 1.0]), torch.tensor([0.5, 1.0])])
def test_rates_may_be_held_in_any_list(values):
    assert LadderOptions(alphas=values).alphas == (0.5, 1.0)
    assert list(grid(alphas=values, progress=False).alphas) == [0.5, 1.0]


def test_infinity_is_a_loss_that_is_never_reached():
    assert grid(divergence=math.inf, chance=math.inf, progress=False).divergence == math.inf


def test_pairs_functions_names_and_problems_that_are_none_are_refused_by_name():
    for value in (0.9, None, (0.9,), "ab"):
        refused(lambda value=value: Adam(value), "betas", shown(value), "two numbers", "Pass (0.9, 0.999)")
    for make, name in ((module, "inner_update"), (problem, "inner_update")):
        refused(lambda make=make, name=name: make(**{name: 3}), name, "3", "callable", "Pass a function", TypeError)
    for name in ("alpha", "beta"):
        refused(lambda name=name: RateFinder(**{name: 0.1}), name, "0.1", "the name of an attribute", "", TypeError)
    refused(lambda: grid(judged_on=3), "judged_on", "3", "a MetaProblem or None", "Pass the problem", TypeError)
    refused(lambda: grid(partial=3), "partial", "3", "the path of a folder or None", "Pass a string", TypeError)
    with pytest.raises(ValueError, match=r"`optimizer` to be one of .* but got \[\]"):
        grid(optimizer=[])
    with pytest.raises(TypeError, match="`params` to be a dict from names to tensors but got generator"):
        PlainProblem(NETWORK.parameters(), lambda params: 0)
    refused(lambda: PlainProblem(PROBLEM.params, 3), "loss", "3", "callable", "Pass a function", TypeError)


@pytest.mark.parametrize("value", [np.int64(3), np.float32(0.5), torch.tensor(3)])
def test_a_number_of_numpy_or_torch_is_no_count_and_the_message_says_how_to_make_one(value):
    refused(lambda: ConvergenceGuard(value), "every_n_steps", shown(value), "an integer", "int(x) makes one of a NumPy")


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ValueError) as caught:
        ConvergenceGuard(torch.zeros(1000))
    assert len(str(caught.value)) < 300 and "tensor([0., 0.," in str(caught.value)
