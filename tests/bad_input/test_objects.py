"""Arguments that are objects: networks, functions, optimizers, tensors, devices, pictures."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    MetaLearningModule,
    TaskDataModule,
    critical_rates,
    measure,
    stability_limit,
    suggest_rates,
)
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.plots import safe_region
from lightning_maml_guard.tasks.episodes import sample_n_way_k_shot
from lightning_maml_guard.tasks.images import Omniglot
from lightning_maml_guard.tasks.regression import LinearRegression, Sinusoid
from tests.bad_input.helpers import refused
from tests.bad_input.test_arguments import PROBLEM, measured, module, problem
from tests.helpers import fit

X, Y = torch.ones(2, 5, 1), torch.zeros(2, 5, 1)
META = torch.ones(2, device="meta")


def frozen():
    network = mlp()
    network.requires_grad_(False)
    return network


def half_meta():
    return nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))


OBJECTS = [
    (lambda: MetaLearningModule(mlp), TypeError, "network", "function", "a torch.nn.Module", "Pass an instance"),
    (lambda: MetaLearningModule(None), TypeError, "network", "NoneType", "a torch.nn.Module", "Pass an instance"),
    (lambda: MetaLearningModule(half_meta()), ValueError, "network", "parameters on the meta device: ['1.weight', '1.bias']", "hold values", "to_empty(device='cpu')"),
    (lambda: module(loss="mse"), TypeError, "loss", "'mse'", "callable", "Pass a function"),
    (lambda: module(loss=nn.MSELoss), TypeError, "loss", "the class MSELoss", "callable", "Pass an instance: MSELoss()."),
    (lambda: module(optimizer="adam"), TypeError, "optimizer", "'adam'", "parameters -> optimizer", "lambda params: SGD"),
    (lambda: module(optimizer=SGD([X], lr=1)), TypeError, "optimizer", "SGD (", "parameters -> optimizer", "lambda params: SGD"),
    (lambda: module(lr_scheduler=3), TypeError, "lr_scheduler", "3", "optimizer -> scheduler", "lambda optimizer: StepLR"),
    (lambda: module(optimizer=lambda p: 3).configure_optimizers(), TypeError, "optimizer", "3", "return a torch.optim.Optimizer", "Return one"),
    (lambda: module(lr_scheduler=lambda o: 3).configure_optimizers(), TypeError, "lr_scheduler", "3", "return a learning-rate scheduler", "Return one"),
    (lambda: module(adapt=3), TypeError, "adapt", "3", "a name or a list of names", "Pass parameter names"),
    (lambda: module(adapt=[3]), TypeError, "adapt", "[3]", "a name or a list of names", "Pass parameter names"),
    (lambda: module(metrics="accuracy"), TypeError, "metrics", "str", "a torchmetrics Metric", "Pass one of torchmetrics"),
    (lambda: TaskDataModule(Sinusoid), TypeError, "tasks", "ABCMeta", "a TaskFamily", "Pass an instance"),
    (lambda: Omniglot(root=3), TypeError, "root", "3", "the path of a folder", "Pass a string or a pathlib.Path"),
    *(
        (lambda family=family: family.sample(1, 7), TypeError, "generator", "7", "a torch.Generator", "Pass torch.Generator().manual_seed(0).")
        for family in (Sinusoid(), LinearRegression(), Omniglot())
    ),
    (lambda: mlp(hidden=40), TypeError, "hidden", "40", "a list of layer sizes", "Pass (40, 40)"),
    (lambda: mlp(hidden="40"), TypeError, "hidden", "'40'", "a list of layer sizes", "Pass (40, 40)"),
    (lambda: mlp(hidden=(40, 0)), ValueError, "hidden[1]", "0", "an integer of at least 1", "Pass a Python integer"),
    (lambda: mlp(hidden=(2.5,)), ValueError, "hidden[0]", "2.5", "an integer of at least 1", "Pass a Python integer"),
    (lambda: conv4(image_size=15), ValueError, "image_size", "15", "at least 16 (four poolings by 2)", "Use larger images"),
    (lambda: ConvergenceGuard(problem=3), ValueError, "problem", "3", "a function (module, batch) -> MetaProblem", "Pass such a function"),
    *(
        (lambda device=device: ConvergenceGuard(snapshot_device=device), ValueError, "snapshot_device", repr(device), "a device such as 'cpu'", "Pass its name")
        for device in ("gpu zero", "meta", 0, math.nan)
    ),
    *(
        (lambda estimator=estimator: CurvatureOptions(estimator=estimator), ValueError, "estimator", repr(estimator), "'lanczos', 'pyhessian' or a callable", "Pass one of these words")
        for estimator in (None, 3, ["lanczos"], "power")
    ),
    *(
        (lambda found=found: measured(estimator=lambda matvec, start: found), ValueError, "estimator", repr(found), "return a sequence of eigenvalues", "Return a list")
        for found in (None, 3.0, "a", [None])
    ),
    (lambda: measure({}, curvature=CurvatureOptions(criterion="simplified")), TypeError, "problem", "dict", "a MetaProblem", "Pass MetaProblem(params"),
    (lambda: measured(optimizer="adam"), TypeError, "optimizer", "str", "a torch.optim.Optimizer", "Pass the one that trains"),
    (lambda: measured(cache={}), TypeError, "cache", "dict", "a MeasurementCache or None", "Leave it out"),
    *(
        (lambda make=make: make(curvature={"max_iter": 5}), TypeError, "curvature", "dict", "a CurvatureOptions", "Pass CurvatureOptions(max_iter=40)")
        for make in (ConvergenceGuard, lambda curvature: measure(PROBLEM, curvature=curvature), lambda curvature: suggest_rates(module(), curvature=curvature))
    ),
    *(
        (lambda make=make: make(lookahead=5), TypeError, "lookahead", "int", "a LookaheadOptions", "Pass LookaheadOptions(steps=5)")
        for make in (ConvergenceGuard, lambda lookahead: suggest_rates(module(), lookahead=lookahead))
    ),
    *(
        (lambda given=given: stability_limit(given), TypeError, "optimizer", str(given), "a torch.optim.Optimizer", "Pass the optimizer that trains")
        for given in (None, 3, SGD)
    ),
    *(
        (lambda given=given: critical_rates(given, 0.1), ValueError, "eigenvalues", repr(given), "real numbers", "Pass a list")
        for given in (None, "4", ["a"], {"a": 1}, [1j], [[1.0], [1.0, 2.0]])
    ),
    (lambda: critical_rates([1.0], 0.1, residuals="a"), ValueError, "residuals", "'a'", "real numbers", "Pass a list"),
    (lambda: critical_rates(META, 0.1), ValueError, "eigenvalues", "tensor(", "hold numbers", "Move it to a real device"),
    *(
        (lambda given=given: safe_region(given), TypeError, "reports", type(given).__name__, "a list of StabilityReport", "Pass guard.history")
        for given in (None, 3, "abc", [3], [None])
    ),
    *(
        (lambda given=given: ConvergenceGuard().report(given), TypeError, "path", repr(given), "the path of a file", "Pass a string or a pathlib.Path")
        for given in (3, None, b"run.html", ["run.html"])
    ),
    (lambda: problem(params=[X]), TypeError, "params", "list", "a dict from names to tensors", "Pass dict(module.named_parameters())"),
    (lambda: problem(params={3: X}), TypeError, "params", "{3: tensor(", "a dict from names to tensors", "Pass dict(module.named_parameters())"),
    (lambda: problem(params={"w": X.long()}), ValueError, "params", "{'w': torch.int64}", "real floating-point tensors", "Pass the parameters that train"),
    (lambda: problem(params={"w": X.cfloat()}), ValueError, "params", "{'w': torch.complex64}", "real floating-point tensors", "Pass the parameters that train"),
    (lambda: problem(params={"v": X, "w": META}), ValueError, "params", "['cpu', 'meta']", "on one device", "Move the network"),
    (lambda: problem(params={"w": META}), ValueError, "params", "['meta']", "that holds values", "Move the network"),
    (lambda: problem(task_loss="mse"), TypeError, "task_loss", "'mse'", "callable, (params, one task's data) -> scalar", "Pass a function"),
    (lambda: problem(inner_lr={"w": 0.1}), TypeError, "inner_lr['w']", "0.1", "a tensor", "Pass torch.tensor(0.01)"),
    (lambda: problem(inner_lr={"w": torch.ones(7)}), ValueError, "inner_lr['w']", "(7,)", "its parameter's shape (2,)", "Pass one rate per entry"),
    (lambda: problem(inner_lr={"w": torch.ones(3, 2)}), ValueError, "inner_lr['w']", "(3, 2)", "its parameter's shape (2,)", "Pass one rate per entry"),
    (lambda: problem(inner_lr={"w": torch.ones(2).long()}), ValueError, "inner_lr['w']", "torch.int64 on cpu", "a floating-point tensor on cpu", "Convert it"),
    (lambda: problem(inner_lr={"w": META}), ValueError, "inner_lr['w']", "torch.float32 on meta", "a floating-point tensor on cpu", "Convert it"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "argument", "value", "allowed", "remedy"), OBJECTS)
def test_an_object_of_the_wrong_kind_is_refused_by_name(make, error, argument, value, allowed, remedy):
    refused(make, argument, value, allowed, remedy, error)


@pytest.mark.parametrize("network", [nn.ReLU(), frozen()])
def test_a_network_without_anything_to_train_is_refused(network):
    with pytest.raises(
        ValueError, match=r"no parameter to train: .*frozen \(requires_grad=False\)\. Unfreeze at least one"
    ):
        MetaLearningModule(network)


def test_freezing_everything_before_training_is_refused_before_the_first_batch():
    trained = MetaLearningModule(mlp())
    trained.network.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter to train: .*Unfreeze at least one"):
        fit(trained, ((X, Y), (X, Y)), 1)


@pytest.mark.parametrize("params", [{}, {"w": torch.ones(0, 3)}])
def test_a_problem_without_parameters_is_refused(params):
    with pytest.raises(
        ValueError, match=r"`params` to hold at least one parameter but it is empty.*Unfreeze at least one"
    ):
        problem(params=params)


def test_a_lazy_network_is_told_to_run_once():
    with pytest.raises(
        ValueError, match=r"`params` to be initialised but the shapes of \['0.weight', '0.bias'\].*Run the network once"
    ):
        fit(MetaLearningModule(nn.Sequential(nn.LazyLinear(1))), ((X, Y), (X, Y)), 1)


def test_both_rates_or_two_options_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match=r"`beta` or `optimizer` but got both.*Leave `beta` out"):
        measured(beta=0.1, optimizer=SGD(list(PROBLEM.params.values()), lr=0.1))
    with pytest.raises(
        ValueError, match=r"tasks='worst' needs estimator='lanczos' but got 'pyhessian'.*Choose tasks='mean'"
    ):
        ConvergenceGuard(curvature=CurvatureOptions(tasks="worst", estimator="pyhessian"))
    with pytest.raises(ValueError, match=r"rollback=True .*needs action='rescale' .*but got 'warn' and 10\. Set both"):
        ConvergenceGuard(rollback=True)


def test_a_picture_without_reports_or_axes_is_refused():
    with pytest.raises(ValueError, match=r"nothing to draw: no check has measured .*Train until one has"):
        ConvergenceGuard().plot()
    refused(
        lambda: safe_region([], ax=3),
        "ax",
        "int",
        "matplotlib's Axes or None",
        "Pass the second of plt.subplots()",
        TypeError,
    )


IMAGES = torch.zeros(3, 4, 1, 2, 2)


@pytest.mark.parametrize(
    ("change", "argument", "value", "allowed", "remedy"),
    [
        ({"images": IMAGES[:, :, 0]}, "images", "shape (3, 4, 2, 2)", "(classes, images per class, channels", "images.unsqueeze(2)"),
        ({"images": IMAGES.long()}, "images", "shape (3, 4, 1, 2, 2) and torch.int64", "uint8 or float", "images.unsqueeze(2)"),
        ({"classes": torch.ones(3)}, "classes", "shape (3,) and torch.float32", "an integer tensor", "Pass torch.arange"),
        ({"classes": torch.tensor([0, 3])}, "classes", "0 to 3", "between 0 and 2", "Drop the indices"),
        ({"classes": torch.tensor([-1, 1])}, "classes", "-1 to 1", "between 0 and 2", "Drop the indices"),
    ],
)  # fmt: skip
def test_images_of_another_form_are_refused(change, argument, value, allowed, remedy):
    arguments = {"images": IMAGES, "classes": torch.arange(3), "n_way": 2, "k_shot": 1, "queries": 1, **change}
    with pytest.raises(ValueError) as caught:
        sample_n_way_k_shot(n_tasks=1, generator=torch.Generator(), **arguments)
    said = str(caught.value)
    assert f"`{argument}`" in said and f"but got {value}" in said and allowed in said and remedy in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_way": 2000}, r"n_way=2000 classes but this split has 1623: lower n_way"),
        ({"k_shot": 15, "queries": 6}, r"k_shot=15 \+ queries=6 different images per class but there are 20: lower one of them"),
    ],
)  # fmt: skip
def test_an_episode_asking_for_more_than_there_is_is_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        Omniglot(**arguments)
