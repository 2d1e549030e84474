import math
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW

from lightning_maml_guard import (
    CurvatureOptions,
    EpisodeBatch,
    MetaLearningModule,
    MetaProblem,
    critical_rates,
    measure,
)
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid
from tests.helpers import dense_hessian, fit, grouped_measure, linear_module, quadratic_batch, support_loss

SPECTRUM = [0.3, 1.0, 2.0, 4.0]


def sinusoid_problem(seed=0, tasks=4, **arguments):
    module = MetaLearningModule(mlp(1, (12,), 1, activation="tanh").double(), **arguments)
    batch = Sinusoid().sample(tasks, torch.Generator().manual_seed(seed))
    batch = EpisodeBatch(*[tuple(part.double() for part in pair) for pair in batch])
    return module, batch, module.meta_problem(batch)


def dense_spectrum(module, batch):
    return np.linalg.eigvalsh(dense_hessian(support_loss(module, batch), module.theta()))


@pytest.mark.parametrize("alpha_fraction", [0.1, 0.5, 0.9, 0.99])
def test_a_quadratics_limits_are_the_closed_forms(alpha_fraction):
    alpha = alpha_fraction / 4
    module = linear_module(4, 0.1, inner_lr=alpha, order="simplified")
    report = measure(
        module.meta_problem(quadratic_batch(SPECTRUM)), beta=0.1, curvature=CurvatureOptions(criterion="simplified")
    )
    expected = critical_rates(SPECTRUM, alpha)
    assert report.lambda_max == pytest.approx(4.0, rel=1e-9)
    assert report.alpha_c == pytest.approx(expected.alpha_c, rel=1e-9)
    assert report.beta_c == pytest.approx(expected.beta_c, rel=1e-9)
    # 4 for H and its self-check
    assert report.status == "safe" and report.hvps == 5


@pytest.mark.parametrize("seed", range(5))
def test_lambda_max_of_an_mlp_lies_in_its_interval_and_within_a_hundredth(seed):
    torch.manual_seed(seed)
    module, batch, problem = sinusoid_problem(seed)
    true = dense_spectrum(module, batch)
    report = measure(problem, beta=1e-3, curvature=CurvatureOptions(criterion="simplified"))
    assert report.lambda_max == pytest.approx(true[-1], rel=1e-2)
    low, high = report.lambda_max_interval
    assert low <= true[-1] <= high
    whole = critical_rates(true, problem.alpha)
    assert report.alpha_c_interval[0] <= whole.alpha_c <= report.alpha_c_interval[1]
    assert report.beta_c == pytest.approx(whole.beta_c, rel=2e-2)


@pytest.mark.parametrize("data", ["support", "query", "both"])
def test_the_loss_that_is_measured_can_be_chosen(data):
    module, batch, problem = sinusoid_problem()
    pair = {"support": [batch.support], "query": [batch.query], "both": [batch.support, batch.query]}[data]
    dense = sum(dense_hessian(support_loss(module, EpisodeBatch(p, p)), module.theta()) for p in pair) / len(pair)
    assert measure(
        problem, curvature=CurvatureOptions(criterion="simplified", data=data, tol=1e-6, max_iter=37)
    ).lambda_max == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-6)


def test_the_worst_task_decides():
    module, batch, problem = sinusoid_problem()
    single = [EpisodeBatch(*[tuple(t[k : k + 1] for t in pair) for pair in batch]) for k in range(4)]
    tops = [dense_spectrum(module, one)[-1] for one in single]
    report = measure(problem, curvature=CurvatureOptions(criterion="simplified", tasks="worst", tol=1e-6, max_iter=37))
    assert report.lambda_max == pytest.approx(max(tops), rel=1e-6)
    assert report.lambda_max > measure(problem, curvature=CurvatureOptions(criterion="simplified")).lambda_max


