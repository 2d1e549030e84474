"""The update as configured: exact_beta_c, criterion="exact", task noise, the predicted step."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.optim import LBFGS, SGD, Adam, AdamW, NAdam, RMSprop

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    EpisodeBatch,
    LookaheadOptions,
    MetaLearningModule,
    MetaProblem,
    measure,
)
from lightning_maml_guard.linalg.krylov_basis import BASES
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.optim.linearized_step import linearized_step
from lightning_maml_guard.stability.beta_c import exact_limit
from lightning_maml_guard.stability.hvp import HESSIAN, META_UPDATE, MeasurementCache, Operators
from lightning_maml_guard.stability.krylov_stopping import Krylov
from lightning_maml_guard.stability.objective import MamlObjective
from lightning_maml_guard.tasks.regression import Sinusoid
from tests.helpers import dense_by_differences, fit, linear_module, quadratic_batch

SPECTRUM = [0.3, 1.0, 2.0, 4.0]
# THEORY.md, section 3: confirmed by bisection, alpha = .1.
TABLE = {
    ("first", 1): 0.8333,
    ("first", 2): 1.3889,
    ("first", 5): 3.0518,
    ("exact", 1): 1.3889,
    ("exact", 2): 2.4414,
    ("exact", 5): 5.7359,
    ("simplified", 1): 0.8333,
}


def quadratic(order, inner_steps=1, alpha=0.1):
    module = linear_module(4, 0.1, inner_lr=alpha, inner_steps=inner_steps, order=order)
    return module.meta_problem(quadratic_batch(SPECTRUM))


@pytest.mark.parametrize("order, inner_steps", TABLE)
def test_exact_beta_c_is_the_theorys(order, inner_steps):
    report = measure(quadratic(order, inner_steps), beta=0.1)
    assert report.exact_beta_c == pytest.approx(TABLE[order, inner_steps], abs=6e-5)
    low, high = report.exact_beta_c_interval
    assert low <= TABLE[order, inner_steps] * (1 + 1e-4) and TABLE[order, inner_steps] * (1 - 1e-4) <= high


def test_the_simplified_criterion_forbids_what_exact_maml_survives():
    """THEORY: alpha = .3 > alpha_c = .25 has no stable beta for simplified MAML; exact MAML's is 4.08."""
    simplified = measure(quadratic("exact", alpha=0.3), beta=1.0, curvature=CurvatureOptions(criterion="simplified"))
    assert simplified.status == "unsafe" and simplified.beta_c == 0 and simplified.alpha_c == pytest.approx(0.25)
    assert "criterion='exact' judges that update" in simplified.reasons[0]
    report = measure(quadratic("exact", alpha=0.3), beta=1.0)
    assert report.status == "safe" and report.alpha_c == pytest.approx(0.5)
    assert report.beta_c == report.exact_beta_c == pytest.approx(4.08, abs=5e-3)
    assert report.criterion == "exact"


def test_the_inner_loops_own_limit_is_judged_and_its_remedy_named():
    report = measure(quadratic("exact", alpha=0.6), beta=0.01)
    assert report.alpha_status == "unsafe"
    assert "alpha = 0.6 is 1.2x alpha_c = 0.5" in report.reasons[0]
    assert "the inner loop itself diverges" in report.reasons[0] and report.advice.alpha < 0.5
    at_safe = measure(quadratic("exact", alpha=0.5), beta=0.01).exact_beta_c
    # A meta rate that is safe beyond the inner rate's limit is safe below it, where nothing is measured then.
    assert report.safe_alpha == pytest.approx(0.5) and report.beta_status == "safe"
    assert report.safe_beta_c == report.beta_c < at_safe and report.safe_beta == report.beta == 0.01
    unsafe = measure(quadratic("exact", alpha=0.6), beta=0.4)
    assert unsafe.beta_status == "unsafe" and unsafe.safe_beta_c == pytest.approx(at_safe)
    assert unsafe.cost > report.cost + 2


def test_first_order_maml_turns_beyond_alpha_c():
    report = measure(quadratic("first", alpha=0.3), beta=0.01)
    assert report.alpha_c == pytest.approx(0.25) and report.alpha_status == report.beta_status == "unsafe"
    assert "turns against the sharpest direction" in report.reasons[0] and report.beta_c == 0
    assert measure(quadratic("first", 2, alpha=0.3), beta=0.01).status == "safe"


