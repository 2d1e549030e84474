import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_maml_guard import critical_rates
from lightning_maml_guard.theory.critical_rates import worst_of
from lightning_maml_guard.theory.ritz import rates_from_lanczos, rates_from_top, ritz_values
from tests.helpers import bisect

SPECTRUM = [0.3, 1.0, 2.0, 4.0]
positive = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)
real = st.lists(st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=1, max_size=12)


def grown(eigenvalues, alpha, beta, order, steps):
    """A quadratic meta-trained in its eigenbasis with the update written out: no multiplier formula."""
    h = np.array(eigenvalues)
    v = np.ones_like(h)
    for _ in range(4000):
        g = h * v
        if order == "simplified":
            gradient = g - steps * alpha * h * g
        else:
            adapted = v.copy()
            for _ in range(steps):
                adapted = adapted - alpha * h * adapted
            gradient = h * adapted
            for _ in range(steps if order == "exact" else 0):
                gradient = gradient - alpha * h * gradient
        v = v - beta * gradient
        if np.abs(v).max() > 1e6:
            return False
    return bool(np.abs(v).max() < 1)


@pytest.mark.parametrize(
    ("order", "steps", "expected"),
    [
        ("simplified", 1, 0.8333),
        ("first", 1, 0.8333),
        ("first", 2, 1.3889),
        ("first", 5, 3.0518),
        ("exact", 1, 1.3889),
        ("exact", 2, 2.4414),
        ("exact", 5, 5.7359),
        ("simplified", 2, None),
    ],
)
def test_beta_c_is_where_the_written_out_update_stops_converging(order, steps, expected):
    beta_c = critical_rates(SPECTRUM, 0.1, order=order, inner_steps=steps).beta_c
    if expected is not None:
        assert beta_c == pytest.approx(expected, abs=5e-5)
    found = bisect(lambda beta: grown(SPECTRUM, 0.1, beta, order, steps), beta_c / 4, beta_c * 4, 1e-4)
    assert found == pytest.approx(beta_c, rel=3e-3)


def test_beyond_alpha_c_no_meta_rate_is_stable_for_simplified_but_one_is_for_exact():
    rates = critical_rates(SPECTRUM, 0.3)
    assert rates.alpha_c == 0.25 and rates.beta_c == 0.0 and rates.certificate == 0.0
    assert not grown(SPECTRUM, 0.3, 1e-2, "simplified", 1)
    exact = critical_rates(SPECTRUM, 0.3, order="exact")
    assert exact.alpha_c == 0.5
    assert exact.beta_c == pytest.approx(4.08, abs=0.01)


@pytest.mark.parametrize(("steps", "alpha_c"), [(1, 0.25), (2, 0.5), (3, 0.25)])
def test_first_order_alpha_c_depends_on_the_parity_of_k(steps, alpha_c):
    assert critical_rates(SPECTRUM, 0.1, order="first", inner_steps=steps).alpha_c == alpha_c


def test_the_whole_spectrum_counts_not_lambda_max_alone():
    alpha = 0.24  # above 1/(2*lambda_max): the eigenvalue 2 binds
    assert critical_rates(SPECTRUM, alpha).beta_c == pytest.approx(2 / (2 - alpha * 4))
    assert critical_rates([4.0], alpha).beta_c == pytest.approx(2 / (4 - alpha * 16))


@given(positive, st.floats(0, 1))
def test_beta_c_is_the_minimum_over_the_spectrum_and_never_below_the_certificate(values, fraction):
    alpha = fraction / max(values)
    rates = critical_rates(values, alpha)
    multipliers = [x - alpha * x * x for x in values]
    best = max(multipliers)
    assert rates.alpha_c == pytest.approx(1 / max(values))
    if best > 1e-9 * max(values):
        assert rates.beta_c == pytest.approx(2 / best)
    expected = 2 / (max(values) * (1 - fraction)) if fraction <= 0.5 else 8 * alpha
    assert rates.certificate == pytest.approx(expected)
    assert rates.beta_c >= rates.certificate * (1 - 1e-9)


@given(real, st.floats(0, 10))
def test_negative_eigenvalues_change_nothing_but_what_is_reported(values, alpha):
    kept = [x for x in values if x > 0]
    rates = critical_rates(values, alpha)
    assert rates.negative == sum(x < 0 for x in values)
    assert rates.lambda_min == min(values)
    if kept:
        only = critical_rates(kept, alpha)
        assert (rates.alpha_c, rates.beta_c) == (only.alpha_c, only.beta_c)
    else:
        assert rates.alpha_c == rates.beta_c == math.inf


@given(positive, st.floats(0, 1.2), st.floats(0, 0.3), st.randoms())
def test_intervals_hold_every_spectrum_within_the_residual_bounds(values, fraction, spread, random):
    alpha = fraction / max(values)
    bounds = [spread * x for x in values]
    rates = critical_rates(values, alpha, residuals=bounds)
    moved = critical_rates([x + random.uniform(-b, b) for x, b in zip(values, bounds, strict=True)], alpha)
    slack = 1 + 1e-9
    for name in ("alpha_c", "beta_c"):
        low, high = getattr(rates, f"{name}_interval")
        assert low / slack <= getattr(moved, name) <= high * slack or getattr(moved, name) == low == 0
        assert low / slack <= getattr(rates, name) <= high * slack


