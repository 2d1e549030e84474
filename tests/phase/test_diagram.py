"""The vmapped grid is the Trainer's runs, point by point; and what it measures on the way is what measure() finds."""

import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_maml_guard import CurvatureOptions, MetaLearningModule, MetaProblem, PhaseDiagram, measure, phase_diagram
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.phase import train as training
from lightning_maml_guard.phase.critical_rates import grid_rates
from lightning_maml_guard.phase.gradients import GridError
from lightning_maml_guard.phase.optimizers import SGD, Adam
from tests.helpers import dense_hessian, linear_module, quadratic_batch
from tests.phase.families import KINDS, error, family, module, trained

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 8


def quiet(*args, **arguments) -> PhaseDiagram:
    return phase_diagram(*args, **{"progress": False, "measure_every": 0, **arguments})


def axes(points):
    return sorted({a for a, _ in points}), sorted({b for _, b in points})


@pytest.mark.parametrize(
    ("name", "optimizer", "grid_optimizer"),
    [
        ("linear", "sgd", "sgd"),
        ("linear", "nesterov", SGD(momentum=0.8, nesterov=True)),
        ("sinusoid", "sgd", "sgd"),
        ("sinusoid", "momentum", SGD(momentum=0.8)),
        ("sinusoid", "adam", "adam"),
        ("first", "sgd", "sgd"),
        ("conv4", "sgd", "sgd"),
        ("conv4", "adam", Adam()),
    ],
)
def test_the_grid_is_separate_trainer_runs(name, optimizer, grid_optimizer):
    kind = KINDS[name]
    alphas, betas = axes(kind.points)
    found = quiet(family(kind), alphas, betas, STEPS, optimizer=grid_optimizer)
    for alpha, beta in kind.points:
        run = trained(kind, alpha, beta, STEPS, optimizer)
        expected = error(run, kind.batch(0))
        assert np.isfinite(expected)
        got = found.final[alphas.index(alpha), betas.index(beta)]
        assert got == pytest.approx(expected, rel=1e-6)
        assert found.start[alphas.index(alpha), 0] == pytest.approx(error(module(kind, alpha), kind.batch(0)), rel=1e-6)
        assert expected != pytest.approx(found.start[alphas.index(alpha), 0], rel=1e-3)  # it has moved


def test_chunks_do_not_change_a_run():
    kind = KINDS["sinusoid"]
    whole = quiet(family(kind), [0.01, 0.1], [0.01, 0.02, 0.04], 5)
    parts = quiet(family(kind), [0.01, 0.1], [0.01, 0.02, 0.04], 5, chunk_size=4)
    assert whole.losses.shape == (5, 2, 3)
    assert np.allclose(whole.losses, parts.losses, rtol=1e-12) and np.allclose(whole.final, parts.final, rtol=1e-12)


def test_memory_sets_the_chunks(monkeypatch):
    sizes = []
    real = training.grid_gradient

    def count(problem, params, alphas):
        sizes.append(len(alphas))
        return real(problem, params, alphas)

    monkeypatch.setattr(training, "grid_gradient", count)
    kind = KINDS["linear"]
    quiet(family(kind), [0.01, 0.1], [0.01, 0.02, 0.04], 1)
    quiet(family(kind), [0.01, 0.1], [0.01, 0.02, 0.04], 1, memory=1.0)
    assert sizes == [6] + [1] * 6


def test_a_run_that_blows_up_leaves_the_others_alone():
    batch = quadratic_batch([0.5, 1.0, 2.0], target=1.0)
    problem = linear_module(3, 0.1, inner_lr=0.1, order="simplified").meta_problem(batch)
    found = quiet(problem, [0.1], [0.1, 0.5, 50.0], 200)
    alone = quiet(problem, [0.1], [0.5], 200)
    assert found.final[0, 1] == pytest.approx(alone.final[0, 0], rel=1e-12)
    assert np.isinf(found.final[0, 2]) and np.isnan(found.losses[-1, 0, 2])
    assert found.divergence_step.tolist() == [[-1, -1, 1]]
    assert found.trained.tolist() == [[True, True, False]] and found.diverged.tolist() == [[False, False, True]]
    assert found.largest_beta.tolist() == [0.5]


