import builtins
import dataclasses
import math

import matplotlib
import numpy as np
import pytest
import torch
from torch.optim import SGD

from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, measure
from lightning_maml_guard.guard.report import CheckReport
from lightning_maml_guard.lookahead.loss_curve import LossCurve
from lightning_maml_guard.plots import phase_diagram, ritz_values, run_history, safe_region, spectrum, style
from lightning_maml_guard.stability.measure import measure_border
from tests.helpers import linear_module, quadratic_batch

matplotlib.use("Agg")


def reports(alphas=(0.05, 0.05), beta=0.1):
    batch = quadratic_batch([0.3, 1.0, 2.0, 4.0])
    return [
        measure(
            linear_module(4, beta, inner_lr=alpha, order="simplified").meta_problem(batch),
            beta=beta,
            step=100 * k,
            curvature=CurvatureOptions(criterion="simplified"),
        )
        for k, alpha in enumerate(alphas)
    ]


def test_the_border_is_beta_c_up_to_alpha_c():
    from lightning_maml_guard import critical_rates

    figure, ax = safe_region(reports())
    curve = max(ax.lines, key=lambda line: line.get_linewidth()).get_xydata()
    for alpha, beta in curve[:-1:20]:
        assert beta == pytest.approx(critical_rates([0.3, 1.0, 2.0, 4.0], min(alpha, 0.25)).beta_c, rel=1e-6)
    assert curve[-1, 0] == pytest.approx(0.25)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        r"$\beta_c(\alpha)$, last check",
        "safe region, last check",
        r"$\beta_c(\alpha)$, earlier checks",
        "configured rates",
    ]
    matplotlib.pyplot.close(figure)


def test_the_caller_names_the_report_that_is_filled():
    figure, ax = safe_region(reports(), which="smallest")
    assert [each.get_text() for each in ax.get_legend().get_texts()][1] == "safe region, smallest"
    matplotlib.pyplot.close(figure)


def test_a_single_check_needs_no_colour_bar_and_several_have_one():
    figure, ax = safe_region(reports()[:1])
    assert len(figure.axes) == 1 and ax.get_title() == "Safe region of the learning rates, step 0"
    bar = safe_region(reports())[0].axes[-1]
    assert bar.get_ylabel() == "training step of the check" and bar.get_ylim() == (0, 100)
    matplotlib.pyplot.close("all")


def test_capped_rates_are_joined_to_the_configured_ones():
    capped = [CheckReport.of(r, findings=(), alpha_applied=0.02, beta_applied=0.05) for r in reports()]
    figure, ax = safe_region(capped)
    assert "applied rates" in [text.get_text() for text in ax.get_legend().get_texts()]
    matplotlib.pyplot.close(figure)


def checks():
    """What a guard keeps of two checks, with rates that it capped."""
    return [CheckReport.of(r, findings=(), alpha_applied=0.02, beta_applied=0.05) for r in reports()]


def test_the_region_beyond_the_own_alpha_is_what_was_measured_there():
    problem = linear_module(4, 0.1, inner_lr=0.05).meta_problem(quadratic_batch([0.3, 1.0, 2.0, 4.0]))
    report, border = measure(problem, beta=0.1), measure_border(problem, beta=0.1)
    assert [each.alpha for each in border] == pytest.approx([0.05 * 10 ** (k / 6) for k in range(1, 6)])
    eigenvalues = np.array([0.3, 1.0, 2.0, 4.0])
    for each in border:  # exact MAML on a quadratic (THEORY): 2 / max lambda (1 - alpha lambda)^2
        assert each.beta_c == pytest.approx(2 / (eigenvalues * (1 - each.alpha * eigenvalues) ** 2).max(), rel=1e-3)
        assert each.alpha < 2 / 4
    figure, ax = safe_region([report], border=border)
    curve = max(ax.lines, key=lambda line: line.get_linewidth())
    assert curve.get_xydata()[-2].tolist() == [border[-1].alpha, border[-1].beta_c] and curve.get_linestyle() == "-"
    (filled,) = [part for part in ax.collections if part.get_label() == "safe region, last check"]
    assert filled.get_paths()[0].get_extents().x1 == pytest.approx(border[-1].alpha)
    with pytest.raises(TypeError, match="Plain training has no inner rate"):
        measure_border(object(), beta=0.1)
    matplotlib.pyplot.close(figure)


