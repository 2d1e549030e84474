"""Inner loops of stacks without weights of each task's own, against vmap of the network, in float64."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_maml_guard import CurvatureOptions, EpisodeBatch, MetaLearningModule, measure
from lightning_maml_guard.kernels import shared_weights
from lightning_maml_guard.kernels.shared_weights import StackLosses
from lightning_maml_guard.linalg.lanczos import start_vector
from lightning_maml_guard.linalg.operators import Jacobian
from lightning_maml_guard.maml.jacobian import curvature_by_task, meta_field
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.task_map import TaskMap
from tests.helpers import fit, guard_warns
from tests.kernels.test_batched_stack import STACKS, batch, made

# A layer's inputs have more rows than its weights' share of entries allows in the networks of these tests.
ALWAYS = 1e9


def one_of_two_frozen():
    network = mlp(2, (6,), 1, activation="tanh")
    network[0].bias.requires_grad_(False)
    network[2].weight.requires_grad_(False)
    return network


CASES = {**STACKS, "one of a layer's two frozen": one_of_two_frozen}


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(shared_weights, "_SHARE", ALWAYS)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("vectorize", ["auto", 2])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_vmap(name, steps, vectorize):
    given = batch(more=(3,) if name == "norms" else ())
    problems = []
    for batched in (True, False):
        module = made(CASES[name], batched, vectorize=vectorize)
        module.inner_steps = steps
        problems.append(module.meta_problem(given))
    assert [each.shares_weights for each in problems] == [True, False]
    found, expected = (meta_gradient(each) for each in problems)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("always")
def test_labels_go_with_it():
    given, network = batch(labels=True), lambda: mlp(2, (6,), 2, activation="tanh")
    problems = [made(network, batched).meta_problem(given) for batched in (True, False)]
    assert problems[0].shares_weights
    found, expected = (meta_gradient(each) for each in problems)
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "options",
    [
        {"order": "first"},
        {"learn_inner_lr": True},
        {"adapt": "2"},
        {"vectorize": "loop"},
        {"batched": False},
        {"inner_update": lambda params, grads, state: ({n: v - grads[n] for n, v in params.items()}, state)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_inner_loops_have_weights_of_each_task(options):
    module = made(lambda: mlp(2, (6,), 1), **options)
    assert not module.meta_problem(batch()).shares_weights


def wide(width=450, **options):
    torch.manual_seed(0)
    return MetaLearningModule(mlp(2, (width, width), 1, activation="tanh").double(), inner_lr=0.01, **options)


def test_a_large_layer_is_shared_by_all_tasks_and_many_shots_have_a_loop():
    few, many = (
        EpisodeBatch(*((torch.randn(3, n, 2).double(), torch.randn(3, n, 1).double()) for _ in range(2)))
        for n in (4, 600)
    )
    module = wide()
    problem = module.meta_problem(few)
    assert module.task_map.looped and problem.looped and problem.shares_weights
    assert not module.meta_problem(many).shares_weights
    loop = wide(vectorize="loop").meta_problem(few)
    assert loop.task_losses is None
    for found, expected in zip(*(meta_gradient(each).gradients.values() for each in (problem, loop)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_as_many_tasks_share_at_once_as_keep_64_mib(monkeypatch):
    monkeypatch.delenv("LMG_VECTORIZE", raising=False)
    given = EpisodeBatch(*((torch.randn(5, n, 2).double(), torch.randn(5, n, 1).double()) for n in (4, 3000)))
    module = wide()
    problem = module.meta_problem(given)
    assert problem.looped and problem.shares_weights and problem.task_chunk_size in {2, 3, 4}
    assert module.meta_problem(given).task_chunk_size == problem.task_chunk_size
    loop = wide(vectorize="loop").meta_problem(given)
    found, expected = (
        meta_gradient(each, tasks=owner).gradients for each, owner in ((problem, module.task_map), (loop, None))
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("width", [100, 450])
def test_a_measurement_of_wide_layers_is_that_of_the_loop(width):
    given = EpisodeBatch(*((torch.randn(3, 4, 2).double(), torch.randn(3, 4, 1).double()) for _ in range(2)))
    reports = [
        measure(wide(width, vectorize=each).meta_problem(given), beta=0.1, curvature=CurvatureOptions(tol=1e-6))
        for each in ("auto", "loop")
    ]
    for name in ("lambda_max", "exact_beta_c", "beta_c_noise", "predicted_change"):
        assert getattr(reports[0], name) == pytest.approx(getattr(reports[1], name), rel=1e-6)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", CASES)
def test_products_and_curvatures_by_task_are_those_of_vmap(name):
    given = batch(more=(3,) if name == "norms" else ())
    loop = replace(made(CASES[name], False).meta_problem(given), looped=True)
    shared = replace(made(CASES[name]).meta_problem(given), looped=True)
    params = {key: value.detach() for key, value in loop.params.items()}
    with double_backward():
        both = [Jacobian(meta_field(each, TaskMap()), params) for each in (shared, loop)]
        vector = start_vector((both[0].layout.size,), both[0].gradient)
        torch.testing.assert_close(both[0](vector), both[1](vector), rtol=1e-10, atol=1e-11)
        direction = both[0].layout.split(vector)
        found, expected = (curvature_by_task(each, params, direction, TaskMap()) for each in (shared, loop))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_training_takes_the_same_steps():
    given = EpisodeBatch(*((torch.randn(3, 4, 2).double(), torch.randn(3, 4, 1).double()) for _ in range(2)))
    modules = [wide(), wide(vectorize="loop")]
    for module in modules:
        fit(module, given, 3, precision="64-true")
    for found, expected in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("always")
def test_what_does_not_agree_on_the_first_batch_is_not_used(monkeypatch):
    right = StackLosses.adapted
    monkeypatch.setattr(StackLosses, "adapted", lambda *given: 1.01 * right(*given))
    module = wide()
    given = EpisodeBatch(*((torch.randn(3, 4, 2).double(), torch.randn(3, 4, 1).double()) for _ in range(2)))
    with guard_warns("batched matrix products gives another meta-gradient .* Pass batched=False"):
        assert module.meta_problem(given).task_losses is None
    assert module.meta_problem(given).task_losses is None


def test_a_loss_that_cannot_be_batched_is_tried_once():
    calls = []

    def loss(prediction, target):
        calls.append(1)
        return nn.functional.mse_loss(prediction, target) * float(target.isfinite().all())

    given = EpisodeBatch(*((torch.randn(3, 4, 2).double(), torch.randn(3, 4, 1).double()) for _ in range(2)))
    module = wide(loss=loss)
    assert not module.meta_problem(given).shares_weights
    calls.clear()
    assert not module.meta_problem(given).shares_weights and not calls