def test_single_tasks_that_turn_are_seen_through_a_mean_that_is_safe():
    """Task curvatures 2 and 18 at alpha = .075: the mean Hessian, 10, calls it safe; simplified MAML diverges."""
    x = torch.tensor([[[1.0]], [[3.0]]], dtype=torch.float64)  # curvatures 2 and 18
    batch = EpisodeBatch((x, torch.zeros(2, 1, 1).double()), (x, torch.zeros(2, 1, 1).double()))

    def problem(alpha):
        return linear_module(1, 0.1, inner_lr=alpha, order="simplified").meta_problem(batch)

    assert measure(problem(0.075), beta=1e-3, curvature=CurvatureOptions(criterion="simplified")).status == "safe"
    report = measure(problem(0.075), beta=1e-3)
    assert report.status == "unsafe" and report.beta_c == 0
    assert report.alpha_c == pytest.approx(1 / 18) and report.alpha_status == "unsafe"
    curvature = ((2 - 0.05 * 4) + (18 - 0.05 * 324)) / 2
    assert measure(problem(0.05), beta=1e-3).beta_c == pytest.approx(2 / curvature)


def sinusoid(order="exact", inner_steps=1, tasks=3, activation="tanh", **arguments):
    torch.manual_seed(0)
    network = mlp(1, (8,), 1, activation=activation).double()
    module = MetaLearningModule(network, order=order, inner_steps=inner_steps, inner_lr=0.05, **arguments)
    batch = Sinusoid().sample(tasks, torch.Generator().manual_seed(0))
    return module, EpisodeBatch(*[tuple(part.double() for part in pair) for pair in batch])


def dense_jacobian(problem):
    """Column by column, by central differences of the meta-gradient training uses."""
    names, shapes = list(problem.params), [p.shape for p in problem.params.values()]
    centre = torch.cat([p.detach().flatten() for p in problem.params.values()])

    def gradient(theta):
        pieces = theta.split([shape.numel() for shape in shapes])
        params = {n: piece.reshape(shape) for n, piece, shape in zip(names, pieces, shapes, strict=True)}
        moved = MetaProblem(
            params,
            problem.task_loss,
            problem.support,
            problem.query,
            problem.inner_lr,
            problem.inner_steps,
            problem.order,
        )
        return torch.cat([g.flatten() for g in meta_gradient(moved).gradients.values()])

    return dense_by_differences(gradient, centre)


def limit_of(eigenvalues):
    top = np.abs(eigenvalues).max()
    return min(2 * mu.real / abs(mu) ** 2 for mu in eigenvalues if mu.real > 0 and abs(mu) > 0.01 * top)


@pytest.mark.parametrize("order", ["exact", "first", "simplified"])
@pytest.mark.parametrize(
    "arguments", [{}, {"inner_steps": 3}, {"adapt": "2"}, {"learn_inner_lr": True}], ids=["K=1", "K=3", "head", "rates"]
)
def test_exact_beta_c_is_that_of_the_dense_jacobian(order, arguments):
    module, batch = sinusoid(order, **arguments)
    if module.learned_rates is not None:
        with torch.no_grad():
            for rate in module.learned_rates:
                rate.copy_(torch.rand_like(rate) * 0.1)
    elif order == "simplified":
        module.inner_lr /= module.inner_steps  # K*alpha beyond a task's limit has no stable rate: another test
    problem = module.meta_problem(batch)
    eigenvalues = np.linalg.eigvals(dense_jacobian(problem))
    report = measure(problem, beta=1e-3, curvature=CurvatureOptions(max_iter=60, tol=1e-4))
    assert report.exact_beta_c == pytest.approx(limit_of(eigenvalues), rel=1e-3)
    assert report.exact_beta_c_interval[0] <= limit_of(eigenvalues) * (1 + 1e-5)


