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
from lightning_maml_guard.plots import (
    near_minimum,
    phase_diagram,
    ritz_values,
    run_history,
    safe_region,
    spectrum,
    start_and_end,
    style,
)
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
    assert [each.alpha for each in border] == pytest.approx([0.05 * 10 ** (k / 6) for k in range(1, 7)])
    eigenvalues = np.array([0.3, 1.0, 2.0, 4.0])
    # Exact MAML on a quadratic, up to its inner loop's own limit: 2 / max lambda (1 - alpha lambda)^2. What is far from
    # the rate is measured less closely.
    for each in border:
        limit = 2 / (eigenvalues * (1 - each.alpha * eigenvalues) ** 2).max()
        low, high = each.beta_c_interval
        assert low * (1 - 1e-6) <= limit <= high * (1 + 1e-6) and each.beta_c == pytest.approx(limit, rel=0.05)
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
        losses.add(1e6 if 80 <= step < 90 else 2.0 - step / 100)
    losses.note_adaptation(0, 3.0, 2.0), losses.note_adaptation(100, 2.5, 1.0)
    events, back = [(0, "unsafe"), (0, "capped"), (90, "rolled back")], [(70, 90)]
    for width in (style.WIDE, style.NARROW):
        figure, (loss, states, ratios) = run_history(
            checks(), losses=losses, events=events, rolled_back=back, end=160, width=width
        )
        assert loss.get_title() == "Training loss" and loss.get_yscale() == "log"
        assert loss.get_xlim() == states.get_xlim() == pytest.approx((-0.012 * 160, 1.012 * 160))
        bars = [path.get_extents() for part in states.collections for path in part.get_paths()]
        assert max(each.x1 for each in bars) == 160
        lines = {line.get_label(): line.get_xydata() for line in loss.lines}
        assert lines["after adaptation"][10].tolist() == [10.0, 1.9] and np.isnan(lines["after adaptation"][85, 1])
        assert lines["before adaptation"].tolist() == [[0.0, 3.0], [100.0, 2.5]]
        assert lines["beyond the picture"][:, 0].tolist() == list(range(80, 90))
        assert lines["rolled back"][:, 0].tolist() == [90] and {"unsafe", "capped"} <= set(lines)
        assert loss.get_ylim()[1] < 100
    alone, axes = run_history(checks())
    assert len(axes) == 2 and axes[0].get_xlim() == pytest.approx((-0.012 * 200, 1.012 * 200))


@pytest.mark.parametrize("width", [style.WIDE, style.NARROW])
def test_of_a_single_step_every_value_is_inside_its_axes_and_the_ticks_differ(width):
    losses = LossCurve(end=1)
    losses.add(3.52)
    losses.note_adaptation(0, 3.53, 3.52)
    figure, axes = run_history(checks()[:1], losses=losses, end=1, width=width)
    figure.canvas.draw()
    (loss, *_), (ratios,) = axes, [ax for ax in axes if "Rates" in ax.get_title()]
    for ax, label in ((loss, "after adaptation"), (loss, "before adaptation"), (ratios, r"$\alpha/\alpha_c$")):
        (line,) = [each for each in ax.lines if each.get_label() == label]
        at = ax.transData.transform(line.get_xydata()[0])
        assert line.get_marker() not in ("", "None") and ax.bbox.padded(-2).contains(*at)
    ticks = [text.get_text() for text in loss.get_yticklabels() if text.get_text()]
    assert len(set(ticks)) == len(ticks) > 1
    assert all(float(tick).is_integer() for tick in axes[-1].get_xticks())


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
    line, simplified, exact, curve, largest_alpha = (each.get_xydata() for each in ax.lines)
    assert (line[:, 0] == 2.0).all() and (largest_alpha[:, 0] == 1.0).all()
    assert curve.tolist() == [[0.01, 1.0], [0.1, 0.1], [1.0, 1.0]]
    assert simplified.tolist() == [[0.01, 0.2], [0.1, 0.3], [1.0, 0.9]]  # no outer rate is stable in the last column
    assert exact[:, 1] == pytest.approx(2 * simplified[:, 1])
    assert np.array_equal(ax.collections[2].get_offsets(), found)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    said = ["did not train: error above 0.9 of the start's", "diverged: loss over 5 times the start's, or not finite"]
    assert labels[:2] == said and len(labels) == 8
    matplotlib.pyplot.close(figure)


