"""Limits found by training meet the theory's closed forms."""

from dataclasses import replace

import pytest
import torch

from lightning_maml_guard import MetaProblem, critical_rates, phase_diagram
from lightning_maml_guard.phase.bisection import border, converges, critical_alpha, critical_betas
from lightning_maml_guard.phase.optimizers import SGD
from tests.helpers import linear_module, quadratic_batch

pytestmark = pytest.mark.usefixtures("one_thread")
SPECTRUM = [0.3, 1.0, 2.0, 4.0]


def problem(order="simplified", inner_steps=1):
    one = linear_module(4, 0.1, inner_lr=0.1, order=order, inner_steps=inner_steps)
    return one.meta_problem(quadratic_batch(SPECTRUM, target=1.0))


def test_the_table_of_the_theory():
    """First-order MAML with two inner steps: THEORY.md, section 3, found there by bisection of its own."""
    ((inside, outside),) = critical_betas(problem("first", 2), [0.1], 0.5, 4.0, steps=400, relative=1e-3)
    assert inside <= 1.3889 * 1.001 and outside >= 1.3889 * 0.999 and outside / inside < 1.0011


@pytest.mark.slow
def test_every_column_has_its_own_limit_also_where_an_interior_eigenvalue_binds():
    alphas = [0.02, 0.1, 0.15, 0.2, 0.24]
    found = critical_betas(problem(), alphas, 0.2, 4.0, steps=800, relative=1e-3)
    for alpha, (inside, outside) in zip(alphas, found, strict=True):
        expected = critical_rates(SPECTRUM, alpha).beta_c
        assert (inside + outside) / 2 == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_inner_rates_limit():
    inside, outside = critical_alpha(problem(), 0.5, 0.1, 0.5, steps=800, relative=1e-3)
    assert (inside + outside) / 2 == pytest.approx(0.25, rel=1e-3)


def test_a_bracket_that_holds_no_limit_is_refused():
    with pytest.raises(ValueError, match="outer learning rate low=2 does not converge everywhere"):
        critical_betas(problem(), [0.1], 2.0, 10.0, steps=100)
    with pytest.raises(ValueError, match=r"outer learning rate high=0\.2 still converges somewhere"):
        critical_betas(problem(), [0.1], 0.1, 0.2, steps=100)
    with pytest.raises(ValueError, match=r"0 < `low` < `high` .* but got low=0, high=1"):
        critical_betas(problem(), [0.1], 0, 1)


def test_a_run_at_rounding_has_converged():
    alphas, betas = (torch.full((1,), value, dtype=torch.float64) for value in (0.1, 0.5))
    assert converges(problem(), alphas, betas, 2000).all()


def test_a_column_of_a_diagram_is_refined_to_its_border():
    data = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]]).double(), torch.zeros(1, 2, 1).double()
    loss = lambda params, batch: ((batch[0] @ params["w"] - batch[1]) ** 2).sum()  # noqa: E731
    problem = MetaProblem({"w": torch.ones(2, 1).double()}, loss, data, data, order="simplified")
    steps = {"measure_every": 0, "progress": False, "optimizer": SGD(0.5)}
    found = phase_diagram(problem, [0.1, 0.2], [0.5, 5.0], 80, **steps)
    for alpha in found.alphas[1:]:
        limit = 2 * 1.5 / (2 - alpha * 4)
        inside, outside = border(problem, found, float(alpha), relative=0.04, optimizer=SGD(0.5))
        assert inside < limit < 1.04 * outside and outside / inside <= 1.04
    other = replace(problem, support=(10 * data[0], data[1]), query=(10 * data[0], data[1]))
    with pytest.raises(ValueError, match="low=0.5 does not converge everywhere"):
        border(lambda step: other, found, 0.1, optimizer=SGD(0.5))
    none = phase_diagram(problem, [0.1], [50.0, 60.0], 20, **steps)
    with pytest.raises(
        ValueError, match="alpha=0.1: no outer learning rate trained. Draw a diagram with lower `betas`"
    ):
        border(problem, none, 0.1)
    every = phase_diagram(problem, [0.1], [0.1, 0.2], 20, **steps)
    with pytest.raises(ValueError, match="the largest outer learning rate trained. Draw a diagram with higher"):
        border(problem, every, 0.1)
