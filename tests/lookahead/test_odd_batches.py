"""Batches unlike the others: beside a plain comparison of losses, over problems of known ones."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import Lookahead
from lightning_maml_guard.lookahead.odd_batches import without_odd
from lightning_maml_guard.stability.problems import PlainProblem


def problems_of(*losses):
    """One problem for each loss, at one and the same weight."""
    weight = nn.Parameter(torch.ones(1))

    def stated(loss):
        return PlainProblem({"weight": weight}, lambda params: loss * params["weight"].pow(2).sum())

    problems = [stated(each) for each in losses]
    return problems, Lookahead(problems, SGD([weight], lr=0.1), 1)


@pytest.mark.parametrize(
    ("losses", "kept", "worst"),
    [
        ((1.0, 1.2, 0.8, 30.0, 1.1), (0, 1, 2, 4), 3),
        ((1.0, 40.0, 0.8, 30.0, 1.1), (0, 2, 4), 1),
        ((1.0, 1.2, 0.8, 4.9, 1.1), (0, 1, 2, 3, 4), None),
        ((1.0, 1.2, 0.8, math.nan, 1.1), (0, 1, 2, 4), 3),
        ((1.0, 1.2, 30.0), (0, 1, 2), None),  # too few to tell
        ((1.0, 30.0, 30.0, 30.0, 1.1), (0, 1, 2, 3, 4), None),  # most of them are no exception
    ],
)
def test_what_is_far_above_the_median_is_left_out(losses, kept, worst):
    problems, lookahead = problems_of(*losses)
    found, odd = without_odd(problems, lookahead, Scale(start=1.0))
    assert [problems.index(each) for each in found] == list(kept) and odd == worst


def test_losses_at_or_below_zero_are_compared_by_their_distance():
    problems, lookahead = problems_of(-1.0, -1.1, -0.9, 1.5, -1.0)
    # Four units above the median: 5 times the loss of a run whose start is one unit above 0.
    assert without_odd(problems, lookahead, Scale(start=-1.0, unit=0.5))[1] == 3
    assert without_odd(problems, lookahead, Scale(start=-1.0, unit=1.0))[1] is None