@pytest.mark.parametrize("order", ["exact", "first"])
@pytest.mark.parametrize(
    "make",
    [
        Adam,
        lambda p, lr: Adam(p, lr=lr, amsgrad=True, weight_decay=0.2),
        NAdam,
        RMSprop,
        lambda p, lr: SGD(p, lr=lr, momentum=0.9, nesterov=True),
    ],
    ids=["adam", "amsgrad", "nadam", "rmsprop", "nesterov"],
)
def test_exact_beta_c_of_the_live_optimizer_is_that_of_the_dense_scaled_jacobian(order, make):
    from lightning_maml_guard.optim.stability_limits import preconditioner, responses

    module, batch = sinusoid(order)
    optimizer = make(module.theta().values(), lr=1e-3)
    for _ in range(200):
        for name, gradient in meta_gradient(module.meta_problem(batch)).gradients.items():
            module.theta()[name].grad = gradient
        optimizer.step()
    problem = module.meta_problem(batch)
    diagonal = torch.cat([preconditioner(optimizer)[p].flatten() for p in module.theta().values()]).detach().numpy()
    decay = optimizer.param_groups[0]["weight_decay"]
    scaled = (dense_jacobian(problem) + decay * np.eye(len(diagonal))) / diagonal[:, None]
    eigenvalues = np.linalg.eigvals(scaled)
    settled = responses(optimizer)[0]
    known = [complex(mu) for mu in eigenvalues if mu.real > 0 and abs(mu) > 0.01 * np.abs(eigenvalues).max()]
    # float rounding gives a symmetric Jacobian's eigenvalues imaginary parts that are none
    known = [complex(mu.real) if abs(mu.imag) < 1e-6 * abs(mu) else mu for mu in known]
    expected = min(settled.largest_rate(mu) for mu in known)
    report = measure(problem, optimizer=optimizer, curvature=CurvatureOptions(max_iter=80, tol=1e-4))
    assert report.beta_c == pytest.approx(expected, rel=2e-3)
    assert report.beta_ratio == pytest.approx(1e-3 / expected, rel=2e-3)


def test_before_its_first_step_adam_has_no_verdict_and_in_its_first_steps_no_premature_one():
    module, batch = sinusoid()
    optimizer = Adam(module.theta().values(), lr=1e-3)
    before = measure(module.meta_problem(batch), optimizer=optimizer)
    assert math.isnan(before.exact_beta_c) and before.beta_status == "unresolved"
    assert any("no second moment before its first step" in reason for reason in before.reasons)
    for _ in range(3):
        for name, gradient in meta_gradient(module.meta_problem(batch)).gradients.items():
            module.theta()[name].grad = gradient
        optimizer.step()
    report = measure(module.meta_problem(batch), optimizer=optimizer, curvature=CurvatureOptions(tol=1e-6, max_iter=60))
    low, high = report.beta_c_interval
    # 38 once the correction has settled, 38 * (1 - .9^4) at the coming step
    assert low / high == pytest.approx(1 - 0.9**4, rel=1e-3) and report.beta_c == pytest.approx(high, rel=1e-3)
    optimizer.param_groups[0]["lr"] = 0.6 * high
    between = measure(
        module.meta_problem(batch), optimizer=optimizer, curvature=CurvatureOptions(tol=1e-6, max_iter=60)
    )
    assert between.beta_status == "unresolved"


def test_a_negative_curvature_stays_out_of_the_formula():
    problem = MetaProblem(
        {"w": torch.zeros(2, dtype=torch.float64)},
        lambda p, x: (x * p["w"] ** 2).sum() / 2,
        torch.tensor([[2.0, -3.0]], dtype=torch.float64),
        torch.tensor([[2.0, -3.0]], dtype=torch.float64),
        inner_lr=0.1,
    )
    assert measure(problem, beta=0.1).exact_beta_c == pytest.approx(2 / (2 * 0.8**2))