def test_only_the_named_parameters_are_adapted():
    kind = KINDS["sinusoid"]
    anil = MetaLearningModule(module(kind).network, inner_lr=0.05, adapt="4")
    problem = anil.meta_problem(kind.batch(0))
    assert set(problem.inner_lr) == {"4.weight", "4.bias"}
    found = quiet(problem, [0.05, 0.2], [0.1], 1)
    whole = quiet(module(kind).meta_problem(kind.batch(0)), [0.05], [0.1], 1)
    assert found.losses[0, 0, 0] == pytest.approx(float(meta_gradient(problem).losses.mean()), rel=1e-12)
    assert abs(found.start[0, 0] / whole.start[0, 0] - 1) > 1e-3


@pytest.fixture(scope="module")
def measured():
    """The first two runs of a column and those of another, measured on the way."""
    kind = KINDS["sinusoid"]
    grid = {"measure_every": 4, "max_iter": 60, "tol": 1e-4}
    return {
        optimizer: quiet(family(kind), [0.02, 0.08], [0.01, 0.03], 8, optimizer=optimizer, **grid)
        for optimizer in ("sgd", "adam")
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_rates_measured_on_the_way_are_those_of_measure(measured, optimizer):
    """measure() on the Trainer's own run at the same step: other operators, other code around Lanczos."""
    kind, found = KINDS["sinusoid"], measured[optimizer]
    assert found.measured_steps.tolist() == [0, 4, 8]
    for alpha, beta, column, row in ((0.02, 0.03, 0, 1), (0.08, 0.01, 1, 0)):
        run = trained(kind, alpha, beta, 4, optimizer)
        live = run.trainer.optimizers[0]
        options = CurvatureOptions(criterion="simplified", max_iter=60, tol=1e-4)
        report = measure(run.meta_problem(kind.batch(4)), optimizer=live, curvature=options)
        assert found.alpha_c[1, column, row] == pytest.approx(report.alpha_c, rel=1e-4)
        exact = replace(options, criterion="exact")
        exact_beta_c = measure(run.meta_problem(kind.batch(4)), optimizer=live, curvature=exact).exact_beta_c
        assert found.exact_beta_c[1, column, row] == pytest.approx(exact_beta_c, rel=1e-3)
        assert found.beta_c[1, column, row] == pytest.approx(report.beta_c, rel=1e-3)
    adam = optimizer == "adam"
    assert np.isnan(found.beta_c[0]).all() == np.isnan(found.exact_beta_c[0]).all() == adam


def test_rates_before_training_are_those_of_the_dense_hessian(measured):
    kind, found = KINDS["sinusoid"], measured["sgd"]
    one = module(kind)
    xs, ys = kind.batch(0).support
    hessian = dense_hessian(
        lambda params: sum(one.task_loss(params, pair) for pair in zip(xs, ys, strict=True)) / len(xs), one.theta()
    )
    values = np.linalg.eigvalsh(hessian)
    assert found.at_start("alpha_c") == pytest.approx([1 / values[-1]] * 2, rel=1e-4)
    expected = [2 / max(v - a * v * v for v in values) for a in (0.02, 0.08)]
    assert found.at_start("beta_c") == pytest.approx(expected, rel=1e-3)
    assert np.isnan(found.smallest_along("beta_c")).all()  # none has trained yet
    all_trained = replace(found, final=np.zeros((2, 2)))
    assert all_trained.smallest_along("beta_c").tolist() == found.beta_c.min((0, 2)).tolist()


def test_first_order_maml_is_measured_by_arnoldi():
    kind = KINDS["first"]
    found = quiet(family(kind), [0.01], [0.01], 2, measure_every=1, max_iter=60, tol=1e-4)
    run = trained(kind, 0.01, 0.01, 1)
    report = measure(
        run.meta_problem(kind.batch(1)),
        optimizer=run.trainer.optimizers[0],
        curvature=CurvatureOptions(max_iter=60, tol=1e-4),
    )
    assert found.exact_beta_c[1, 0, 0] == pytest.approx(report.exact_beta_c, rel=1e-3)


def test_a_run_without_finite_curvature_is_nan_and_the_others_are_measured():
    batch = quadratic_batch([0.5, 1.0, 2.0], target=1.0)
    problem = linear_module(3, 0.1, inner_lr=0.1, order="simplified").meta_problem(batch)
    found = quiet(problem, [0.1], [0.5, 1e200], 4, measure_every=2, max_iter=3)
    assert found.alpha_c[:, 0, 0] == pytest.approx([0.5] * 3) and found.exact_beta_c[1, 0, 0] == pytest.approx(2 / 1.6)
    assert np.isnan(found.beta_c[-1, 0, 1])


def test_curvature_that_overflows_is_nan_too():
    """In float32 a product of 1e30 is finite and its norm is not."""
    data = torch.ones(1, 2)
    problem = MetaProblem(
        {"w": torch.ones(2)}, lambda p, d: ((p["w"] * d) ** 4).sum(), data, data, order="simplified", inner_lr=0.1
    )
    params = {"w": torch.tensor([[1.0, 1.0], [1e15, 1e15]])}
    found = grid_rates(problem, params, torch.tensor([0.01, 0.01]), SGD(), {}, 1)
    assert found.alpha_c[0] == pytest.approx(1 / 12) and np.isnan(found.alpha_c[1]) and np.isnan(found.exact_beta_c[1])


def test_trained_is_below_the_start_with_and_without_adaptation():
    found = hand_made([[0.89, 0.91, 0.5]], [1.0])
    assert found.trained.tolist() == [[True, False, True]]
    assert replace(found, start=np.full((1, 3), 0.6)).trained.tolist() == [[False, False, True]]
    assert replace(found, unadapted=np.full((1, 3), 0.4)).trained.tolist() == [[False] * 3]
    assert replace(found, chance=0.9).trained.tolist() == [[False, False, True]]
    kind = KINDS["sinusoid"]
    grid = quiet(family(kind), [0.1], [0.01], 1, chance=0.9, divergence=3.0)
    assert (grid.chance, grid.divergence) == (0.9, 3.0)
    one = module(kind, 0.0)
    assert grid.unadapted[0, 0] == pytest.approx(error(one, kind.batch(0)), rel=1e-12) != grid.start[0, 0]


def test_it_goes_on_where_it_was_broken_off(tmp_path, monkeypatch):
    kind = KINDS["sinusoid"]
    call = {"measure_every": 3, "max_iter": 5, "chunk_size": 2, "optimizer": "adam"}
    whole = quiet(family(kind), [0.01, 0.1], [0.01, 0.03], 9, **call)
    monkeypatch.setattr(training, "_SAVE_SECONDS", 0.0)
    problems = family(kind)
    seen = []

    def failing(step):
        seen.append(step)
        if len(seen) == 18:  # in the middle of the second chunk
            raise KeyboardInterrupt
        return problems(step)

    with pytest.raises(KeyboardInterrupt):
        quiet(failing, [0.01, 0.1], [0.01, 0.03], 9, partial=tmp_path / "kept", **call)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["chunk_00000.pt", "chunk_00001.pt"]
    seen.clear()
    resumed = quiet(
        lambda step: seen.append(step) or problems(step),
        [0.01, 0.1],
        [0.01, 0.03],
        9,
        partial=tmp_path / "kept",
        **call,
    )
    assert 1 not in seen[1:] and len(seen) < 9  # the first chunk is not trained again, the second not from its start
    for name in ("losses", "final", "alpha_c", "beta_c", "exact_beta_c"):
        assert np.array_equal(getattr(resumed, name), getattr(whole, name), equal_nan=True), name
    with pytest.raises(ValueError, match=r"chunk_00000\.pt is of another grid .*Name another folder"):
        quiet(problems, [0.01, 0.1], [0.01, 0.04], 9, partial=tmp_path / "kept", **call)


def test_a_diagram_is_saved_and_loaded(tmp_path, measured):
    measured["sgd"].save(tmp_path / "grid.npz")
    again = PhaseDiagram.load(tmp_path / "grid.npz")
    for name, value in vars(measured["sgd"]).items():
        assert (
            np.array_equal(getattr(again, name), value, equal_nan=True)
            if isinstance(value, np.ndarray)
            else getattr(again, name) == value
        )
    assert [p.name for p in tmp_path.iterdir()] == ["grid.npz"]
    with np.load(tmp_path / "grid.npz") as new:
        np.savez(tmp_path / "old.npz", **{name: new[name] for name in new if name not in ("chance", "divergence")})
    assert PhaseDiagram.load(tmp_path / "old.npz").chance == np.inf
    np.savez(tmp_path / "other.npz", alphas=np.zeros(1))
    with pytest.raises(ValueError, match=r"other\.npz is no phase diagram: it lacks \['betas'"):
        PhaseDiagram.load(tmp_path / "other.npz")
    np.save(tmp_path / "one.npy", np.zeros(1))
    with pytest.raises(ValueError, match=r"one\.npy is no phase diagram but one array\. Write one with"):
        PhaseDiagram.load(tmp_path / "one.npy")


def hand_made(final, beta_c):
    final = np.array(final)
    shape = final.shape
    rates = np.array(beta_c)[None, :, None] * np.ones((1, *shape))
    return PhaseDiagram(
        alphas=np.arange(1.0, shape[0] + 1), betas=np.array([1.0, 10.0, 100.0]), losses=np.zeros((0, *shape)),
        start=np.ones(shape), unadapted=np.ones(shape), final=final, divergence_step=np.where(final < 1, -1, 0), measured_steps=np.array([0]),
        alpha_c=rates, beta_c=rates, exact_beta_c=rates, order="exact", inner_steps=1, optimizer="SGD()",
    )  # fmt: skip


def test_what_follows_from_a_diagram_by_hand():
    found = hand_made([[0.5, 2, np.inf], [0.5, 2, 2], [0.5, 0.5, 2], [0.5, 2, 0.5], [2, 2, 2]], [1, 2, 3, 4, np.nan])
    assert found.largest_beta == pytest.approx([1, 1, 10, 100, np.nan], nan_ok=True)
    assert found.correlation("beta_c") == pytest.approx(stats.spearmanr([1, 2, 3, 4], [1, 1, 10, 100])[0])
    assert found.contiguous_beta == pytest.approx([1, 1, 10, 1, np.nan], nan_ok=True)
    assert found.gain() == pytest.approx((2, 4, 2, 1, 4))
    assert np.isnan(found.gain(0.4)).all()
    humped = hand_made([[2, 2, 2], [2, 0.5, 2], [2, 2, 0.4], [2, 2, 0.3], [0.5, 2, 2]], [1, 2, 3, 4, 5])
    assert humped.gain() == pytest.approx((1, 3, -1, 2, 5)) and np.isnan(humped.gain(0.4)).all()
    assert humped.best_beta == pytest.approx([np.nan, 10, 100, 100, 1], nan_ok=True)
    falling = hand_made([[2, 2, 0.5], [2, 0.5, 2], [0.5, 2, 2]], [1, 2, 3])
    assert falling.gain() == pytest.approx((0, 1, -2, 1, 3)) and falling.correlation("beta_c") == -1.0


def test_an_inner_rate_of_0_is_the_reference_and_no_part_of_the_growth():
    found = hand_made([[0.5, 2, 2], [2, 0.5, 2], [2, 2, 0.5], [2, 2, 0.5]], [1] * 4)
    found = replace(found, alphas=np.array([0.0, 1.0, 2.0, 3.0]))
    assert found.gain().peak == pytest.approx(1) and found.gain().smallest_alpha == 1
    assert found.beta_without_adaptation == 1.0  # the others of its column diverged
    assert np.isnan(replace(found, divergence_step=np.full((4, 3), -1)).beta_without_adaptation)
    assert np.isnan(replace(found, alphas=np.arange(1.0, 5.0)).beta_without_adaptation)


def test_the_end_is_that_of_the_best_run():
    found = hand_made([[0.5, 0.4, 2], [2, 2, 2], [0.3, 2, 0.2]], [1] * 3)
    rates = np.stack([np.zeros((3, 3)), np.arange(9.0).reshape(3, 3)])
    found = replace(found, measured_steps=np.array([0, 5]), exact_beta_c=rates)
    assert found.at_end_of_best("exact_beta_c") == pytest.approx([1, np.nan, 8], nan_ok=True)
    unmeasured = replace(found, exact_beta_c=np.zeros((0, 3, 3)))
    assert np.isnan(unmeasured.at_end_of_best("exact_beta_c")).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_correlation_is_scipys_spearman(seed):
    draw = np.random.default_rng(seed)
    predicted, largest = draw.integers(0, 6, 12), draw.integers(0, 3, 12)
    found = hand_made(np.where(np.arange(3) == largest[:, None], 0.5, 2.0), predicted)
    assert found.correlation("beta_c") == pytest.approx(stats.spearmanr(predicted, largest)[0])


def test_the_correlation_is_nan_when_there_is_nothing_to_correlate():
    rising = [[0.5, 2, 2], [2, 0.5, 2], [2, 2, 0.5]]
    assert np.isnan(hand_made(rising[:2], [1, 2]).correlation("beta_c"))
    assert np.isnan(hand_made(rising, [1, 1, 1]).correlation("beta_c"))
    assert np.isnan(hand_made([[0.5, 2, 2]] * 3, [1, 2, 3]).correlation("beta_c"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alphas": [0.2, 0.1]}, r"`alphas` to hold at least one rate, strictly ascending, but got \[0.2, 0.1\]"),
        ({"betas": []}, "`betas` to hold at least one rate"),
        ({"betas": [-1.0]}, "`betas` to be a finite number of at least 0 but got -1.0"),
        ({"steps": 0}, "`steps` to be an integer of at least 1"),
        ({"optimizer": "lion"}, r"`optimizer` to be one of \['adam', 'sgd'\] or a MetaOptimizer .* but got 'lion'"),
        ({"chunk_size": 0}, "`chunk_size` to be an integer of at least 1"),
        ({"measure_every": -1}, "`measure_every` to be an integer of at least 0"),
        ({"tol": 0.0}, "`tol` to be a finite number above 0"),
        ({"chance": 0.0}, "`chance` to be a finite number above 0"),
        ({"memory": -1.0}, "`memory` to be a finite number above 0"),
    ],
)
def test_what_is_not_allowed_is_said(arguments, message):
    kind = KINDS["linear"]
    with pytest.raises(ValueError, match=message):
        quiet(family(kind), **{"alphas": [0.1], "betas": [0.1], "steps": 1, **arguments})


def test_families_that_give_no_problem_are_named():
    with pytest.raises(TypeError, match="`problem_family` to be a MetaProblem or a function .* but got int"):
        quiet(3, [0.1], [0.1], 1)
    with pytest.raises(TypeError, match="to return a MetaProblem but got NoneType for step 0"):
        quiet(lambda step: None, [0.1], [0.1], 1)


def test_a_loss_that_does_not_vmap_is_explained():
    def task_loss(params, data):
        loss = ((data * params["w"]) ** 2).sum()
        return loss if loss.item() > 0 else 0 * loss

    data = torch.ones(2, 3)
    with pytest.raises(GridError, match=r"cannot be vmapped over the runs of a grid: write it without .*item\(\)"):
        quiet(MetaProblem({"w": torch.ones(1)}, task_loss, data, data), [0.1], [0.1], 1)


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"momentum": -0.1}, {"nesterov": True}])
def test_sgd_refuses(wrong):
    with pytest.raises(ValueError, match="momentum"):
        SGD(**wrong)


@pytest.mark.parametrize("wrong", [{"beta1": 1.0}, {"beta2": -0.1}, {"eps": -1.0}])
def test_adam_refuses(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` to be at least 0"):
        Adam(**wrong)


def test_the_name_is_the_function_even_after_the_module_was_imported_and_lightning_is_not_needed():
    program = (
        "import sys, torch, lightning_maml_guard.phase.diagram\n"
        "from lightning_maml_guard import MetaProblem, phase_diagram, PhaseDiagram\n"
        "x = torch.ones(1, 2)\n"
        "loss = lambda p, d: ((p['w'] * d) ** 2).sum()\n"
        "found = phase_diagram(MetaProblem({'w': torch.ones(2)}, loss, x, x), [0.1], [0.1], 1, progress=False)\n"
        "assert isinstance(found, PhaseDiagram)\n"
        "assert not any(name.split('.')[0] in ('lightning', 'pytorch_lightning') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    from lightning_maml_guard import phase_diagram as function

    assert function is phase_diagram and isinstance(phase_diagram, types.FunctionType)
