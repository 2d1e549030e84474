import builtins
import dataclasses
import math

import matplotlib
import pytest
import torch
from torch.optim import SGD

from lightning_maml_guard import ConvergenceGuard, measure
from lightning_maml_guard.plots import safe_region
from tests.helpers import linear_module, quadratic_batch

matplotlib.use("Agg")


def reports(alphas=(0.05, 0.05), beta=0.1):
    batch = quadratic_batch([0.3, 1.0, 2.0, 4.0])
    return [
        measure(
            linear_module(4, beta, inner_lr=alpha, order="simplified").meta_problem(batch),
            beta=beta,
            step=100 * k,
        )
        for k, alpha in enumerate(alphas)
    ]


def test_the_border_is_beta_c_up_to_alpha_c():
    from lightning_maml_guard import critical_rates

    figure, ax = safe_region(reports())
    curve = ax.lines[-1].get_xydata()
    for alpha, beta in curve[:-1:20]:
        assert beta == pytest.approx(critical_rates([0.3, 1.0, 2.0, 4.0], min(alpha, 0.25)).beta_c, rel=1e-6)
    assert curve[-1, 0] == pytest.approx(0.25)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "safe region, last check",
        "configured rates",
    ]
    matplotlib.pyplot.close(figure)


def test_capped_rates_are_joined_to_the_configured_ones():
    capped = [dataclasses.replace(r, alpha_applied=0.02, beta_applied=0.05) for r in reports()]
    figure, ax = safe_region(capped)
    assert "applied rates" in [text.get_text() for text in ax.get_legend().get_texts()]
    matplotlib.pyplot.close(figure)


def test_the_curve_passes_through_the_measured_beta_c_of_the_optimizer():
    module = linear_module(4, 0.1, inner_lr=0.05, order="simplified")
    batch = quadratic_batch([0.3, 1.0, 2.0, 4.0])
    report = measure(module.meta_problem(batch), optimizer=SGD(module.parameters(), lr=0.1, momentum=0.9))
    figure, ax = safe_region([report])
    curve = ax.lines[-1].get_xydata()[:-1]
    nearest = min(curve, key=lambda point: abs(math.log(point[0] / 0.05)))
    assert nearest[1] == pytest.approx(report.beta_c, rel=0.02)
    matplotlib.pyplot.close(figure)


def test_it_draws_on_given_axes_and_through_the_guard():
    guard = ConvergenceGuard()
    guard._run.history = reports()
    figure, ax = matplotlib.pyplot.subplots()
    assert safe_region(guard.history, ax=ax) == (figure, ax)
    other, _ = guard.plot()
    matplotlib.pyplot.close(figure)
    matplotlib.pyplot.close(other)


def test_nothing_measured_is_said():
    with pytest.raises(ValueError, match="nothing to draw"):
        ConvergenceGuard().plot()


def test_a_missing_matplotlib_is_said(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    found = reports()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-maml-guard\[plot\]'"):
        safe_region(found)


def test_alpha_beyond_its_limit_still_draws():
    figure, ax = safe_region(reports(alphas=(0.4, 0.4)))
    assert len(ax.lines) == 2 and torch.isfinite(torch.tensor(ax.get_ylim())).all()
    matplotlib.pyplot.close(figure)