def test_a_verdict_on_the_meta_rate_costs_few_products_and_the_interval_holds():
    generator, missed, early, middle, late = torch.Generator().manual_seed(0), 0, 0, 0, 0
    for index in range(40):
        size = (30, 300)[index % 2]
        # From an even spread to a few large ones: squares of x are the Hessian's eigenvalues, and J's at alpha = 0.
        x = torch.rand(size, generator=generator, dtype=torch.float64) ** (0.5 + index % 7)
        problem = MetaProblem({"w": torch.zeros(size, dtype=torch.float64)}, own_loss, x[None], x[None], inner_lr=1e-9)
        true = 2 / float(x.square().max())
        quick = measure(problem, beta=1e-3 * true)
        low, high = quick.exact_beta_c_interval
        missed += not low <= true <= high * (1 + 1e-6)
        assert quick.status == "safe" and low > 2e-3 * true and low <= quick.exact_beta_c <= high
        assert quick.exact_beta_c == pytest.approx(true, rel=1.0) and quick.exact_beta_c / low < 4.01
        unknown = measure(problem)  # without a rate there is nothing to judge
        for share in (0.75, 1.1):
            near = measure(problem, beta=share * true)
            low, high = near.exact_beta_c_interval
            missed += not low <= true <= high * (1 + 1e-6)
            assert near.beta_status == ("safe" if share < 1 else "unsafe") or low < share * true < high
            assert near.exact_beta_c == pytest.approx(unknown.exact_beta_c, rel=0.1) and high / low < 1.11
            assert quick.hvps <= near.hvps <= unknown.hvps
        early, middle, late = early + quick.hvps, middle + near.hvps, late + unknown.hvps
    assert missed <= 3 and early < 0.7 * late and middle < 0.9 * late


def test_the_hessians_run_ends_where_the_inner_rate_is_judged():
    x = torch.linspace(0.1, 1, 200, dtype=torch.float64) ** 4
    runs = {}
    for share in (0.01, 0.8, 1.3, 10.0):  # of the inner rate's limit
        params = {"w": torch.zeros(200, dtype=torch.float64)}
        report = measure(MetaProblem(params, own_loss, x[None], x[None], inner_lr=2 * share))
        low, high = report.alpha_c_interval
        assert low <= 2.0 <= high * (1 + 1e-6) and report.alpha_status == ("safe" if share < 1 else "unsafe")
        runs[share] = len(report.spectrum.runs[0].diagonal), high / low
    assert all(length <= runs[0.8][0] for length, _ in runs.values()) and runs[0.01][0] < runs[0.8][0]
    assert all(runs[near][1] <= 1.1 for near in (0.8, 1.3)) and all(runs[far][1] <= 1.5 for far in (0.01, 10.0))
    sharp = measure(
        MetaProblem(params, own_loss, x[None], x[None], inner_lr=0.02), curvature=CurvatureOptions(tol=9e-3)
    )
    assert len(sharp.spectrum.runs[0].diagonal) > runs[0.8][0]


def test_before_adams_first_step_no_product_with_the_update_is_taken():
    module, batch = sinusoid()
    optimizer, cache = Adam(module.theta().values(), lr=1e-3), MeasurementCache()
    report = measure(module.meta_problem(batch), optimizer=optimizer, cache=cache)
    assert report.beta_status == "unresolved" and math.isfinite(report.predicted_change)
    # One product is the self-check of the Hessian; the update's waits until it is needed.
    assert report.hvps == len(report.spectrum.runs[0].diagonal) + 1 and cache.facts.checked == {HESSIAN}


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=1e-3), lambda p: Adam(p, lr=1e-3)])
@pytest.mark.parametrize("basis", BASES)
def test_the_tasks_curvatures_come_with_the_products(make, basis):
    module, batch = sinusoid()
    optimizer = make(module.theta().values())
    for name, gradient in meta_gradient(module.meta_problem(batch)).gradients.items():
        module.theta()[name].grad = gradient
    optimizer.step()
    maml = MamlObjective(module.meta_problem(batch), "support", module.task_map)
    operators = Operators(maml, MeasurementCache(), per_task=False)
    jacobian, noise = operators.build(META_UPDATE, maml.update())
    step, like, value = linearized_step(optimizer, maml.live), jacobian.gradient[:1], ("the loss", jacobian.value)
    given = {"krylov": Krylov(basis=basis), "noise": noise, "value": value, "by_task": True}
    limit = exact_limit(jacobian, True, step, like, **given)
    expected = operators.by_task(step.unscaled(limit.direction))
    assert len(expected) > 1 and limit.by_task.numpy() == pytest.approx(expected.numpy(), rel=1e-3)


def own_loss(params, x):
    return (x * params["w"]).square().sum() / 2


def test_under_the_simplified_criterion_the_updates_own_jacobian_is_not_measured():
    problem = quadratic("exact", 2)
    full = measure(problem, beta=0.1)
    report = measure(problem, beta=0.1, curvature=CurvatureOptions(criterion="simplified"))
    unmeasured = (report.exact_beta_c, *report.exact_beta_c_interval, report.beta_c_noise, report.predicted_change)
    assert all(map(math.isnan, unmeasured)) and report.lambda_max == full.lambda_max
    # A product with it costs more than one with the Hessian, and so does its graph.
    assert report.hvps == len(report.spectrum.runs[0].diagonal) < full.hvps and report.cost < 0.5 * full.cost


