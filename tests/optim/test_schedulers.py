"""The schedule goes its way and the applied rate is the lower of schedule and cap, bit for bit."""

import csv

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, MetaProblem
from lightning_maml_guard.utils.lightning_compat import LightningModule, Trainer
from tests.helpers import fit, grouped

STEPS, CAP = 12, 0.5
SCHEDULERS = {
    "step": lambda o: StepLR(o, 3, gamma=0.5),
    "exponential": lambda o: ExponentialLR(o, 0.8),
    "linear": lambda o: LinearLR(o, 1.0, 0.1, total_iters=STEPS),
    "plateau": lambda o: ReduceLROnPlateau(o, factor=0.6, patience=1),
    "cosine to 0": lambda o: CosineAnnealingLR(o, STEPS // 2),
    "cosine to above 0": lambda o: CosineAnnealingLR(o, STEPS // 2, eta_min=0.3),
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step % 5)),
    "one cycle": lambda o: OneCycleLR(o, 1.0, total_steps=STEPS + 1, cycle_momentum=False),
    "cyclic": lambda o: CyclicLR(o, 0.1, 1.0, step_size_up=3, cycle_momentum=False),
    "warm restarts": lambda o: CosineAnnealingWarmRestarts(o, 4),
    "sequential": lambda o: SequentialLR(o, [ExponentialLR(o, 0.9), StepLR(o, 2, gamma=0.7)], [5]),
}


class Steps(LightningModule):
    """Plain training that keeps the scheduled rate before, in and after every step."""

    def __init__(self, make, infinite_at=()):
        super().__init__()
        self.net = nn.Linear(2, 1)
        nn.init.ones_(self.net.weight)
        self.make, self.infinite_at, self.seen = make, infinite_at, []

    def see(self, when):
        self.seen.append((when, self.trainer.optimizers[0].param_groups[0]["lr"]))

    def training_step(self, batch, batch_idx):
        self.log("steady", 1.0)
        loss = self.net(batch).pow(2).mean() * 1e-3
        return loss * torch.inf if batch_idx in self.infinite_at else loss

    def on_before_optimizer_step(self, optimizer):
        self.see("in")

    def optimizer_step(self, *args, **kwargs):
        self.see("before")
        super().optimizer_step(*args, **kwargs)
        self.see("after")

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=1.0)
        schedule = {"scheduler": self.make(optimizer), "interval": "step", "monitor": "steady"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def capping(**options):
    """A guard by whose measurement SGD is stable up to CAP at every step."""
    return ConvergenceGuard(
        **grouped(every_n_steps=1, action="rescale", steps=0, estimator=lambda product, start: [2 / CAP], **options)
    )


def rates_of_a_run(applied, module, guards, folder, **options):
    from pytorch_lightning.callbacks import LearningRateMonitor
    from pytorch_lightning.loggers import CSVLogger

    reached = applied(module.net.weight)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=CSVLogger(folder, flush_logs_every_n_steps=1), log_every_n_steps=1,
        callbacks=[*guards, LearningRateMonitor(logging_interval="step")], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader([torch.ones(3, 2)] * STEPS, batch_size=None))
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        monitored = [
            value for row in csv.DictReader(file) for name, value in row.items() if name.startswith("lr-") and value
        ]
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    return module.seen, monitored, reached


def assert_capped(free, capped, steps=STEPS):
    """The two runs' rates: scheduled by themselves and by LearningRateMonitor, and applied."""
    assert capped[:2] == free[:2] and len(free[2]) == steps
    assert capped[2] == [min(rate, CAP) for rate in free[2]]
    assert CAP in capped[2] and max(free[2]) > CAP


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:ConvergenceGuard")
def test_the_schedule_goes_its_way_and_the_applied_rate_is_the_cap(name, applied, tmp_path):
    free, capped = (rates_of_a_run(applied, Steps(SCHEDULERS[name]), guards, tmp_path) for guards in ([], [capping()]))
    assert_capped(free, capped)
    assert free[2] == [rate for when, rate in free[0] if when == "before"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"gradient_clip_val": 1e-3}, STEPS),
        ({"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}, STEPS),
        ({"accumulate_grad_batches": 3}, STEPS // 3),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:ConvergenceGuard")
def test_beside_clipping_and_accumulation(options, steps, applied, tmp_path):
    runs = [
        rates_of_a_run(applied, Steps(SCHEDULERS["lambda"]), guards, tmp_path, **options)
        for guards in ([], [capping()])
    ]
    assert_capped(*runs, steps)


@pytest.mark.filterwarnings("ignore:ConvergenceGuard")
def test_beside_a_scaler_that_skips_steps(applied, tmp_path):
    from pytorch_lightning.plugins import MixedPrecision

    runs = []
    for guards in ([], [capping()]):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
        runs.append(rates_of_a_run(applied, Steps(SCHEDULERS["step"], {0, 4}), guards, tmp_path, plugins=plugin))
    assert_capped(*runs, STEPS - 2)


class TwoOptimizers(LightningModule):
    """Manual optimisation: the problem is about the first optimizer's parameters."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.other = nn.Linear(2, 1), nn.Linear(2, 1)
        self.seen = []

    def rates(self):
        return [optimizer.param_groups[0]["lr"] for optimizer in self.trainer.optimizers]

    def training_step(self, batch, batch_idx):
        for optimizer, scheduler, net in zip(
            self.optimizers(), self.lr_schedulers(), (self.net, self.other), strict=True
        ):
            optimizer.zero_grad()
            self.manual_backward(net(batch).pow(2).mean() * 1e-3)
            self.seen.append(self.rates())
            optimizer.step()
            self.seen.append(self.rates())
            scheduler.step()

    def configure_optimizers(self):
        optimizers = [SGD(net.parameters(), lr=1.0) for net in (self.net, self.other)]
        return optimizers, [SCHEDULERS["lambda"](optimizers[0]), SCHEDULERS["exponential"](optimizers[1])]


def problem_of_the_first(module, batch):
    def task_loss(params, x):
        return torch.func.functional_call(module.net, params, (x,)).pow(2).mean() * 1e-3

    return MetaProblem(dict(module.net.named_parameters()), task_loss, batch[None], batch[None], inner_lr=0.0)


@pytest.mark.filterwarnings("ignore:ConvergenceGuard")
def test_two_optimizers_of_which_one_is_the_problems(applied):
    runs = []
    for guards in ([], [capping(problem=problem_of_the_first, criterion="simplified")]):
        module = TwoOptimizers()
        reached = applied(module.net.weight), applied(module.other.weight)
        trainer = fit(module, torch.ones(3, 2), STEPS, guards, max_steps=2 * STEPS)
        assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in trainer.optimizers)
        runs.append((module.seen, *reached))
    free, capped = runs
    assert capped[0] == free[0] and capped[2] == free[2] and len(free[1]) == STEPS
    assert capped[1] == [min(rate, CAP) for rate in free[1]] and max(free[1]) > CAP