def test_pyhessian_agrees():
    module, batch, problem = sinusoid_problem()
    true = dense_spectrum(module, batch)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    module.eval()
    report = measure(
        problem,
        beta=1e-3,
        curvature=CurvatureOptions(criterion="simplified", estimator="pyhessian", max_iter=300, tol=1e-8),
    )
    assert report.lambda_max == pytest.approx(true[-1], rel=1e-3)
    assert report.beta_c <= critical_rates(true, problem.alpha).beta_c * 1.001
    assert not module.training
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_a_callable_estimates():
    module, batch, problem = sinusoid_problem()
    true = dense_spectrum(module, batch)

    def dense(matvec, start):
        rows = [matvec(row) for row in torch.eye(len(start), dtype=start.dtype)]
        return torch.linalg.eigvalsh(torch.stack(rows)).tolist()

    report = measure(problem, beta=1e-3, curvature=CurvatureOptions(criterion="simplified", estimator=dense))
    assert report.lambda_max == pytest.approx(true[-1], rel=1e-9)
    assert report.beta_c == pytest.approx(critical_rates(true, problem.alpha).beta_c, rel=1e-9)
    assert report.hvps > len(true)  # and those of the update's Jacobian


@pytest.mark.parametrize(
    "make",
    [
        Adam,
        AdamW,
        Adagrad,
        lambda p, lr: Adam(p, lr=lr, weight_decay=0.3),
        lambda p, lr: SGD(p, lr=lr, momentum=0.9, weight_decay=0.5),
    ],
)
def test_beta_c_of_the_live_optimizer_is_that_of_the_dense_scaled_operator(make):
    module, batch, _ = sinusoid_problem(inner_lr=0.02)
    optimizer = make(list(module.network.parameters()), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        support_loss(module, batch)(dict(module.network.named_parameters())).backward()
        optimizer.step()
    h = dense_hessian(support_loss(module, batch), module.theta())
    h = h - 0.02 * h @ h
    state = [optimizer.state[p] for p in module.network.parameters()]
    decay = optimizer.defaults["weight_decay"]
    if isinstance(optimizer, SGD):
        top, c, w = np.linalg.eigvalsh(h + decay * np.eye(len(h)))[-1], 3.8, 0.0
    elif isinstance(optimizer, Adagrad):
        d = 1 / (torch.cat([s["sum"].flatten() for s in state]).sqrt().numpy() + 1e-10)
        top, c, w = np.linalg.eigvals(d[:, None] * h).real.max(), 2.0, 0.0
    else:
        d = 1 / ((torch.cat([s["exp_avg_sq"].flatten() for s in state]) / (1 - 0.999**4)).sqrt().numpy() + 1e-8)
        decoupled = isinstance(optimizer, AdamW)
        shift = 0.0 if decoupled else decay
        top, c, w = (
            np.linalg.eigvals(d[:, None] * (h + shift * np.eye(len(h)))).real.max(),
            38.0,
            decay if decoupled else 0.0,
        )
    expected = 2 / (w + 2 * top / c)
    report = measure(
        module.meta_problem(batch),
        optimizer=optimizer,
        curvature=CurvatureOptions(criterion="simplified", tol=1e-5, max_iter=37),
    )
    assert report.beta_c == pytest.approx(expected, rel=1e-5)
    assert report.beta == 1e-2


def test_parameter_groups_share_one_factor():
    module, batch, problem = sinusoid_problem()
    parameters = list(module.network.parameters())
    optimizer = SGD([{"params": parameters[:2], "lr": 0.2}, {"params": parameters[2:], "lr": 0.05}], lr=0.1)
    h = dense_hessian(support_loss(module, batch), module.theta())
    h = h - problem.alpha * h @ h
    rates = np.concatenate([np.full(p.numel(), r) for p, r in zip(parameters, [0.2, 0.2, 0.05, 0.05], strict=True)])
    ratio = np.linalg.eigvals(rates[:, None] * h).real.max() / 2
    assert measure(
        problem, optimizer=optimizer, curvature=CurvatureOptions(criterion="simplified", tol=1e-6, max_iter=37)
    ).beta_ratio == pytest.approx(ratio, rel=1e-6)


def test_rates_by_parameter_scale_the_inner_condition():
    module, batch, _ = sinusoid_problem(learn_inner_lr=True, inner_lr=0.05)
    with torch.no_grad():
        for rate in module.learned_rates:
            rate.mul_(torch.rand_like(rate))
    h = dense_hessian(support_loss(module, batch), module.theta())
    a = torch.cat([rate.detach().flatten() for rate in module.learned_rates]).numpy()
    report = measure(
        module.meta_problem(batch), beta=1e-3, curvature=CurvatureOptions(criterion="simplified", tol=1e-6, max_iter=37)
    )
    assert report.alpha_ratio == pytest.approx(np.linalg.eigvals(a[:, None] * h).real.max(), rel=1e-6)
    assert report.beta_c == pytest.approx(2 / np.linalg.eigvalsh(h - h @ np.diag(a) @ h)[-1], rel=1e-6)
    assert math.isnan(report.sgd_beta_c)


def test_an_adapted_head_is_judged_by_its_own_block():
    module, batch, problem = sinusoid_problem(adapt="2", inner_lr=0.05)
    h = dense_hessian(support_loss(module, batch), module.theta())
    block = h[-13:, -13:]
    assert measure(
        problem, curvature=CurvatureOptions(criterion="simplified", tol=1e-6, max_iter=37)
    ).alpha_c == pytest.approx(1 / np.linalg.eigvalsh(block)[-1], rel=1e-6)


def test_a_negative_learned_rate_leaves_alpha_unjudged_and_beta_measured():
    module, batch, _ = sinusoid_problem(learn_inner_lr=True, inner_lr=0.05)
    with torch.no_grad():
        module.learned_rates[0][0] = -0.02
    h = dense_hessian(support_loss(module, batch), module.theta())
    a = torch.cat([rate.detach().flatten() for rate in module.learned_rates]).numpy()
    report = measure(
        module.meta_problem(batch), beta=1e-3, curvature=CurvatureOptions(criterion="simplified", tol=1e-6, max_iter=37)
    )
    assert report.alpha_status == "unresolved" and "a learned inner rate is negative" in report.reasons[0]
    assert report.beta_c == pytest.approx(2 / np.linalg.eigvalsh(h - h @ np.diag(a) @ h)[-1], rel=1e-6)
    assert report.safe_alpha == report.alpha


def test_pyhessian_measures_one_matrix_of_a_dropout_net():
    network = nn.Sequential(nn.Linear(1, 40), nn.Dropout(0.5), nn.Tanh(), nn.Linear(40, 1))
    problem = MetaLearningModule(network).meta_problem(Sinusoid().sample(4, torch.Generator().manual_seed(0)))
    low, high = measure(
        problem,
        beta=0.1,
        curvature=CurvatureOptions(criterion="simplified", estimator="pyhessian", max_iter=300, tol=1e-7),
    ).lambda_max_interval
    assert (high - low) / high < 0.02


def test_safe_beta_is_the_limit_at_the_alpha_that_is_applied():
    module = linear_module(4, 1.0, inner_lr=0.4, order="simplified")
    report = measure(
        module.meta_problem(quadratic_batch(SPECTRUM)),
        beta=50.0,
        margin=0.8,
        curvature=CurvatureOptions(criterion="simplified"),
    )
    assert report.beta_c == 0 and report.alpha_status == "unsafe"
    assert report.safe_alpha == pytest.approx(0.8 * 0.25)
    assert report.safe_beta == pytest.approx(0.8 * critical_rates(SPECTRUM, 0.2).beta_c, rel=1e-6)


def test_simplified_steps_act_as_k_alpha():
    module = linear_module(4, 0.1, inner_lr=0.05, inner_steps=2, order="simplified")
    assert measure(
        module.meta_problem(quadratic_batch(SPECTRUM)), curvature=CurvatureOptions(criterion="simplified")
    ).alpha_c == pytest.approx(0.125, rel=1e-9)


def test_adam_before_its_first_step_is_not_judged():
    module, _, problem = sinusoid_problem()
    report = measure(
        problem, optimizer=Adam(module.parameters(), lr=1e-3), curvature=CurvatureOptions(criterion="simplified")
    )
    assert report.status == report.beta_status == "unresolved" and report.alpha_status == "safe"
    assert "no second moment before its first step" in report.reasons[0]
    assert math.isnan(report.beta_c) and math.isfinite(report.sgd_beta_c)


def test_an_unknown_optimizer_is_not_judged():
    module, _, problem = sinusoid_problem()
    report = measure(
        problem, optimizer=Adamax(module.parameters(), lr=1e-3), curvature=CurvatureOptions(criterion="simplified")
    )
    assert "Adamax is not known" in report.reasons[0] and math.isnan(report.beta_c)


def test_a_rate_of_zero_is_not_judged():
    module, _, problem = sinusoid_problem()
    assert (
        "lr is 0"
        in measure(
            problem, optimizer=SGD(module.parameters(), lr=0.0), curvature=CurvatureOptions(criterion="simplified")
        ).reasons[0]
    )


def test_loss_and_products_that_are_not_finite_are_unresolved():
    data = (torch.ones(1, 1),)
    for loss, message in (
        (lambda p, d: (p["w"] / 0).sum(), "task loss is inf"),
        (lambda p, d: p["w"].sub(1).abs().pow(1.5).sum(), "product 1 is not finite"),
    ):
        report = measure(
            MetaProblem({"w": torch.ones(3)}, loss, data, data),
            beta=0.1,
            curvature=CurvatureOptions(criterion="simplified"),
        )
        assert report.status == "unresolved" and message in report.reasons[0]
        assert math.isnan(report.lambda_max)


def test_no_curvature_is_not_safe():
    data = (torch.ones(1, 1),)
    report = measure(
        MetaProblem({"w": torch.ones(3)}, lambda p, d: p["w"].sum(), data, data, 0.1),
        beta=0.1,
        curvature=CurvatureOptions(criterion="simplified"),
    )
    assert report.status == "unresolved" and "no curvature" in report.reasons[0]


def test_only_negative_curvature_has_no_finite_limit():
    data = (torch.ones(1, 1),)
    report = measure(
        MetaProblem({"w": torch.ones(3)}, lambda p, d: -(p["w"] ** 2).sum(), data, data, 0.1),
        beta=0.1,
        curvature=CurvatureOptions(criterion="simplified"),
    )
    assert report.alpha_c == report.beta_c == math.inf and report.lambda_min == pytest.approx(-2)
    assert report.status == "safe"


def test_half_precision_parameters_are_measured_in_float32():
    data = (torch.ones(2, 3, dtype=torch.bfloat16),)
    problem = MetaProblem(
        {"w": torch.ones(3, dtype=torch.bfloat16)}, lambda p, d: (p["w"] * d[0]).pow(2).sum(), data, data
    )
    assert measure(problem, curvature=CurvatureOptions(criterion="simplified")).lambda_max == pytest.approx(
        2.0, rel=1e-6
    )


def test_batch_norm_is_measured_in_the_mode_that_trains():
    network = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
    module = MetaLearningModule(network)
    batch = EpisodeBatch(*[tuple(t.double() for t in pair) for pair in Sinusoid().sample(3, torch.Generator())])
    stateless = nn.Sequential(network[0], nn.BatchNorm1d(6, track_running_stats=False).double(), *network[2:])
    reference = MetaLearningModule(stateless)
    true = dense_hessian(support_loss(reference, batch), reference.theta())
    assert measure(
        module.meta_problem(batch), curvature=CurvatureOptions(criterion="simplified", tol=1e-6, max_iter=37)
    ).lambda_max == pytest.approx(np.linalg.eigvalsh(true)[-1], rel=1e-6)


def test_random_states_parameters_and_gradients_are_left_alone():
    module = MetaLearningModule(nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)))
    problem = module.meta_problem(Sinusoid().sample(3, torch.Generator()))
    state = torch.get_rng_state()
    for estimator in ("lanczos", "pyhessian"):
        first = measure(problem, beta=0.1, curvature=CurvatureOptions(criterion="simplified", estimator=estimator))
        assert torch.equal(torch.get_rng_state(), state)
        assert (
            measure(
                problem, beta=0.1, curvature=CurvatureOptions(criterion="simplified", estimator=estimator)
            ).lambda_max
            == first.lambda_max
        )
    assert all(p.grad is None for p in module.parameters())