def test_where_no_outer_rate_was_judged_the_inner_ones_are_drawn_alone():
    unjudged = [dataclasses.replace(each, beta_c=math.nan, safe_beta_c=math.nan) for each in reports()]
    figure, ax = safe_region(unjudged)
    said = [text.get_text() for text in ax.get_legend().get_texts()]
    assert r"$\alpha < \alpha_c$; $\beta$ is not judged" in said and not any("safe region" in each for each in said)
    assert max(line.get_xdata()[0] for line in ax.lines if len(line.get_xdata())) == pytest.approx(0.25)
    matplotlib.pyplot.close(figure)


def test_a_run_is_drawn_to_its_end_with_its_loss_and_what_happened():
    losses = LossCurve()
    for step in range(160):
        losses.end = step + 1
        losses.take(1e6 if 80 <= step < 90 else 2.0 - step / 100)
    losses.adapt(0, 3.0, 2.0), losses.adapt(100, 2.5, 1.0)
    events, back = [(0, "unsafe"), (0, "capped"), (90, "rolled back")], [(70, 90)]
    for width in (style.WIDE, style.NARROW):
        figure, (loss, states, ratios) = run_history(
            checks(), losses=losses, events=events, rolled_back=back, end=160, width=width
        )
        assert loss.get_title() == "Training loss" and loss.get_yscale() == "log"
        assert loss.get_xlim() == states.get_xlim() == (0, 160)
        bars = [path.get_extents() for part in states.collections for path in part.get_paths()]
        assert max(each.x1 for each in bars) == 160
        lines = {line.get_label(): line.get_xydata() for line in loss.lines}
        assert lines["after adaptation"][10].tolist() == [10.0, 1.9] and np.isnan(lines["after adaptation"][85, 1])
        assert lines["before adaptation"].tolist() == [[0.0, 3.0], [100.0, 2.5]]
        assert lines["beyond the picture"][:, 0].tolist() == list(range(80, 90))
        assert lines["rolled back"][:, 0].tolist() == [90] and {"unsafe", "capped"} <= set(lines)
        assert loss.get_ylim()[1] < 100
    alone, axes = run_history(checks())
    assert len(axes) == 2 and axes[0].get_xlim() == (0, 200)


def test_a_legend_covers_no_ritz_value():
    figure = style.new_figure(5.4, 3.4)
    _, ax = ritz_values(checks()[0], figure.subplots())
    figure.canvas.draw()
    assert ax.get_legend().get_window_extent().y1 < ax.get_window_extent().y0


def test_the_curve_passes_through_the_measured_beta_c_of_the_optimizer():
    module = linear_module(4, 0.1, inner_lr=0.05, order="simplified")
    batch = quadratic_batch([0.3, 1.0, 2.0, 4.0])
    report = measure(
        module.meta_problem(batch),
        optimizer=SGD(module.parameters(), lr=0.1, momentum=0.9),
        curvature=CurvatureOptions(criterion="simplified"),
    )
    figure, ax = safe_region([report])
    curve = ax.lines[-1].get_xydata()[:-1]
    nearest = min(curve, key=lambda point: abs(math.log(point[0] / 0.05)))
    assert nearest[1] == pytest.approx(report.beta_c, rel=0.02)
    matplotlib.pyplot.close(figure)


def test_it_draws_on_given_axes_and_through_the_guard():
    guard = ConvergenceGuard()
    guard._run.state.history = reports()
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
    assert len(ax.lines) == 3 and torch.isfinite(torch.tensor(ax.get_ylim())).all()
    matplotlib.pyplot.close(figure)