def test_the_heat_map_draws_where_nothing_trained_or_nothing_was_measured():
    figure, ax = matplotlib.pyplot.subplots()
    lost = diagram(final=np.full((4, 3), np.inf), alpha_c=np.full((2, 4, 3), np.nan), beta_c=np.full((2, 4, 3), np.nan))
    assert phase_diagram(lost, ax=ax) == (figure, ax) and len(ax.lines) == 1  # exact_beta_c
    matplotlib.pyplot.close(figure)
    empty = np.zeros((0, 4, 3))
    unmeasured = {"alpha_c": empty, "beta_c": empty, "exact_beta_c": empty, "measured_steps": np.zeros(0)}
    figure, ax = phase_diagram(diagram(final=np.full((4, 3), np.inf), **unmeasured))
    assert not ax.lines
    matplotlib.pyplot.close(figure)


def test_an_inner_rate_of_0_is_a_dashed_line_and_other_seeds_are_thin():
    zero, chance = diagram(alphas=np.array([0.0, 0.1, 1.0, 10.0]), chance=0.4), diagram(final=np.full((4, 3), 0.1))
    figure, ax = phase_diagram(zero, others=[chance], critical_rates=False)
    others, curve, largest_alpha, without = ax.lines
    assert others.get_xydata()[:, 1].tolist() == [10] * 4 and others.get_linewidth() < curve.get_linewidth()
    assert curve.get_xydata().tolist() == [[0.1, 0.1], [1.0, 0.1]] and largest_alpha.get_xdata()[0] == 1.0
    assert without.get_ydata().tolist() == [1.0] * 2 and without.get_linestyle() == "--"
    assert figure.legends[0].get_texts()[0].get_text() == "did not train: error above 0.9 of the start's or of chance"
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize(("axis", "shown"), [("alphas", "0.1"), ("betas", "0.0, 1.0, 2.0")])
def test_rates_without_a_place_on_log_axes_are_refused(axis, shown):
    rates = {"alphas": np.array([0.0, 0.1]), "betas": np.array([0.0, 1.0, 2.0])}[axis]
    shape = (2, 3) if axis == "alphas" else (4, 3)
    cells = {name: np.ones(shape) for name in ("start", "unadapted", "final", "divergence_step")}
    with pytest.raises(ValueError, match=rf"at least 2 `{axis}` above 0 but got \[{shown}\]"):
        phase_diagram(diagram(**{axis: rates}, **cells))


def test_start_and_end_hold_the_best_runs():
    rates = np.stack([np.full((4, 3), 0.5), np.arange(1.0, 13.0).reshape(4, 3)])
    figure, (upper, lower) = start_and_end(diagram(alpha_c=rates, exact_beta_c=rates, inner_steps=2))
    start, end, limit = upper.lines
    assert start.get_xydata().tolist() == [[0.01, 0.01], [0.1, 0.1], [1.0, 1.0], [10.0, 10.0]]
    expected = [0.01 / (2 * 1), 0.1 / (2 * 4), 1.0 / (2 * 7)]  # the best run's is the first of each row
    assert end.get_ydata() == pytest.approx(expected) and limit.get_ydata()[0] == 2
    assert lower.lines[1].get_ydata().tolist() == [1, 4, 7] and lower.lines[2].get_ydata().tolist() == [0.1] * 3
    matplotlib.pyplot.close(figure)
    with pytest.raises(ValueError, match=r"measured at steps \[0\]\. Leave phase_diagram's `measure_every` at None"):
        start_and_end(diagram(measured_steps=np.array([0])))


def test_near_a_minimum_theory_is_drawn_beside_what_was_found():
    from lightning_maml_guard import critical_rates

    rates = np.linspace(0, 0.5, 401)
    curve = np.stack([rates, [critical_rates([1.0, 2.0, 4.0], alpha).beta_c for alpha in rates]])
    case = diagram(alphas=np.array([0.0, 0.1, 0.25, 0.5]), order="simplified")
    figure, axes = near_minimum([("one", case, 4.0, curve), ("two", case, 4.0, curve)])
    theory, found = axes[0, 0].lines
    assert theory.get_xdata()[-1] == pytest.approx(1, abs=0.01)  # no outer rate is stable beyond alpha_c
    assert theory.get_ydata()[0] == pytest.approx(1) and theory.get_ydata().max() == pytest.approx(4, rel=0.01)
    assert found.get_xdata().tolist() == [0, 0.4, 1, 2]
    assert found.get_ydata()[:3] == pytest.approx([2, 0.2, 2]) and axes[0, 1].get_title() == "two"
    matplotlib.pyplot.close(figure)


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
