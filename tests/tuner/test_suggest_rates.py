"""suggest_rates: the limits against closed forms, a pair that trains, nothing touched, errors that help."""

import copy
import math

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, NAdam, RMSprop
from torch.optim.lr_scheduler import LinearLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    LadderOptions,
    LookaheadOptions,
    MetaLearningModule,
    MetaProblem,
    RateSuggestion,
    TaskDataModule,
    suggest_rates,
)
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.tuner import at_start
from lightning_maml_guard.utils.lightning_compat import LightningModule, Trainer
from lightning_maml_guard.utils.warnings import GuardWarning
from tests.helpers import fit, grouped_suggest, linear_module, quadratic_batch

VALUES = np.array([0.3, 1.0, 2.0, 4.0])
# Small, as most tests are not about it.
QUICK = LadderOptions(steps=8, longest=8, progress=False)
AT_ONE = LadderOptions(steps=8, longest=8, alphas=(0.125,), progress=False)


QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


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
    ("criterion", "order", "alpha_c", "curvature", "momentum"),
    [
        ("exact", "exact", 2 / 4, lambda x, a: x * (1 - a * x) ** 2, 0.0),
        ("exact", "exact", 2 / 4, lambda x, a: x * (1 - a * x) ** 2, 0.9),
        ("simplified", "simplified", 1 / 4, lambda x, a: x * (1 - a * x), 0.9),
    ],
)
def test_limits_are_those_of_the_closed_form_and_the_ladder_finds_them(criterion, order, alpha_c, curvature, momentum):
    module = on_quadratic(optimizer=sgd(0.1, momentum=momentum), order=order)
    found = suggest_rates(
        module,
        loader(quadratic_batch(list(VALUES))),
        curvature=CurvatureOptions(criterion=criterion, tasks="worst"),
        ladder=LadderOptions(steps=40, longest=40, alphas=(0.125,), progress=False),
    )
    beta_c = 2 * (1 + momentum) / curvature(VALUES, 0.125).max()
    assert found.alpha_c == pytest.approx(alpha_c, rel=1e-6) and found.beta_c == pytest.approx(beta_c, rel=1e-6)
    # The largest rung below the limit, in steps of 2, though nothing of it was told to the ladder.
    rungs = found.ladder.betas
    assert found.ladder.largest.tolist() == [rungs[rungs < beta_c][-1]]
    # Of those tried up to a quarter of it the one whose loss is lowest, simulated here.
    tried = rungs[~np.isnan(found.ladder.losses[0]) & (rungs <= 0.25 * found.ladder.largest[0])]
    x = quadratic_batch(list(VALUES)).support[0][0].numpy()
    hessian = x.T @ x * 2 / len(x)
    inner = np.eye(4) - 0.125 * hessian
    jacobian = hessian @ inner @ (inner if order == "exact" else np.eye(4))
    ends = []
    for beta in tried:
        theta, velocity, losses = np.ones(4), np.zeros(4), []
        for _ in range(40):
            losses.append(np.square(x @ inner @ theta).mean())
            velocity = momentum * velocity + jacobian @ theta
            theta = theta - beta * velocity
        ends.append(np.mean(losses[-10:]))
    assert found.suggestion() == (0.125, tried[np.argmin(ends)]) and len(tried) > 1
    assert (found.configured_alpha, found.configured_beta, found.status) == (0.1, 0.1, "safe")
    assert found.losses[1] < found.losses[0] and not found.reasons and not found.notices


def test_the_smallest_limits_over_the_batches_count():
    batches = [quadratic_batch(list(VALUES * factor)) for factor in (1, 2, 0.5, 1)]
    found = suggest_rates(on_quadratic(), loader(*batches), batches=3, ladder=AT_ONE)
    assert [report.alpha_c for report in found.reports] == pytest.approx([0.5, 0.25, 1.0], rel=1e-6)
    assert found.alpha_c == pytest.approx(0.25, rel=1e-6) and found.alpha == 0.125
    each = [report.beta_c for report in found.suggested_reports]
    assert found.beta_c == min(each) and len(each) == 3


