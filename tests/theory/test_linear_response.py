import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Adam, NAdam

from lightning_maml_guard.optim.stability_limits import responses, stability_limit
from lightning_maml_guard.theory.linear_response import Response

RESPONSES = {
    "sgd": Response(),
    "momentum": Response(0.9, 0.0, 1.0),
    "nesterov": Response(0.9, 1.0, 0.9),
    "adam": Response(0.9, 0.0, 0.1),
    "nadam": Response(0.9, 0.1, 0.09),
}


def grows(response, rate, eigenvalue, decay):
    """Spectral radius of the recursion itself, theta and buffer written as one matrix."""
    step = np.array(
        [
            [
                1 - rate * decay - rate * (response.direct + response.buffered) * eigenvalue,
                -rate * response.buffered * response.momentum,
            ],
            [eigenvalue, response.momentum],
        ]
    )
    return np.abs(np.linalg.eigvals(step)).max() > 1


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("eigenvalue", [2.0, 2 + 0.3j, 1 + 1j, 0.2 + 1j])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_largest_rate_is_where_the_recursion_starts_to_grow(name, eigenvalue, decay):
    response = RESPONSES[name]
    limit = response.largest_rate(complex(eigenvalue), decay)
    assert not grows(response, 0.999 * limit, eigenvalue, decay)
    assert grows(response, 1.001 * limit, eigenvalue, decay)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 10), st.floats(-10, 10))
def test_without_momentum_it_is_the_closed_form(real, imaginary):
    eigenvalue = complex(real, imaginary)
    assert Response().largest_rate(eigenvalue) == pytest.approx(2 * real / abs(eigenvalue) ** 2)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(RESPONSES)), st.floats(0.01, 10), st.floats(0, 0.3))
def test_a_tiny_imaginary_part_changes_nothing(name, real, decay):
    response = RESPONSES[name]
    assert response.largest_rate(complex(real, 1e-9), decay) == pytest.approx(
        response.largest_rate(complex(real), decay), rel=1e-5
    )


def test_an_outward_pair_has_no_stable_rate_and_none_upward_no_limit():
    assert Response(0.9, 0.0, 1.0).largest_rate(complex(-1, 1)) == 0.0
    assert Response().largest_rate(complex(-1, 1)) == 0.0
    assert Response().largest_rate(complex(-1.0)) == math.inf
    assert Response().largest_rate(complex(-1.0), 0.5) == 4.0


def mean_square(response, rate, mean, variance, steps=4000):
    """E[theta^2] after many steps with a fresh curvature each, by the exact recursion of the second moments."""
    moments = np.array([[1.0, 0.0], [0.0, 0.0]])
    spread = math.sqrt(variance)
    for _ in range(steps):
        total = np.zeros((2, 2))
        for curvature in (mean - spread, mean + spread):  # two-point law with this mean and variance
            step = np.array(
                [
                    [
                        1 - rate * (response.direct + response.buffered) * curvature,
                        -rate * response.buffered * response.momentum,
                    ],
                    [curvature, response.momentum],
                ]
            )
            total += 0.5 * step @ moments @ step.T
        moments = total
        if moments[0, 0] > 1e12:
            return math.inf
    return moments[0, 0]


@pytest.mark.parametrize("name", RESPONSES)
def test_the_mean_square_rate_is_where_the_second_moment_starts_to_grow(name):
    response = RESPONSES[name]
    limit = response.mean_square_rate(1.3, 0.5)
    assert limit < response.largest_rate(1.3 + 0j)
    assert mean_square(response, 0.98 * limit, 1.3, 0.5) < 1
    assert mean_square(response, 1.02 * limit, 1.3, 0.5) > 1


def test_the_mean_square_closed_forms():
    a, v, m = 1.3, 0.5, 0.9
    assert Response().mean_square_rate(a, v) == pytest.approx(2 * a / (a**2 + v))
    assert Response(m, 0.0, 1.0).mean_square_rate(a, v) == pytest.approx(2 / (a / (1 + m) + v / (a * (1 - m))))
    assert Response().mean_square_rate(a, 0.0) == pytest.approx(2 / a)
    assert Response().mean_square_rate(-1.0, 0.5) == 0.0


@pytest.mark.parametrize("steps", [1, 3, 10, 200])
def test_adams_coming_response_is_its_bias_corrected_step(steps):
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Adam([weight], lr=0.1)
    for _ in range(steps):
        weight.grad = torch.randn(3, dtype=torch.float64)
        optimizer.step()
    settled, coming = responses(optimizer)
    assert settled.limit == stability_limit(optimizer) == pytest.approx(38)
    assert coming.limit == pytest.approx(38 * (1 - 0.9 ** (steps + 1)))


@pytest.mark.parametrize("make", [Adam, NAdam])
@pytest.mark.parametrize("taken", [1, 4, 30])
def test_the_coming_response_is_what_torch_does_with_one_gradient(make, taken):
    """With v held, the step is linear in the gradient: its slope is (direct + buffered)/P."""
    steps = []
    for push in (0.0, 1e-3):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = make([weight], lr=1.0, betas=(0.9, 1 - 1e-12))
        weight.grad = torch.zeros_like(weight)
        for _ in range(taken):
            optimizer.step()
        state = optimizer.state[weight]
        correction = 1 - (1 - 1e-12) ** (taken + 1)
        state["exp_avg_sq"].fill_(4.0 * correction)
        weight.grad = torch.full_like(weight, push)
        before = float(weight.detach())
        (_, response) = responses(optimizer)
        optimizer.step()
        steps.append(before - float(weight.detach()))
    assert (steps[1] - steps[0]) / 1e-3 * 2.0 == pytest.approx(response.direct + response.buffered, rel=1e-4)


def test_groups_with_different_momentum_answer_each_for_itself():
    a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = SGD([{"params": [a]}, {"params": [b], "momentum": 0.9}], lr=0.1)
    assert [each.limit for each in responses(optimizer)] == [2.0, pytest.approx(3.8)]