def test_a_report_reads_well():
    problem = linear_module(4, 0.1, inner_lr=0.05).meta_problem(quadratic_batch([0.5, 1.0, 2.0, 4.0]))
    lines = str(measure(problem, beta=2.0, step=7, curvature=CurvatureOptions(criterion="simplified"))).splitlines()
    assert lines[0] == "StabilityReport at step 7: unsafe (criterion='simplified')"
    assert re.fullmatch(r"  alpha = 0.05, 0.2 of alpha_c = 0.25 \(0.25 to 0.25\)", lines[1])
    assert re.fullmatch(r"  beta = 2, 3.2 of beta_c = 0.625 \(0.62\d* to 0.62\d*\)", lines[2])
    assert re.fullmatch(r"  lambda_max = 4, lambda_min = 0.5; \d+ Hessian-vector products, \S+ s", lines[3])
    assert lines[4].startswith("  beta = 2 is ")
    blind = measure(
        problem, optimizer=Adam([*problem.params.values()]), curvature=CurvatureOptions(criterion="simplified")
    )
    assert "  beta = 0.001, beta_c not known\n" in str(blind) and "alpha=0.05" in repr(blind)


def test_a_report_is_picklable_and_usable_in_a_plain_loop():
    module, _, problem = sinusoid_problem()
    report = measure(problem, beta=0.1, step=7, curvature=CurvatureOptions(criterion="simplified"))
    assert repr(pickle.loads(pickle.dumps(report))) == repr(report)
    assert report.step == 7 and report.seconds > 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"beta": -1.0}, "`beta` to be a finite number"),
        ({"criterion": "perfect"}, "`criterion` to be one of"),
        ({"tasks": "best"}, "`tasks` to be one of"),
        ({"data": "test"}, "`data` to be one of"),
        ({"basis": "float16"}, "`basis` to be one of"),
        ({"estimator": "guess"}, "`estimator` to be 'lanczos', 'pyhessian' or a callable"),
        ({"estimator": "pyhessian", "tasks": "worst"}, "tasks='worst' needs estimator='lanczos'"),
        ({"max_iter": 0}, "`max_iter` to be an integer of at least 1"),
        ({"tol": 0.0}, "`tol` to be a number between 0 and 1"),
        ({"margin": 0.0}, "`margin`"),
        ({"beta": 0.1, "optimizer": SGD([torch.zeros(1)], lr=0.1)}, "`beta` or `optimizer` but got both"),
        ({"estimator": lambda matvec, start: []}, "returned no eigenvalue"),
        ({"optimizer": SGD([torch.zeros(1)], lr=0.1)}, "holds none of the problem's `params`"),
    ],
)
def test_bad_options_are_named(keywords, message):
    _, _, problem = sinusoid_problem()
    with pytest.raises(ValueError, match=message):
        measure(problem, **grouped_measure(**keywords))


def test_an_optimizer_of_another_type_is_refused():
    module, _, problem = sinusoid_problem()
    with pytest.raises(TypeError, match="Optimizer but got MetaLearningModule"):
        measure(problem, optimizer=module, curvature=CurvatureOptions(criterion="simplified"))


def test_a_problem_of_another_type_is_refused():
    with pytest.raises(TypeError, match="MetaProblem but got dict"):
        measure({}, curvature=CurvatureOptions(criterion="simplified"))


def test_lightning_is_not_imported_by_the_mathematics():
    import subprocess
    import sys

    code = "import sys, lightning_maml_guard as g; g.measure; g.critical_rates; g.stability_limit; sys.exit('pytorch_lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_training_moves_the_numbers():
    module = linear_module(4, 0.1, inner_lr=0.05, order="simplified")
    batch = quadratic_batch(SPECTRUM)
    fit(module, batch, 3)
    assert measure(
        module.meta_problem(batch), beta=0.1, curvature=CurvatureOptions(criterion="simplified")
    ).lambda_max == pytest.approx(4.0)