def test_accumulated_batches_are_averaged():
    batches = [quadratic_batch(list(VALUES * factor)) for factor in (1, 2)] * 4
    closely = CurvatureOptions(tol=1e-3)  # else as closely as the judgement of the rate needs
    given = {"batches": 2, "ladder": AT_ONE, "curvature": closely}
    found = suggest_rates(on_quadratic(), loader(*batches), accumulate_grad_batches=2, **given)
    both = sum(VALUES * factor * (1 - 0.125 * VALUES * factor) ** 2 for factor in (1, 2)) / 2
    assert found.beta_c == pytest.approx(2 / both.max(), rel=1e-6) and len(found.reports) == 2
    alone = suggest_rates(on_quadratic(), loader(*batches), **given)
    assert found.losses[0] == pytest.approx(alone.losses[0], rel=1e-6)  # of the same batches
    assert found.ladder.start != alone.ladder.taken


def test_the_suggested_pair_trains():
    torch.manual_seed(0)
    module, data = MetaLearningModule(mlp(), optimizer=sgd(1.0)), TaskDataModule(Sinusoid(10), 8, val_episodes=0)
    found = suggest_rates(module, data, ladder=LadderOptions(20, 20, (0.01, 0.03), progress=False))
    found.apply(module)
    trainer = Trainer(max_steps=80, accelerator="cpu", logger=False, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data)
    assert found.status == "unsafe" and float(trainer.callback_metrics["train/loss"]) < 0.9 * found.losses[0]


