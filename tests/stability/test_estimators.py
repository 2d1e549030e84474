"""The registry of estimators: one function and one row make a new one."""

import sys

import pytest
import torch

from lightning_maml_guard import CurvatureOptions, measure
from lightning_maml_guard.stability.estimators import ESTIMATORS, RegisteredEstimator, Spectrum
from tests.helpers import linear_module, quadratic_batch

VALUES = [0.3, 1.0, 2.0, 4.0]


def dense(wanted):
    """The whole Hessian, column by column."""
    columns = [wanted.hessian(each) for each in torch.eye(len(VALUES), dtype=torch.float64)]
    return Spectrum(values=tuple(torch.linalg.eigvalsh(torch.stack(columns)).tolist()), matvecs=len(columns))


@pytest.fixture
def problem():
    return linear_module(4, 0.1, inner_lr=0.05, order="simplified").meta_problem(quadratic_batch(VALUES))


@pytest.mark.parametrize("criterion", ["simplified", "exact"])
def test_an_estimator_that_is_registered_measures_by_its_name(problem, monkeypatch, criterion):
    with pytest.raises(ValueError, match="`estimator` to be 'lanczos', 'pyhessian' or a callable .* got 'mine'"):
        CurvatureOptions(estimator="mine")
    asked = []
    monkeypatch.setitem(ESTIMATORS, "mine", RegisteredEstimator(lambda wanted: asked.append(wanted) or dense(wanted)))
    mine, lanczos = (
        measure(problem, beta=0.1, curvature=CurvatureOptions(criterion=criterion, estimator=estimator))
        for estimator in ("mine", "lanczos")
    )
    assert len(asked) == 1 and asked[0].blocks is None
    assert (mine.lambda_min, mine.lambda_max) == pytest.approx((0.3, 4.0), rel=1e-9)
    for name in ("alpha_c", "beta_c", "exact_beta_c", "safe_beta_c"):
        assert getattr(mine, name) == pytest.approx(getattr(lanczos, name), rel=1e-6, nan_ok=criterion == "simplified")
    assert mine.status == lanczos.status == "safe" and mine.ritz()[0] == pytest.approx(VALUES)


def test_a_row_says_whether_the_estimator_treats_each_task_by_itself(problem, monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "mine", RegisteredEstimator(dense))
    with pytest.raises(ValueError, match="tasks='worst' needs estimator='lanczos' but got 'mine'"):
        CurvatureOptions(estimator="mine", tasks="worst")
    monkeypatch.setitem(ESTIMATORS, "mine", RegisteredEstimator(ESTIMATORS["lanczos"].estimate, per_task=True))
    report = measure(problem, beta=0.1, curvature=CurvatureOptions(estimator="mine", tasks="worst"))
    assert report.lambda_max == pytest.approx(4.0, rel=1e-6)
    with pytest.raises(ValueError, match="'lanczos', 'pyhessian', 'mine' or a callable"):
        CurvatureOptions(estimator="guess")


def test_without_pyhessian_only_its_estimator_is_missing_and_says_so(problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    with pytest.raises(
        ImportError, match="`estimator` = 'pyhessian' needs the package pyhessian.*pip install pyhessian"
    ):
        CurvatureOptions(estimator="pyhessian")
    assert measure(problem, beta=0.1).lambda_max == pytest.approx(4.0, rel=1e-6)


def test_products_that_the_operator_does_not_see_are_counted(problem, monkeypatch):
    hvps = []
    measure(problem, beta=0.1)  # with the self-check, which counts
    for counts_itself in (False, True):
        monkeypatch.setitem(ESTIMATORS, "mine", RegisteredEstimator(dense, counts_itself=counts_itself))
        hvps.append(measure(problem, beta=0.1, curvature=CurvatureOptions(estimator="mine")).hvps)
    assert hvps[1] == hvps[0] + len(VALUES)