def noisy(curvatures):
    x = torch.tensor(curvatures, dtype=torch.float64).div(2).sqrt().reshape(-1, 1, 1)
    batch = EpisodeBatch((x, torch.zeros_like(x)), (x, torch.zeros_like(x)))
    return linear_module(1, 0.1, inner_lr=0.0).meta_problem(batch)


def test_the_noise_limit_is_the_mean_square_one():
    curvatures = [1.0, 3.0, 0.5, 2.0]
    a, v = np.mean(curvatures), np.var(curvatures, ddof=1) / 4
    problem = noisy(curvatures)
    assert measure(problem, beta=0.1).beta_c_noise == pytest.approx(2 * a / (a**2 + v))
    momentum = SGD(problem.params.values(), lr=0.1, momentum=0.5)
    assert measure(problem, optimizer=momentum).beta_c_noise == pytest.approx(2 / (a / 1.5 + v / (a * 0.5)))
    assert measure(noisy([1.0] * 3), beta=0.1).beta_c_noise == pytest.approx(2.0)
    assert math.isnan(measure(noisy([1.0]), beta=0.1).beta_c_noise)


def test_the_worst_tasks_alpha_c_stands_beside_the_means():
    report = measure(noisy([2.0, 18.0]), beta=1e-3, curvature=CurvatureOptions(criterion="simplified", tasks="worst"))
    assert report.alpha_c == pytest.approx(1 / 18) and report.mean_alpha_c == pytest.approx(1 / 10)
    assert math.isnan(
        measure(noisy([2.0, 18.0]), beta=1e-3, curvature=CurvatureOptions(criterion="simplified")).mean_alpha_c
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
        lambda p: Adam(p, lr=1e-3),
        lambda p: AdamW(p, lr=1e-3),
        lambda p: RMSprop(p, lr=1e-3),
        lambda p: torch.optim.Adamax(p, lr=1e-3),  # no limit is known for it, but its step is
    ],
)
@pytest.mark.parametrize("taken", [0, 5])
def test_the_predicted_change_is_the_real_one_to_second_order(make, taken):
    module, batch = sinusoid()
    optimizer = make(module.theta().values())

    def gradients():
        found = meta_gradient(module.meta_problem(batch))
        for name, gradient in found.gradients.items():
            module.theta()[name].grad = gradient
        return float(found.losses.mean())

    for _ in range(taken):
        gradients()
        optimizer.step()
    before, state = gradients(), deepcopy(optimizer.state_dict())
    predicted = measure(module.meta_problem(batch), optimizer=optimizer).predicted_change
    assert str(optimizer.state_dict()) == str(state), "the live optimizer was touched"
    optimizer.step()
    assert predicted == pytest.approx(gradients() - before, rel=2e-2)


def test_an_optimizer_that_needs_a_closure_has_no_predicted_change():
    module, batch = sinusoid()
    report = measure(
        module.meta_problem(batch),
        optimizer=LBFGS(module.theta().values(), lr=0.1),
        curvature=CurvatureOptions(criterion="simplified"),
    )
    assert math.isnan(report.predicted_change) and any("LBFGS is not known" in notice for notice in report.notices)


def test_the_guard_logs_what_it_found_and_acts_on_the_exact_criterion():
    # Without trials of rates the cap is at the limit itself.
    guard = ConvergenceGuard(every_n_steps=1, action="rescale", margin=0.9, lookahead=LookaheadOptions(steps=0))
    module = linear_module(4, 3.0, inner_lr=0.1)
    with pytest.warns(Warning, match="beta = 3 is 2.2x beta_c = 1.39"):
        trainer = fit(module, quadratic_batch(SPECTRUM, target=1.0), 40, [guard])
    names = {"guard/exact_beta_c", "guard/predicted_change"}
    assert names <= set(trainer.callback_metrics)
    assert guard.history[-1].beta_applied == pytest.approx(0.9 * 2 / 1.44, rel=1e-6)
    assert float(trainer.callback_metrics["train/loss"]) < 2.0