class Wells(LightningModule):
    """(w^2 - 1)^2 from just outside its inflection, where the curvature is small and the slope is not."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.6))

    def training_step(self, batch, batch_idx):
        return (self.w**2 - 1) ** 2

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.01)


def test_where_the_loss_leaves_long_before_the_limit_a_rate_that_trains_is_found():
    found = suggest_rates(Wells(), loader(torch.zeros(1)), ladder=QUICK)
    assert found.beta_c == pytest.approx(2 / (12 * 0.36 - 4), rel=1e-3)
    assert found.beta < 0.05 * found.beta_c and found.ladder.repeated
    w = 0.6
    for _ in range(200):
        w -= found.beta * 4 * w * (w**2 - 1)
    assert w == pytest.approx(1, abs=1e-3)
    assert "the loss of the batches trained on goes from" in str(found)


class Late(Wells):
    """Learns from its 20th batch on; before that each step goes the wrong way."""

    def training_step(self, batch, batch_idx):
        loss = (self.w**2 - 1) ** 2
        return loss if batch >= 20 else 2 * loss.detach() - loss


@pytest.mark.parametrize("longest", [8, 40])
def test_rates_at_which_nothing_is_learned_yet_go_on_longer(longest):
    ladder = LadderOptions(steps=8, longest=longest, progress=False)
    found = suggest_rates(Late(), loader(*torch.arange(60)), batches=1, ladder=ladder)
    assert np.all(~(found.ladder.losses < found.ladder.start[:, None]))  # none trains in 8 steps
    assert math.isnan(found.beta) == (longest == 8)
    if longest == 40:
        assert found.losses[1] < 0.1 * found.losses[0] and found.ladder.race_steps == 40 and not found.notices


def test_a_rate_above_one_whose_loss_leaves_is_not_the_largest():
    class Gap(Wells):  # one step of 0.1 beta, to where the loss is low or has no value
        def training_step(self, batch, batch_idx):
            w = self.w.detach()
            low = torch.where((w < 0.4) | ((w > 0.56) & (w < 0.57)), math.nan, 0.5)
            return torch.where(w < 0.6, low + 0 * self.w, 1 + 0.1 * (self.w - w))

    found = suggest_rates(Gap(), loader(torch.zeros(1)), ladder=QUICK)
    ends = dict(zip(found.ladder.betas.tolist(), found.ladder.losses[0].tolist(), strict=True))
    assert ends[0.16] == 0.5 and ends[0.32] == math.inf and ends[0.64] == ends[1.28] == 0.5
    assert found.ladder.largest == [0.16] and found.beta <= 0.04


@pytest.mark.parametrize("margin", [0.1, 0.25, 0.5])
def test_no_rate_above_the_share_of_the_largest_is_suggested(margin):
    class Bowl(Wells):  # in which the lowest loss is right below the largest rate that trains, 2
        def training_step(self, batch, batch_idx):
            return 0.5 * self.w**2

    found = suggest_rates(Bowl(), loader(torch.zeros(1)), margin=margin, ladder=QUICK)
    (largest,) = found.ladder.largest
    below = found.ladder.betas[found.ladder.betas <= margin * largest]
    assert 1 < largest < 2 and found.beta == below[-1]


@pytest.mark.parametrize("algorithm", [None, "value"])
def test_the_ladder_clips_as_the_run_does(algorithm):
    free = suggest_rates(Wells(), loader(torch.zeros(1)), ladder=QUICK)
    found = suggest_rates(
        Wells(), loader(torch.zeros(1)), ladder=QUICK, gradient_clip_val=0.01, gradient_clip_algorithm=algorithm
    )
    assert not found.notices and found.beta > 8 * free.beta


def test_the_runs_precision_is_kept():
    found = suggest_rates(Wells(), loader(torch.zeros(1)), precision="64-true", ladder=QUICK)
    single = suggest_rates(Wells(), loader(torch.zeros(1)), ladder=QUICK)
    limit = 2 / (12 * float(torch.tensor(0.6)) ** 2 - 4)
    assert found.beta_c == pytest.approx(limit, rel=1e-12) and single.beta_c != found.beta_c


def test_unsafe_rates_get_the_guards_own_verdict():
    module = on_quadratic(beta=3.0)
    found = suggest_rates(module, loader(quadratic_batch(list(VALUES))), ladder=AT_ONE)
    assert found.status == "unsafe" and found.reasons[0].startswith("beta = 3 is 2.2x beta_c = 1.39")
    assert "The next 10 steps, tried on copies at alpha = 0.1 and beta = 3" in found.reasons[1]
    guard = ConvergenceGuard(action="log")
    fit(module, quadratic_batch(list(VALUES)), 1, [guard])
    assert guard.history[0].status == "unsafe" and guard.history[0].beta_c == found.reports[0].beta_c


@pytest.mark.parametrize("kind", [Adam, lambda p, lr: AdamW(p, lr, weight_decay=0.1), NAdam, RMSprop])
def test_optimizers_without_a_limit_before_their_first_step_get_a_rate(kind):
    module = MetaLearningModule(mlp(hidden=(8,)), inner_lr=0.01, optimizer=lambda p: kind(p, lr=1e-3))
    data = TaskDataModule(Sinusoid(shots=5), meta_batch_size=3)
    found = suggest_rates(module, data, batches=1, ladder=QUICK, lookahead=LookaheadOptions(steps=0))
    assert math.isnan(found.beta_c) and found.status == "unresolved" and not found.notices
    assert found.beta == found.ladder.suggested[found.ladder.best] in found.ladder.betas
    assert found.beta <= 0.25 * found.ladder.largest[found.ladder.best]
    assert "configured 0.001, beta_c not known, largest that trains" in str(found)


def test_what_is_printed_and_drawn():
    matplotlib.use("Agg")
    batches = [quadratic_batch(list(VALUES)), quadratic_batch(list(2 * VALUES))]
    found = suggest_rates(on_quadratic(beta=3.0), loader(*batches), ladder=AT_ONE)
    lines = str(found).splitlines()
    assert lines[0].startswith(f"Rates before training ({found.ladder.taken} steps at up to 22 pairs of rates on cop")
    assert lines[0].endswith(" s; critical values over 2 batches):")
    assert lines[1] == "  inner rate alpha: configured 0.1, alpha_c 0.25, suggested 0.125"
    assert lines[2].startswith("  outer rate beta: configured 3, beta_c ")
    assert lines[2].endswith(f"largest that trains {found.ladder.largest[0]:.3g}, suggested {found.beta:.3g}")
    assert lines[3].startswith("  at the suggested pair the loss of the batches trained on goes from")
    assert lines[4].startswith("The configured rates are unsafe. beta = 3 is 2.2x")
    assert "Lower" not in str(found)  # what to set is what is suggested
    assert all(len(line) <= 100 for line in lines[4:])
    figure, ax = found.plot()
    assert ax.get_xscale() == "log" and "before training" in [text.get_text() for text in ax.get_legend().get_texts()]
    drawn = next(line for line in ax.lines if line.get_label() == r"$\alpha$ = 0.12")
    assert set(drawn.get_xdata()) == set(found.ladder.betas[~np.isnan(found.ladder.losses[0])])
    assert any(line.get_xdata()[0] == found.beta for line in ax.lines if line.get_linestyle() == "--")
    region = figure.axes[1]
    said = {text.get_text() for text in region.get_legend().get_texts()}
    beyond, curve = "simplified criterion beyond the measured $\\alpha$", r"$\beta_c(\alpha)$, other batches"
    marks = {"configured rates", "suggested rates"}
    assert said == marks | {"safe region, smallest", r"$\beta_c(\alpha)$, smallest", beyond, curve}
    marks = [tuple(part.get_offsets()[0]) for part in region.collections if len(part.get_offsets()) == 1]
    assert (0.1, 3.0) in marks and found.suggestion() in [pytest.approx(mark) for mark in marks]
    # The filled region's border passes through the limit that was measured at the suggested alpha.
    border = max(region.lines, key=lambda line: line.get_linewidth()).get_xydata()
    assert np.interp(found.alpha, *border.T) == pytest.approx(found.beta_c, rel=2e-2)
    assert len(found.plot(figure.axes[0])[0].axes) == len(figure.axes)


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
    matplotlib.use("Agg")
    found = suggest_rates(Plain(momentum=0.5), shuffled(), ladder=QUICK)
    assert math.isnan(found.alpha) and 0 < found.beta <= 0.25 * found.ladder.largest[0]
    for report in found.reports:
        assert report.beta_c == pytest.approx(3.0 / report.lambda_max, rel=2e-2)
    lines = str(found).splitlines()
    assert lines[1].startswith("  learning rate beta: configured 0.1, beta_c ") and "alpha" not in lines[1]
    figure, ax = found.plot()
    assert len(figure.axes) == 1 and "plain training" in [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("count", [6, 9])
def test_batches_are_set_aside_where_there_are_few(count):
    """Of 9 batches the first 4 only judge; of 6 there are too few, and it is said."""
    trained = []

    class Seen(Wells):
        def training_step(self, batch, batch_idx):
            trained.append(int(batch))
            return (self.w**2 - 1) ** 2 + 0 * batch.sum()

    asked = []
    original = at_start.LadderSearch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at_start, "LadderSearch", lambda *a: asked.append(a) or original(*a))
        found = suggest_rates(Seen(), loader(*torch.arange(count)), batches=1, ladder=QUICK)
    problems, held, fresh = asked[0][:3]
    assert not fresh and len(held) == (4 if count == 9 else 0) and found.ladder.repeated == (count == 6)
    training = {id(next(problems)) for _ in range(2 * count)}
    assert len(training) == count - len(held) and not training & {id(each) for each in held}


def test_a_network_that_cannot_be_vmapped_is_tried_in_a_loop():
    class Stubborn(Plain):
        def training_step(self, batch, batch_idx):
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            return loss * (1 if float(loss.detach()) > 0 else -1)

    with pytest.warns(GuardWarning, match="rungs of a ladder of rates cannot be vectorised"):
        found = suggest_rates(Stubborn(), shuffled(), batches=1, ladder=LadderOptions(steps=12, longest=12))
    assert found.ladder.looped and found.beta > 0


def test_nothing_is_touched():
    module, data = Plain(), shuffled()
    module.net[0].weight.grad = torch.ones(8, 2)
    module.eval()
    before = copy.deepcopy(module.state_dict())
    rng, drawn = torch.get_rng_state(), data.generator.get_state()
    suggest_rates(module, data, lookahead=LookaheadOptions(steps=2), ladder=QUICK)
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
            found = suggest_rates(module, data, batches=2, ladder=QUICK)
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
    found = suggest_rates(Foreign(), problem=problem, ladder=QUICK)
    assert found.alpha_c == pytest.approx(0.5, rel=1e-6)
    assert found.configured_beta == pytest.approx(0.4)  # not the schedule's first 4e-4
    assert 0.4 in found.ladder.betas and found.beta > 0.01


def test_under_a_cyclic_schedule_the_rate_is_its_peak():
    class Cycled(Plain):
        def configure_optimizers(self):
            optimizer = SGD(self.parameters(), lr=0.1)
            return [optimizer], [{"scheduler": OneCycleLR(optimizer, 0.3, total_steps=50), "interval": "step"}]

    found = suggest_rates(Cycled(), shuffled(), batches=1, ladder=QUICK)
    assert found.setting == "max_lr" and found.configured_beta == pytest.approx(0.3)


def test_a_part_that_adapts_keeps_its_rates_in_proportion():
    module = MetaLearningModule(mlp(hidden=(8,)), adapt="*2*", inner_lr=0.01, optimizer=sgd(0.1))
    found = suggest_rates(module, TaskDataModule(Sinusoid(shots=5), meta_batch_size=2), batches=1, ladder=QUICK)
    assert found.suggested_reports[0].alpha == pytest.approx(found.alpha, rel=1e-6) and found.alpha > 0


def test_an_optimizer_that_needs_a_closure_is_not_tried():
    module = on_quadratic(optimizer=lambda parameters: LBFGS(parameters, lr=0.1))
    found = suggest_rates(module, loader(quadratic_batch(list(VALUES))))
    assert found.ladder is None and math.isnan(found.beta) and found.alpha == 0.1
    assert found.notices[0].startswith("The next steps cannot be tried.")
    assert found.notices[1].startswith("No rates are suggested, for none were tried: LBFGS cannot step several")
    for use in (found.plot, lambda: found.apply(module)):
        with pytest.raises(ValueError, match="no rates"):
            use()


def test_an_optimizer_that_climbs_the_loss_is_not_tried():
    module = on_quadratic(optimizer=lambda parameters: SGD(parameters, lr=0.1, maximize=True))
    found = suggest_rates(module, loader(quadratic_batch(list(VALUES))))
    assert found.ladder is None and math.isnan(found.beta)
    assert "the optimizer climbs the loss (maximize=True)" in found.notices[-1]


@pytest.mark.parametrize(
    ("steps", "said"), [(0, "LadderOptions has steps=0"), (8, "at none of those tried is the loss")]
)
def test_nothing_to_learn_no_suggestion(steps, said):
    ladder = LadderOptions(steps=steps, longest=steps, progress=False)

    class Climbs(Wells):
        def training_step(self, batch, batch_idx):
            return self.w - 2 * self.w.detach()  # whose slope points the wrong way

    found = suggest_rates(Climbs(), loader(torch.zeros(1)), ladder=ladder)
    assert math.isnan(found.beta) and said in found.notices[-1]


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
        ({"ladder": 40}, TypeError, "`ladder` to be a LadderOptions but got int. Pass LadderOptions"),
        ({"accumulate_grad_batches": 0}, ValueError, "`accumulate_grad_batches` to be an integer of at least 1"),
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
def test_new_tasks_at_every_step(resample):
    module = MetaLearningModule(mlp(hidden=(8,)), optimizer=sgd(0.1, momentum=0.9))
    data = TaskDataModule(Sinusoid(shots=5), meta_batch_size=3, resample=resample)
    found = suggest_rates(module, data, batches=2, lookahead=LookaheadOptions(steps=0), ladder=QUICK)
    assert found.ladder.repeated != resample
    if resample:
        assert found.beta_c_noise == min(report.beta_c_noise for report in found.suggested_reports) < found.beta_c
        assert f"({found.beta_c_noise:.3g} while every step draws new tasks)" in str(found)
    else:
        assert math.isnan(found.beta_c_noise) and "new tasks" not in str(found)


def test_several_loaders_and_one_batch():
    class Two(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

    found = suggest_rates(Two(), {"a": shuffled(), "b": shuffled()}, batches=1, ladder=QUICK)
    assert len(found.reports) == 1 and found.beta > 0