def diagram(**changes):
    from lightning_maml_guard import PhaseDiagram

    final = np.array([[0.1, 0.5, np.inf], [0.2, 2.0, np.inf], [0.3, 0.4, 2.0], [np.inf, np.inf, np.inf]])
    rates = np.array([0.2, 0.3, 0.9, 0.0])[None, :, None] * np.ones((2, 4, 3))
    values = {
        "alphas": np.array([0.01, 0.1, 1.0, 10.0]), "betas": np.array([0.1, 1.0, 10.0]), "losses": np.zeros((0, 4, 3)),
        "start": np.ones((4, 3)), "unadapted": np.ones((4, 3)), "final": final, "divergence_step": np.where(np.isinf(final), 3, -1),
        "measured_steps": np.array([0, 9]), "alpha_c": np.full((2, 4, 3), 2.0), "beta_c": rates,
        "exact_beta_c": 2 * rates, "order": "exact", "inner_steps": 1, "optimizer": "SGD()",
    }  # fmt: skip
    return PhaseDiagram(**{**values, **changes})


def test_the_heat_map_holds_every_cell_curve_and_mark():
    found = np.array([[0.01, 0.21], [0.1, 0.29]])
    figure, ax = phase_diagram(diagram(), found=found)
    cells = ax.collections[0].get_array()
    expected = np.array([[0.1, 0.2, 0.3, 9], [0.5, 9, 0.4, 9], [9, 9, 9, 9]])  # rows are outer rates
    assert np.array_equal(np.ma.filled(cells.reshape(3, 4), 9), expected)
    crosses = ax.collections[1].get_offsets()
    assert {tuple(point) for point in crosses.tolist()} == {(0.01, 10), (0.1, 10), (10, 0.1), (10, 1), (10, 10)}
    line, simplified, exact = (each.get_xydata() for each in ax.lines)
    assert (line[:, 0] == 2.0).all()
    assert simplified.tolist() == [[0.01, 0.2], [0.1, 0.3], [1.0, 0.9]]  # no outer rate is stable in the last column
    assert exact[:, 1] == pytest.approx(2 * simplified[:, 1])
    assert np.array_equal(ax.collections[2].get_offsets(), found)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["did not train", "diverged"] and len(labels) == 6
    matplotlib.pyplot.close(figure)


def test_the_heat_map_draws_where_nothing_trained_or_nothing_was_measured():
    figure, ax = matplotlib.pyplot.subplots()
    lost = diagram(final=np.full((4, 3), np.inf), alpha_c=np.full((2, 4, 3), np.nan), beta_c=np.full((2, 4, 3), np.nan))
    assert phase_diagram(lost, ax=ax) == (figure, ax) and len(ax.lines) == 1
    matplotlib.pyplot.close(figure)
    empty = np.zeros((0, 4, 3))
    figure, ax = phase_diagram(diagram(measured_steps=np.zeros(0), alpha_c=empty, beta_c=empty, exact_beta_c=empty))
    assert not ax.lines
    matplotlib.pyplot.close(figure)


def test_rates_without_a_place_on_log_axes_are_refused():
    with pytest.raises(ValueError, match=r"at least 2 `alphas` above 0 but got \[0.0, 0.1, 1.0, 10.0\]"):
        phase_diagram(diagram(alphas=np.array([0.0, 0.1, 1.0, 10.0])))


def test_the_spectrum_peaks_at_its_eigenvalues():
    from lightning_maml_guard.linalg.density import SpectralDensity

    density = SpectralDensity(np.array([0.0, 4.0, 5.0]), np.array([0.9, 0.05, 0.05]), 20)
    figure, ax = spectrum(density, alpha=0.25)
    x, y = ax.lines[0].get_data()
    assert x[y.argmax()] == pytest.approx(0.0, abs=0.02) and y[abs(x - 2).argmin()] == pytest.approx(min(y))
    assert ax.lines[1].get_xdata().tolist() == [0.0, 4.0, 5.0]
    assert list(ax.lines[2].get_xdata()) == [4.0, 4.0] and ax.lines[2].get_label() == r"$1/\alpha$ = 4"
    assert ax.get_yscale() == "log"
    matplotlib.pyplot.close(figure)
    figure, ax = spectrum(density, alpha=0.01)
    assert not len(ax.lines[2].get_xdata()) and "100, to the right" in ax.lines[2].get_label()
    matplotlib.pyplot.close(figure)
    figure, ax = matplotlib.pyplot.subplots()
    assert spectrum(SpectralDensity(np.ones(1), np.ones(1), 1), ax=ax) == (figure, ax)
    matplotlib.pyplot.close(figure)
