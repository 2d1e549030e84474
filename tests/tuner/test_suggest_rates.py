"""suggest_rates: the limits against closed forms, a pair that trains, nothing touched, errors that help."""

import copy
import math

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    LookaheadOptions,
    MetaLearningModule,
    MetaProblem,
    RateSuggestion,
    TaskDataModule,
    suggest_rates,
)
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import LightningModule, Trainer
from tests.helpers import fit, grouped_suggest, linear_module, quadratic_batch

VALUES = np.array([0.3, 1.0, 2.0, 4.0])


def loader(*batches):
    return DataLoader(list(batches), batch_size=None)


def on_quadratic(values=VALUES, beta=0.1, optimizer=None, **options):
    module = linear_module(len(values), beta, inner_lr=0.1, **options)
    if optimizer is not None:
        module._optimizer = optimizer
    return module


def sgd(beta, **options):
    return lambda parameters: SGD(parameters, lr=beta, **options)


@pytest.mark.parametrize(
    ("criterion", "order", "alpha_c", "curvature"),
    [
        ("exact", "exact", 2 / 4, lambda x, a: x * (1 - a * x) ** 2),
        ("simplified", "simplified", 1 / 4, lambda x, a: x * (1 - a * x)),
    ],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_limits_are_those_of_the_closed_form(criterion, order, alpha_c, curvature, momentum):
    module = on_quadratic(optimizer=sgd(0.1, momentum=momentum), order=order)
    found = suggest_rates(
        module,
        loader(quadratic_batch(list(VALUES))),
        margin=0.6,
        curvature=CurvatureOptions(criterion=criterion, tasks="worst"),
    )
    beta_c = 2 * (1 + momentum) / curvature(VALUES, 0.6 * alpha_c).max()
    assert found.alpha_c == pytest.approx(alpha_c, rel=1e-6) and found.beta_c == pytest.approx(beta_c, rel=1e-6)
    assert found.suggestion() == pytest.approx((0.6 * alpha_c, 0.6 * beta_c), rel=1e-6)
    assert (found.configured_alpha, found.configured_beta, found.status) == (0.1, 0.1, "safe")
    assert found.lookahead[1] < found.lookahead[0] and not found.reasons and not found.notices


def test_the_smallest_limits_over_the_batches_count():
    batches = [quadratic_batch(list(VALUES * factor)) for factor in (1, 2, 0.5, 8)]
    found = suggest_rates(on_quadratic(), loader(*batches), batches=3)
    assert [report.alpha_c for report in found.reports] == pytest.approx([0.5, 0.25, 1.0], rel=1e-6)
    assert found.alpha == pytest.approx(0.125, rel=1e-6)
    each = [report.beta_c for report in found.suggested_reports]
    assert found.beta_c == min(each) and len(each) == 3


@pytest.mark.parametrize("margin", [0.95, 1.05])
def test_the_suggested_pair_trains_just_inside_and_not_outside(margin):
    batch = quadratic_batch(list(VALUES))
    found = suggest_rates(on_quadratic(), loader(batch), margin=0.5, lookahead=LookaheadOptions(steps=0))
    module = on_quadratic(optimizer=sgd(margin * found.beta_c))
    module.inner_lr = found.alpha
    start = float(module.network.weight.detach().norm())
    fit(module, batch, 120)
    assert (float(module.network.weight.detach().norm()) < start) == (margin < 1)


class Wells(LightningModule):
    """(w^2 - 1)^2 from just outside its inflection, where the curvature is small and the slope is not."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.6))

    def training_step(self, batch, batch_idx):
        return (self.w**2 - 1) ** 2

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.01)


def test_a_meta_rate_whose_lookahead_diverges_is_halved_and_said_so():
    found = suggest_rates(Wells(), loader(torch.zeros(1)))
    assert found.beta_c == pytest.approx(2 / (12 * 0.36 - 4), rel=1e-3)
    assert "of its critical value, does not survive the lookahead: it was halved 3 times" in found.notices[0]
    assert found.beta == 0.5 * found.beta_c / 8 and found.lookahead[1] < 3 * found.lookahead[0]
    assert (
        suggest_rates(Wells(), loader(torch.zeros(1)), lookahead=LookaheadOptions(steps=0)).beta == 0.5 * found.beta_c
    )


@pytest.mark.parametrize("algorithm", [None, "value"])
def test_the_lookahead_clips_as_the_run_does(algorithm):
    found = suggest_rates(Wells(), loader(torch.zeros(1)), gradient_clip_val=0.01, gradient_clip_algorithm=algorithm)
    assert not found.notices and found.beta == 0.5 * found.beta_c


def test_the_runs_precision_is_kept():
    found = suggest_rates(Wells(), loader(torch.zeros(1)), precision="64-true")
    single = suggest_rates(Wells(), loader(torch.zeros(1)))
    limit = 2 / (12 * float(torch.tensor(0.6)) ** 2 - 4)
    assert found.beta_c == pytest.approx(limit, rel=1e-12) and single.beta_c != found.beta_c


def test_unsafe_rates_get_the_guards_own_verdict():
    module = on_quadratic(beta=3.0)
    found = suggest_rates(module, loader(quadratic_batch(list(VALUES))))
    assert found.status == "unsafe" and found.reasons[0].startswith("beta = 3 is 2.2x beta_c = 1.39")
    assert "The next 10 steps, tried on copies at alpha = 0.1 and beta = 3" in found.reasons[1]
    guard = ConvergenceGuard(action="log")
    fit(module, quadratic_batch(list(VALUES)), 1, [guard])
    assert guard.history[0].status == "unsafe" and guard.history[0].beta_c == found.reports[0].beta_c


def test_adam_gets_no_invented_meta_rate():
    module = MetaLearningModule(mlp(), inner_lr=0.01, optimizer=lambda p: Adam(p, lr=1e-3))
    found = suggest_rates(
        module, TaskDataModule(Sinusoid(shots=5), meta_batch_size=3), batches=2, lookahead=LookaheadOptions(steps=3)
    )
    assert math.isnan(found.beta) and math.isnan(found.beta_c) and found.status == "unresolved"
    assert found.alpha == 0.5 * found.alpha_c and found.lookahead[1] < 3 * found.lookahead[0]
    assert found.notices == (
        "No meta rate is suggested: Adam has no second moment before its first step, so its preconditioner is not "
        "known yet.",
    )
    said = str(found)
    assert "configured 0.001, beta_c not known at the suggested alpha, none suggested" in said
    assert "3 steps tried on copies at alpha" in said
    last = "\n".join(said.splitlines()[4:])
    assert " ".join(last.split()) == f"The configured rates could not be judged in full. {found.notices[0]}"
    matplotlib.use("Agg")
    figure, ax = found.plot()
    assert "suggested alpha, configured beta" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_what_is_printed_and_drawn():
    matplotlib.use("Agg")
    batches = [quadratic_batch(list(VALUES)), quadratic_batch(list(2 * VALUES))]
    found = suggest_rates(on_quadratic(beta=3.0), loader(*batches))
    lines = str(found).splitlines()
    assert lines[0] == "Rates before training, over 2 batches (the smallest limits count; margin 0.5):"
    assert lines[1] == "  inner rate alpha: configured 0.1, alpha_c 0.25, suggested 0.125"
    assert lines[2].startswith("  meta rate beta: configured 3, beta_c ")
    assert lines[3].startswith(
        f"  10 steps tried on copies at alpha = 0.125 and beta = {found.beta:.3g}: the loss goes"
    )
    assert lines[4].startswith("The configured rates are unsafe. beta = 3 is 2.2x")
    assert all(len(line) <= 100 for line in lines[4:])
    at_edge = str(suggest_rates(on_quadratic(beta=1.5), loader(*batches), lookahead=LookaheadOptions(steps=1)))
    assert "\nThe configured rates are at the edge. beta = 1.5 is" in at_edge
    figure, ax = found.plot()
    said = {text.get_text() for text in ax.get_legend().get_texts()}
    beyond, curve = "simplified criterion beyond the measured $\\alpha$", r"$\beta_c(\alpha)$, earlier checks"
    marks = {"configured rates", "suggested rates"}
    assert said == marks | {"safe region, smallest", r"$\beta_c(\alpha)$, smallest", beyond, curve}
    (filled,) = [part for part in ax.collections if part.get_label() == "safe region, smallest"]
    reached = filled.get_paths()[0].get_extents()
    assert reached.y0 <= ax.get_ylim()[0] * (1 + 1e-6) and reached.x1 == pytest.approx(found.alpha, rel=1e-6)
    marks = [tuple(part.get_offsets()[0]) for part in ax.collections if len(part.get_offsets()) == 1]
    assert (0.1, 3.0) in marks and found.suggestion() in [pytest.approx(mark) for mark in marks]
    # The filled region's border passes through the limit that was measured at the suggested alpha.
    border = max(ax.lines, key=lambda line: line.get_linewidth()).get_xydata()
    assert np.interp(found.alpha, *border.T) == pytest.approx(found.beta_c, rel=2e-2)
    assert ax.get_ylim()[1] > 3


class Plain(LightningModule):
    def __init__(self, **optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.options, self.seen = {"lr": 0.1, **optimizer}, []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.seen.append(loss.detach())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return SGD(self.parameters(), **self.options)


def shuffled():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 2)
    return DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=16, shuffle=True, generator=generator)


def test_plain_training_gets_a_learning_rate():
    found = suggest_rates(Plain(momentum=0.5), shuffled())
    assert math.isnan(found.alpha) and found.beta == 0.5 * found.beta_c
    for report in found.reports:
        assert report.beta_c == pytest.approx(3.0 / report.lambda_max, rel=2e-2)
    lines = str(found).splitlines()
    assert lines[1].startswith("  learning rate beta: configured 0.1, beta_c ") and "alpha" not in lines[1]
    with pytest.raises(ValueError, match="Plain training has no inner rate.* Print the suggestion"):
        found.plot()


def test_nothing_is_touched():
    module, data = Plain(), shuffled()
    module.net[0].weight.grad = torch.ones(8, 2)
    module.eval()
    before = copy.deepcopy(module.state_dict())
    rng, drawn = torch.get_rng_state(), data.generator.get_state()
    suggest_rates(module, data, lookahead=LookaheadOptions(steps=2))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(data.generator.get_state(), drawn)
    assert not module.training and module.seen == [] and module.net[0].weight.grad.eq(1).all()
    assert "configure_callbacks" not in vars(module) and module._trainer is None


def test_a_datamodule_keeps_its_trainer_and_a_run_is_the_same_afterwards():
    def trained(suggests):
        torch.manual_seed(1)
        module = MetaLearningModule(mlp(hidden=(8,)), optimizer=sgd(0.05))
        data = TaskDataModule(Sinusoid(shots=5), meta_batch_size=2, val_episodes=0)
        if suggests:
            found = suggest_rates(module, data, batches=2, lookahead=LookaheadOptions(steps=2))
            assert isinstance(found, RateSuggestion) and data.trainer is None
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        Trainer(max_steps=3, accelerator="cpu", enable_model_summary=False, **quiet).fit(module, data)
        return module.state_dict()

    with_it, without = trained(True), trained(False)
    assert all(torch.equal(with_it[name], without[name]) for name in without)


class Foreign(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1, bias=False).double()
        nn.init.ones_(self.net.weight)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        raise AssertionError("a module that states its problem is not run")

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.4)
        return [optimizer], [LinearLR(optimizer, start_factor=1e-3)]

    def train_dataloader(self):
        return loader(quadratic_batch(list(VALUES)))


def problem(module, batch):
    return MetaProblem(
        dict(module.net.named_parameters()),
        lambda at, data: nn.functional.mse_loss(torch.func.functional_call(module.net, at, (data[0],)), data[1]),
        *batch,
        inner_lr=0.1,
    )


def test_a_foreign_module_with_its_own_loader_and_a_warm_up():
    found = suggest_rates(Foreign(), problem=problem)
    assert found.alpha_c == pytest.approx(0.5, rel=1e-6)
    assert found.configured_beta == pytest.approx(0.4)  # not the schedule's first 4e-4


def test_a_part_that_adapts_keeps_its_rates_in_proportion():
    module = MetaLearningModule(mlp(hidden=(8,)), adapt="*2*", inner_lr=0.01, optimizer=sgd(0.1))
    found = suggest_rates(
        module, TaskDataModule(Sinusoid(shots=5), meta_batch_size=2), batches=1, lookahead=LookaheadOptions(steps=2)
    )
    assert found.suggested_reports[0].alpha == pytest.approx(found.alpha, rel=1e-6) and found.alpha > 0


def test_an_optimizer_that_needs_a_closure_is_not_tried():
    module = on_quadratic(optimizer=lambda parameters: LBFGS(parameters, lr=0.1))
    found = suggest_rates(module, loader(quadratic_batch(list(VALUES))))
    assert math.isnan(found.lookahead[0]) and math.isnan(found.beta)
    assert found.notices[0].startswith("The next steps cannot be tried.")
    assert found.notices[1].startswith("No meta rate is suggested: ")


def test_no_curvature_no_suggestion():
    found = suggest_rates(on_quadratic(), loader(quadratic_batch([0.0] * 4)))
    assert math.isnan(found.beta) and found.alpha == 0.1
    assert "No finite alpha_c was measured" in found.notices[0] and found.notices[1].startswith(
        "No meta rate is suggested"
    )


def test_an_error_in_the_users_code_is_the_users_to_see():
    class Broken(Plain):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        suggest_rates(Broken(), shuffled())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"module": nn.Linear(1, 1)}, TypeError, "`module` to be a LightningModule but got Linear. Pass the instance"),
        ({"datamodule": 3}, TypeError, "`datamodule` to be a LightningDataModule or a dataloader but got 3"),
        ({"datamodule": None}, TypeError, "got None, and Plain has no train_dataloader of its own. Pass what"),
        ({"datamodule": iter([1])}, TypeError, "gone through again but got an iterator, .*Pass the loader itself"),
        ({"datamodule": []}, ValueError, "at least one training batch but got none. Check the length"),
        ({"batches": 0}, ValueError, "`batches` to be an integer of at least 1 but got 0"),
        ({"margin": 1.0}, ValueError, "`margin` to be a number between 0 and 1 but got 1.0"),
        ({"divergence_ratio": 1}, ValueError, "`divergence_ratio` to be a finite number above 1 but got 1"),
        ({"steps": -1}, ValueError, "`steps` to be an integer of at least 0 but got -1"),
        ({"criterion": "best"}, ValueError, "`criterion` to be one of"),
        ({"problem": 3}, ValueError, "`problem` to be a function .module, batch. -> MetaProblem but got 3"),
        ({"module": Foreign()}, ValueError, "Expected Foreign to state its problem, for with manual optimisation"),
    ],
    ids=lambda value: next(iter(value), None) if isinstance(value, dict) else None,
)
def test_bad_input_is_named(change, error, message):
    given = {"module": Plain(), "datamodule": shuffled(), **change}
    with pytest.raises(error, match=message):
        suggest_rates(given.pop("module"), given.pop("datamodule"), **grouped_suggest(**given))


def test_a_module_that_cannot_be_copied_is_named():
    module = Plain()
    module.lock = __import__("threading").Lock()
    with pytest.raises(TypeError, match="one that copy.deepcopy copies.*cannot pickle.*Give the class a __deepcopy__"):
        suggest_rates(module, shuffled())


def test_a_module_without_an_optimizer_is_named():
    class Still(Plain):
        def configure_optimizers(self):
            return None

    with pytest.raises(ValueError, match="configure_optimizers of Still to return an optimizer but got none"):
        suggest_rates(Still(), shuffled())


@pytest.mark.parametrize("resample", [True, False])
def test_new_tasks_at_every_step_lower_the_meta_rate(resample):
    module = MetaLearningModule(mlp(hidden=(8,)), optimizer=sgd(0.1, momentum=0.9))
    data = TaskDataModule(Sinusoid(shots=5), meta_batch_size=3, resample=resample)
    found = suggest_rates(module, data, batches=2, lookahead=LookaheadOptions(steps=0))
    if resample:
        assert found.beta_c_noise == min(report.beta_c_noise for report in found.suggested_reports) < found.beta_c
        assert found.beta == 0.5 * found.beta_c_noise
        assert f"({found.beta_c_noise:.3g} while every step draws new tasks)" in str(found)
    else:
        assert math.isnan(found.beta_c_noise) and found.beta == 0.5 * found.beta_c
        assert "new tasks" not in str(found)


def test_several_loaders_and_one_batch():
    class Two(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

    found = suggest_rates(Two(), {"a": shuffled(), "b": shuffled()}, batches=1, lookahead=LookaheadOptions(steps=1))
    assert len(found.reports) == 1 and found.beta > 0
