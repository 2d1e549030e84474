"""Advice in words: one line that says what is wrong and what to set, then why, then what the guard does."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_maml_guard.cli.parser import OptionSpelling
from lightning_maml_guard.messages.advice import Advice, Cause, settable
from lightning_maml_guard.messages.advice_sentences import advice_given, advised
from lightning_maml_guard.messages.reasons import Kind, Reason, Remedy
from lightning_maml_guard.messages.sentences import cause, remedy
from lightning_maml_guard.messages.spelling import IN_PYTHON

RATES = {"configured_alpha": 0.1, "configured_beta": 0.4}

# An example of each cause.
EXAMPLES = [
    (
        Advice(cause=Cause.ALPHA, alpha=0.025, **RATES),
        "alpha = 0.1 is too large. Set the inner rate (inner_lr) to 0.025.",
    ),
    (
        Advice(cause=Cause.BETA, beta=0.025, **RATES),
        "beta = 0.4 is too large. Set the optimizer's lr to 0.025.",
    ),
    (
        Advice(cause=Cause.BETA, beta=0.025, several=True, **RATES),
        "beta = 0.4 is too large. Set the optimizer's lr to 0.025 (the largest of several; lower the others in "
        "proportion).",
    ),
    (
        Advice(cause=Cause.BOTH, alpha=0.025, beta=1e-5, **RATES),
        "alpha = 0.1 and beta = 0.4 are too large. Set the inner rate (inner_lr) to 0.025 and the optimizer's lr to "
        "1e-05.",
    ),
    (
        Advice(cause=Cause.SCHEDULE, beta=0.15, peak_step=300, **RATES),
        "the schedule takes beta to 0.4 at step 300, which is too large. Set the optimizer's lr to 0.15.",
    ),
    (
        Advice(cause=Cause.SCHEDULE, beta=0.15, peak_step=300, step=301, **RATES),
        "the schedule took beta to 0.4 at step 300, which is too large. Set the optimizer's lr to 0.15.",
    ),
    (
        Advice(cause=Cause.SCHEDULE, beta=0.15, **RATES),
        "the schedule takes beta to 0.4, which is too large. Set the optimizer's lr to 0.15.",
    ),
    (
        Advice(cause=Cause.SCHEDULE, beta=0.15, setting="max_lr", peak_step=90, **RATES),
        "the schedule takes beta to 0.4 at step 90, which is too large. Set the schedule's max_lr to 0.15.",
    ),
    (
        Advice(cause=Cause.BATCH, gradient_clip_val=2.5, **RATES),
        "a batch is an outlier; the rates are not to blame. Set Trainer(gradient_clip_val=2.5), or fix the batch.",
    ),
    (
        Advice(cause=Cause.BATCH, **RATES),
        "a batch is an outlier; the rates are not to blame. Fix the batch, or leave it out: gradients that are not finite "
        "cannot be clipped.",
    ),
    (
        Advice(cause=Cause.DEAD_UNITS, beta=0.05, **RATES),
        "beta = 0.4 is too large: units have died. Set the optimizer's lr to 0.05.",
    ),
    (
        Advice(cause=Cause.UNKNOWN, **RATES),
        "training diverges for a reason that is not known. Look at the data, the loss and the precision.",
    ),
]


@pytest.mark.parametrize(("advice", "words"), EXAMPLES, ids=[advice.cause.name for advice, _ in EXAMPLES])
def test_advice_is_one_line_with_the_numbers_to_set(advice, words):
    assert advised(advice) == str(advice) == words
    assert "\n" not in words


def test_what_was_learned_and_is_lost_at_lower_rates_too():
    lost = Reason(Kind.LEARNING_LOST, losses=(1.0, 2.0, 3.0), steps=4)
    tried = Reason(Kind.RATES_TRIED, losses=(2.0, 1.5, 3.0), steps=30, alpha=math.nan, beta=0.1)
    assert str(Advice(cause=Cause.UNKNOWN, evidence=(lost, tried), **RATES)) == (
        "the loss has risen above its best, and rises at lower rates too. Look at the data and the loss: that of a "
        "policy gradient does not say what was learned."
    )
    kept = replace(tried, losses=(0.9, 1.5, 3.0))  # where something else threw the run off
    for evidence in ((lost,), (lost, kept)):
        assert str(Advice(cause=Cause.UNKNOWN, evidence=evidence, **RATES)) == EXAMPLES[-1][1]


def test_where_no_rate_survives_or_the_data_hold_nan_that_is_what_is_said():
    dead = replace(TRIED, losses=(math.inf, math.nan, 1.0))
    assert str(Advice(cause=Cause.UNKNOWN, evidence=(dead,), **RATES)) == (
        "training diverges at every rate that was tried. Look at the data, the loss and the precision."
    )
    assert str(Advice(cause=Cause.UNKNOWN, evidence=(TRIED,), **RATES)) == EXAMPLES[-1][1]
    padded = Reason(Kind.NAN_IN_DATA, detail="The task loss is nan.")
    assert str(Advice(cause=Cause.UNKNOWN, evidence=(padded, dead), **RATES)) == (
        "the data of the problem holds nan, so that its loss is nan. Leave what is nan out of the data."
    )
    assert str(replace(EXAMPLES[0][0], evidence=(padded, dead))) == EXAMPLES[0][1]


def test_every_cause_has_an_example_and_words_for_advice_that_knows_nothing_more():
    assert {advice.cause for advice, _ in EXAMPLES} == set(Cause)
    for each in set(Cause) - {Cause.BATCH}:  # which then has a word of its own
        assert advised(Advice(cause=each)).endswith(". Look at the data, the loss and the precision.")


def test_rates_that_training_moves_are_named_where_there_is_no_number_to_set():
    moved = Reason(Kind.RATES_MOVED, value=0.4, limit=0.05)
    assert str(Advice(cause=Cause.UNKNOWN, evidence=(moved,), **RATES)) == (
        "training moves the inner rates that it learns too far. Lower the lr that the optimizer moves them at."
    )
    assert str(replace(EXAMPLES[0][0], evidence=(moved,))) == EXAMPLES[0][1]


def test_the_causes_are_the_documented_words():
    assert [each.value for each in Cause] == ["alpha", "beta", "both", "schedule", "batch", "dead units", "unknown"]
    for each in Cause:  # compared and written as words
        assert each == each.value and json.loads(json.dumps(each)) == each.value


def test_on_the_command_line_the_options_of_the_trainer_are_spelled_as_it_takes_them():
    batch = next(advice for advice, _ in EXAMPLES if advice.cause is Cause.BATCH)
    assert advised(batch, OptionSpelling()) == (
        "a batch is an outlier; the rates are not to blame. Set --trainer.gradient_clip_val 2.5, or fix the batch."
    )
    assert OptionSpelling().trainer(gradient_clip_val=2.5, max_steps=9) == (
        "--trainer.gradient_clip_val 2.5 --trainer.max_steps 9"
    )
    for advice, words in EXAMPLES:
        assert advice.cause is Cause.BATCH or advised(advice, OptionSpelling()) == words


ABOVE = Reason(
    Kind.ABOVE_LIMIT,
    rate="beta",
    value=0.4,
    limit=0.1,
    interval=(0.09, 0.11),
    effect="grows",
    remedy=Remedy.LOWER_BETA,
)
TRIED = Reason(Kind.RATES_TRIED, losses=(math.inf, 0.25, 1.0), steps=30, beta=0.025)


def test_a_message_says_what_to_set_first_then_each_cause_once_then_what_the_guard_does():
    advice = Advice(cause=Cause.BETA, beta=0.025, step=7, evidence=(ABOVE, TRIED, ABOVE), **RATES)
    said = advice_given(7, advice, ["Training stops after this step."], IN_PYTHON).splitlines()
    assert said == [
        "ConvergenceGuard: step 7: beta = 0.4 is too large. Set the optimizer's lr to 0.025.",
        f"Why: {cause(ABOVE)}",
        f"Why: {cause(TRIED)}",
        "Training stops after this step.",
    ]
    # What to set is said by the advice alone: a limit is no number to set.
    assert remedy(ABOVE) and not any(remedy(ABOVE) in line for line in said)


def test_a_message_without_evidence_is_its_first_line():
    advice = Advice(cause=Cause.UNKNOWN)
    assert advice_given(0, advice, [], IN_PYTHON) == f"ConvergenceGuard: step 0: {advice}"


def test_the_evidence_is_spelled_as_the_advice_is():
    collapsed = Reason(Kind.NETWORK_COLLAPSED, step=15, value=0.5, limit=10.0, counts=(37, 40))
    advice = Advice(cause=Cause.UNKNOWN, evidence=(collapsed,))
    assert "ConvergenceGuard(action='rescale'" in advice_given(15, advice, [], IN_PYTHON)
    assert cause(collapsed, OptionSpelling()) in advice_given(15, advice, [], OptionSpelling())


@pytest.mark.parametrize(
    ("rate", "to_set"),
    [(0.0251, 0.025), (0.0249, 0.025), (1234.0, 1200.0), (9.96, 10.0), (3.14e-9, 3.1e-9), (0.0, 0.0)],
)
def test_a_rate_to_set_has_two_digits(rate, to_set):
    assert settable(rate) == to_set
    assert settable(math.inf) == math.inf and math.isnan(settable(math.nan))


@given(st.floats(1e-30, 1e30))
def test_two_digits_are_within_five_percent_and_stay_as_they_are(rate):
    found = settable(rate)
    assert abs(found - rate) <= 0.051 * rate
    assert settable(found) == found and f"{found:.1e}" == f"{rate:.1e}"


def test_advice_is_data_that_can_be_compared_and_changed_only_by_a_copy():
    advice = Advice(cause=Cause.BETA, beta=0.025, evidence=(TRIED,), **RATES)
    assert advice == replace(advice) != replace(advice, beta=0.05)
    with pytest.raises(AttributeError):
        advice.beta = 1.0