def test_spectra_may_be_tensors_arrays_or_lists():
    expected = critical_rates(SPECTRUM, 0.1)
    assert critical_rates(torch.tensor(SPECTRUM, dtype=torch.float64), 0.1) == expected
    assert critical_rates(torch.tensor([0.5, 4.0], dtype=torch.bfloat16), 0.1) == critical_rates([0.5, 4.0], 0.1)
    assert critical_rates(np.array(SPECTRUM).reshape(2, 2), 0.1) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 0.1), "`eigenvalues` to hold at least one eigenvalue"),
        (([1.0, math.nan], 0.1), "to be finite"),
        (([1.0, math.inf], 0.1), "to be finite"),
        (([1.0 + 1j], 0.1), "`eigenvalues` to hold real numbers"),
        (([1.0], -0.1), "`alpha` to be a finite number of at least 0 but got -0.1"),
        (([1.0], math.nan), "`alpha` to be a finite number of at least 0 but got nan"),
        (([1.0], "fast"), "`alpha` to be a finite number of at least 0 but got 'fast'"),
        (([1.0], True), "`alpha` to be a finite number of at least 0 but got True"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        critical_rates(*arguments)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"order": "reptile"}, "`order` to be one of .* but got 'reptile'"),
        ({"inner_steps": 0}, "`inner_steps` to be an integer of at least 1 but got 0"),
        ({"inner_steps": 1.5}, "`inner_steps` to be an integer of at least 1 but got 1.5"),
        ({"residuals": [0.1, 0.2]}, "`residuals` to be one number or 1 numbers"),
        ({"residuals": math.nan}, "`residuals` to be finite"),
    ],
)
def test_bad_keywords_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        critical_rates([1.0], 0.1, **keywords)


def textbook_lanczos(matrix, steps):
    """Lanczos in exact-ish arithmetic (float64, NumPy, reorthogonalised), independent of ours."""
    n = len(matrix)
    basis = np.zeros((n, steps))
    vector = np.random.default_rng(0).standard_normal(n)
    diagonal, off = [], []
    vector /= np.linalg.norm(vector)
    for k in range(steps):
        basis[:, k] = vector
        w = matrix @ vector
        diagonal.append(vector @ w)
        for _ in range(2):
            w -= basis[:, : k + 1] @ (basis[:, : k + 1].T @ w)
        off.append(np.linalg.norm(w))
        vector = w / off[-1]
    return diagonal, off, basis


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_the_rayleigh_ritz_value_of_h_tilde_needs_no_further_product(seed, fraction):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    matrix = q @ np.diag(rng.uniform(0, 5, 40)) @ q.T
    alpha = fraction / 5
    diagonal, off, basis = textbook_lanczos(matrix, 8)
    projected = basis.T @ (matrix - alpha * matrix @ matrix) @ basis
    rates = rates_from_lanczos(diagonal, off, alpha)
    assert rates.curvature == pytest.approx(np.linalg.eigvalsh(projected)[-1], rel=1e-10)
    values, bounds = ritz_values(diagonal, off)
    true = np.linalg.eigvalsh(matrix)
    assert all(
        np.abs(true - value).min() <= bound * (1 + 1e-9) + 1e-12 for value, bound in zip(values, bounds, strict=True)
    )
    f = true - alpha * true**2
    low, high = rates.curvature_interval
    assert min(abs(f - rates.curvature)) <= high - rates.curvature + 1e-12
    assert rates.lambda_max <= true[-1] + 1e-12


def test_a_full_lanczos_run_gives_the_rates_of_the_whole_spectrum():
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    values = rng.uniform(-1, 4, 12)
    diagonal, off, _ = textbook_lanczos(q @ np.diag(values) @ q.T, 12)
    off[-1] = 0.0
    for alpha in (0.0, 0.1, 0.2, 1 / values.max()):
        full, exact = rates_from_lanczos(diagonal, off, alpha), critical_rates(values, alpha)
        assert full.alpha_c == pytest.approx(exact.alpha_c)
        assert full.beta_c == pytest.approx(exact.beta_c)
        assert full.negative == exact.negative


@given(positive, st.floats(0, 1))
def test_power_iteration_gets_the_certificate(values, fraction):
    alpha = fraction / max(values)
    top = rates_from_top(max(values), min(values), 0.0, alpha)
    whole = critical_rates(values, alpha)
    assert top.beta_c == pytest.approx(whole.certificate)
    low, high = top.beta_c_interval
    assert low <= whole.beta_c * (1 + 1e-9) and whole.beta_c <= high * (1 + 1e-9)


def test_the_worst_of_several_tasks_decides():
    mild, sharp, flat_but_steep = ([1.0], 0.2), ([4.0], 0.2), ([2.5], 0.2)
    each = [critical_rates(*task) for task in (mild, sharp, flat_but_steep)]
    worst = worst_of(each)
    assert worst.alpha_c == 0.25  # the sharpest task's
    assert worst.beta_c == min(rates.beta_c for rates in each) == each[2].beta_c


@pytest.mark.parametrize(("diagonal", "off"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [0.0])])
def test_a_broken_lanczos_run_is_refused(diagonal, off):
    with pytest.raises(ValueError, match="Lanczos run|two sequences of one length"):
        rates_from_lanczos(diagonal, off, 0.1)
