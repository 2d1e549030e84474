"""The forecast of the learning rates against the rates that a Lightning run then applies."""

import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, IterableDataset

from lightning_maml_guard.optim import rates_ahead
from lightning_maml_guard.optim.rates_ahead import RatesAhead, RateTrend, read_ahead
from lightning_maml_guard.utils.lightning_compat import Callback, LightningModule, Plan, Trainer, plan_of
from tests.helpers import QUIET

BATCHES, EPOCHS = 5, 3
pytestmark = pytest.mark.filterwarnings(
    "ignore:A `OneCycleLR` scheduler", "ignore:You're resuming from", "ignore:Detected call of"
)


class Warmup:
    """A callable object that counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return min(1.0, self.calls / 9)


def counting():
    calls, last = [], 0

    def factor(step):
        nonlocal last
        calls.append(step)
        last += 1
        return 1 / len(calls) + last

    return factor


class Own(LRScheduler):
    """A schedule that reads the rate it finds, its optimizer and the random state."""

    def get_lr(self):
        assert len(self.optimizer.param_groups) == len(self.base_lrs)
        return [group["lr"] * 1.1 + 0.01 * random.random() for group in self.optimizer.param_groups]


class OwnStep(LRScheduler):
    def step(self, epoch=None):
        self.optimizer.param_groups[0]["lr"] = 0.1 + 0.01 * self._step_count
        self._step_count += 1


SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step % 5)),
    "closure that counts": lambda o: LambdaLR(o, counting()),
    "object that counts": lambda o: LambdaLR(o, Warmup()),
    "multiplicative": lambda o: MultiplicativeLR(o, lambda step: 0.9 + 0.05 * (step % 3)),
    "step": lambda o: StepLR(o, 3, gamma=0.5),
    "multi step": lambda o: MultiStepLR(o, [2, 5, 9]),
    "exponential": lambda o: ExponentialLR(o, 0.8),
    "linear": lambda o: LinearLR(o, 0.1, 1.0, total_iters=6),
    "polynomial": lambda o: PolynomialLR(o, 8),
    "cosine": lambda o: CosineAnnealingLR(o, 6, eta_min=0.03),
    "one cycle": lambda o: OneCycleLR(o, 1.0, total_steps=40),
    "cyclic": lambda o: CyclicLR(o, 0.1, 1.0, step_size_up=3, cycle_momentum=False),
    "cyclic exp_range": lambda o: CyclicLR(o, 0.1, 1.0, 3, mode="exp_range", gamma=0.9, cycle_momentum=False),
    "warm restarts": lambda o: CosineAnnealingWarmRestarts(o, 4),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.01, 1.0, 4), CosineAnnealingLR(o, 8)], [4]),
    "sequential, nested": lambda o: SequentialLR(
        o, [SequentialLR(o, [ConstantLR(o, 0.3), Own(o)], [2]), LambdaLR(o, Warmup()), StepLR(o, 2)], [5, 9]
    ),
    "chained": lambda o: ChainedScheduler([ConstantLR(o, 0.1, 4), ExponentialLR(o, 0.9)], optimizer=o),
    "own": Own,
    "own step": OwnStep,
}


class Steps(LightningModule):
    """Plain training that keeps the rate which each optimizer step applies."""

    def __init__(self, make, optimizer=None, **config):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.make, self.config, self.seen = make, config, []
        self.optimizer = optimizer or (lambda groups: SGD(groups, lr=0.3, momentum=0.9))

    def training_step(self, batch, batch_idx):
        self.log("steady", 1.0)
        return self.net(batch).pow(2).mean() * 1e-3

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(max(float(group["lr"]) for group in optimizer.param_groups))

    def configure_optimizers(self):
        optimizer = self.optimizer([{"params": [self.net.weight]}, {"params": [self.net.bias], "lr": 0.2}])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), **self.config}}


def exact(value, depth=0):
    """Everything an object holds, as primitives, tensors by bits and identity."""
    if isinstance(value, torch.Tensor):
        return id(value), value._version, value.tolist()
    if isinstance(value, dict):
        return {key: exact(each, depth) for key, each in value.items() if key != "optimizer"}
    if isinstance(value, (list, tuple)):
        return [exact(each, depth) for each in value]
    if callable(value) and getattr(value, "__closure__", None):
        return [exact(cell.cell_contents, depth + 1) for cell in value.__closure__ if depth < 3]
    if isinstance(value, (LRScheduler, Warmup)):
        return id(value), exact(vars(value), depth)
    return value


def live(trainer):
    (optimizer,) = trainer.optimizers
    return (
        exact([config.scheduler for config in trainer.lr_scheduler_configs]),
        exact(vars(optimizer)["param_groups"]),
        exact(list(optimizer.state.values())),
        optimizer.step,
        optimizer.__dict__.get("_opt_called"),
        random.getstate(),
        torch.get_rng_state().numpy().tobytes(),
    )


class Ahead(Callback):
    """Walks the schedule at every hook."""

    def __init__(self, save_at=None, path=None):
        self.walks, self.save_at, self.path = [], save_at, path

    def walk(self, trainer, module):
        before = live(trainer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.walks.append(read_ahead(plan_of(trainer), trainer.optimizers, len(module.seen)))
        assert live(trainer) == before

    def on_train_start(self, trainer, module):
        random.seed(0)
        self.walk(trainer, module)

    def on_train_epoch_start(self, trainer, module):
        self.walk(trainer, module)

    def on_train_epoch_end(self, trainer, module):
        self.walk(trainer, module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.walk(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx in (1, BATCHES - 1):
            self.walk(trainer, module)
        if trainer.fit_loop.total_batch_idx == self.save_at:
            trainer.save_checkpoint(self.path)


def run(module, data=None, resume=None, save_at=None, path=None, **options):
    ahead = Ahead(save_at, path)
    trainer = Trainer(callbacks=[ahead], **{**QUIET, "max_epochs": EPOCHS, **options})
    data = [torch.ones(3, 2)] * BATCHES if data is None else data
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=resume)
    return ahead.walks, trainer


def assert_forecast(walks, seen, same=list, complete=True):
    """Every walk's rates are those that the run applied from there to its end."""
    ahead = [walk for walk in walks if walk.step < len(seen)]
    assert {walk.step for walk in ahead} == set(range(len(seen)))
    for walk in ahead:
        assert walk.failure is None
        assert same(walk.rates[: None if complete else len(seen) - walk.step]) == seen[walk.step :]
        assert walk.matches(walk.step, seen[walk.step]) and walk.matches(len(seen) - 1, seen[-1])


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if "own" not in name and "nested" not in name])
def test_the_forecast_is_what_the_run_applies(name, interval, frequency):
    module = Steps(SCHEDULERS[name], interval=interval, frequency=frequency)
    walks, _ = run(module, max_epochs=EPOCHS + frequency // 3)
    assert_forecast(walks, module.seen)


@pytest.mark.parametrize("name", ["own", "own step", "sequential, nested"])
def test_a_users_own_scheduler(name, monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.5)  # the walk leaves the random state, so it draws other numbers
    module = Steps(SCHEDULERS[name], interval="step")
    assert_forecast(run(module)[0], module.seen)


ITERATIONS = {"max_steps": 8, "max_epochs": -1}


@pytest.mark.parametrize(
    ("save_at", "options"), [(2, {}), (BATCHES - 1, {}), (BATCHES - 1, ITERATIONS), (BATCHES + 1, ITERATIONS)], ids=str
)
@pytest.mark.parametrize(
    ("name", "interval", "frequency", "accumulate"),
    [
        ("sequential", "step", 1, 2),
        ("one cycle", "step", 4, 2),
        ("object that counts", "step", 2, 2),
        ("lambda", "step", 3, 1),
        ("cosine", "epoch", 1, 2),
        ("exponential", "epoch", 2, 1),
    ],
)
def test_accumulation_and_a_resumed_run(name, interval, frequency, accumulate, options, save_at, tmp_path):
    options = {"accumulate_grad_batches": accumulate, **options}
    make = SCHEDULERS[name]
    path = str(tmp_path / "saved.ckpt")
    first = Steps(make, interval=interval, frequency=frequency)
    assert_forecast(run(first, save_at=save_at, path=path, **options)[0], first.seen)
    resumed = Steps(make, interval=interval, frequency=frequency)
    assert_forecast(run(resumed, resume=path, **options)[0], resumed.seen)
    assert len(resumed.seen) < len(first.seen)


def sequential_forgets_a_tensor():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.3))
    scheduler = SequentialLR(optimizer, [ConstantLR(optimizer, 0.01, 1), ExponentialLR(optimizer, 0.9)], [1])
    optimizer.step()
    scheduler.step()
    return optimizer.param_groups[0]["lr"] < 0.1


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda groups: SGD(groups[0]["params"] + groups[1]["params"], lr=torch.tensor(0.3)),
        lambda groups: Adam(groups[0]["params"] + groups[1]["params"], lr=torch.tensor(0.3), foreach=False),
    ],
)
@pytest.mark.parametrize("name", ["lambda", "sequential", "one cycle", "exponential", "warm restarts"])
def test_tensor_rates(name, optimizer):
    if name == "sequential" and sequential_forgets_a_tensor():
        pytest.skip("this torch's SequentialLR goes on from its warm-up's rate where the rate is a tensor")
    module = Steps(SCHEDULERS[name], optimizer, interval="step")
    walks, _ = run(module)
    assert_forecast(walks, module.seen, same=lambda rates: pytest.approx(rates, rel=1e-5, abs=1e-7))


class Endless(IterableDataset):
    def __iter__(self):
        yield from [torch.ones(3, 2)] * 20


def test_without_a_planned_end_the_walk_is_bounded(monkeypatch):
    monkeypatch.setattr(rates_ahead, "WITHOUT_END", 50)
    module = Steps(SCHEDULERS["cosine"], interval="step")
    walks, _ = run(module, Endless(), max_epochs=1)
    assert_forecast(walks, module.seen, complete=False)
    assert len(walks[0].rates) == 50


def test_an_iterable_data_set_with_max_steps():
    module = Steps(SCHEDULERS["cosine"], interval="step")
    walks, _ = run(module, Endless(), max_epochs=-1, max_steps=12)
    assert_forecast(walks, module.seen)
    assert len(walks[0].rates) == 12


class WithMethod(Steps):
    """The rate's factor is a method of the module, which holds the Trainer."""

    def __init__(self, **config):
        super().__init__(lambda o: LambdaLR(o, [self.factor, lambda step: self.factor(step) / 2]), **config)
        self.calls = 0

    def factor(self, step):
        self.calls += 1
        return (step + 1) / self.trainer.estimated_stepping_batches


def test_a_method_of_the_module():
    module = WithMethod(interval="step")
    walks, _ = run(module)
    assert_forecast(walks, module.seen)
    assert module.calls == 2 * (len(module.seen) + 1)  # two groups; none of them the walks


def by_step(scheduler, frequency=1):
    return SimpleNamespace(scheduler=scheduler, interval="step", frequency=frequency, reduce_on_plateau=False)


def optimizer_at(lr):
    return SGD([nn.Parameter(torch.ones(2))], lr=lr)


def walked(make, lr=0.3, steps=20, **plan):
    optimizer = optimizer_at(lr)
    config = by_step(make(optimizer))
    return read_ahead(Plan(**{"batch": 0, "epoch": 0, "batches": 5, "accumulate": 1, "steps": steps, "schedulers": (config,), **plan}), optimizer, 100)  # fmt: skip


class Raises(LRScheduler):
    def get_lr(self):
        if self.last_epoch == 3:
            raise ZeroDivisionError("no rate")
        return [0.1 * (1 + self.last_epoch) for _ in self.base_lrs]


class RaisesAtOnce(LRScheduler):
    def get_lr(self):
        if self.last_epoch > 0:
            raise ZeroDivisionError("no rate")
        return self.base_lrs


def generator_factor(o):
    factors = (1 / n for n in range(1, 100))
    return LambdaLR(o, lambda step: next(factors))


def test_a_scheduler_that_cannot_be_walked():
    ahead = walked(RaisesAtOnce)
    assert ahead.rates == [0.3] * 20 and isinstance(ahead.failure, ZeroDivisionError)
    assert walked(Raises).rates == [0.1, 0.2, pytest.approx(0.3)] + [pytest.approx(0.3)] * 17
    ahead = walked(generator_factor)
    assert ahead.rates == [0.3] * 20 and isinstance(ahead.failure, TypeError)


def test_what_is_too_large_to_copy(monkeypatch):
    monkeypatch.setattr("lightning_maml_guard.optim.scheduler_copy.LARGEST_COPY", 1000)
    for held in (torch.zeros(1000), "x" * 100_000):

        def make(o, held=held):
            scheduler = StepLR(o, 1)
            scheduler.held = held
            return scheduler

        ahead = walked(make)
        assert ahead.rates == [0.3] * 20 and isinstance(ahead.failure, ValueError)


def test_a_closure_on_the_optimizer_reads_the_copy():
    def make(o):
        return LambdaLR(o, lambda step: 1 + o.param_groups[0]["lr"])

    rate, expected = 0.3, []
    for _ in range(20):
        rate = 0.3 * (1 + rate)
        expected.append(rate)
    assert walked(make).rates == pytest.approx(expected)


def test_a_wrapper_of_the_optimizer_has_the_same_groups():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inside):
            self.inside, self.defaults, self.state = inside, inside.defaults, {}

        @property
        def param_groups(self):
            return self.inside.param_groups

    optimizer = optimizer_at(0.3)
    config = by_step(ExponentialLR(optimizer, 0.5))
    ahead = read_ahead(Plan(0, 0, 5, 1, 3, (config,)), Wrapper(optimizer), 0)
    assert ahead.rates == [0.3, 0.15, 0.075] and ahead.failure is None


def test_many_groups_are_walked_for_less_long():
    optimizer = SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(13)], lr=0.3)
    config = by_step(ExponentialLR(optimizer, 1.0))
    ahead = read_ahead(Plan(0, 0, 5, 1, 60_000, (config,)), optimizer, 0)
    assert len(ahead.rates) == 25_000 and not ahead.matches(25_000, 0.3)


class Noisy(Own):
    def get_lr(self):
        warnings.warn("a schedule that talks", stacklevel=2)
        return super().get_lr()


def test_random_states_and_warnings_stay_inside():
    optimizer = optimizer_at(0.3)
    with pytest.warns(UserWarning, match="talks"):
        config = by_step(Noisy(optimizer))
    before = random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ahead = read_ahead(Plan(0, 0, 5, 1, 20, (config,)), optimizer, 0)
    assert random.getstate() == before and ahead.failure is None and ahead.rates[-1] > 0.3


def test_manual_optimization_and_an_own_lr_scheduler_step():
    class Manual(Steps):
        def __init__(self):
            super().__init__(SCHEDULERS["lambda"])
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().step()

    class OwnHook(Steps):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step()

    for module in (Manual(), OwnHook(SCHEDULERS["lambda"])):
        walk = run(module)[0][0]
        assert walk.rates == [0.3] * BATCHES * EPOCHS and isinstance(walk.failure, NotImplementedError)


def test_plateau_is_constant_and_a_fired_one_no_longer_matches():
    module = Steps(lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0), interval="epoch", monitor="steady")
    walks, _ = run(module)
    assert walks[0].rates == [0.3] * BATCHES * EPOCHS and walks[0].failure is None
    assert walks[0].matches(BATCHES, module.seen[BATCHES]) and not walks[0].matches(2 * BATCHES, module.seen[-1])


def test_peak_and_crossing():
    ahead = walked(lambda o: LambdaLR(o, lambda step: min(step + 1, 10) / 10 if step < 15 else 0.1))
    assert ahead.peak() == (pytest.approx(0.3), 109) and ahead.peak(115) == (pytest.approx(0.03), 115)
    assert (
        ahead.first_above(0.16) == 105 and ahead.first_above(0.16, 112) == 112 and ahead.first_above(0.16, 115) is None
    )
    assert ahead.first_above(0.3) is None
    assert ahead.matches(100, 0.03) and not ahead.matches(101, 0.03) and not ahead.matches(99, 0.03)
    assert not ahead.matches(120, 0.03)
    # Ten steps of a rise, five at the peak, five at a tenth.
    assert ahead.mean_to_peak == pytest.approx((5.5 + 5 + 0.5) / 20)
    assert walked(lambda o: LambdaLR(o, lambda step: 0.0)).mean_to_peak == 1.0


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (SCHEDULERS["lambda"], "lr"),
        (SCHEDULERS["linear"], "lr"),
        (SCHEDULERS["sequential"], "lr"),
        (SCHEDULERS["warm restarts"], "lr"),
        (lambda o: LambdaLR(o, lambda step: min(step, 7)), "lr"),
        (lambda o: OneCycleLR(o, o.param_groups[0]["lr"], total_steps=20, cycle_momentum=False), "max_lr"),
        (lambda o: CyclicLR(o, 0.01, o.param_groups[0]["lr"], step_size_up=4, cycle_momentum=False), "max_lr"),
    ],
)
def test_the_number_to_configure_gives_the_peak(make, setting):
    ahead = walked(make)
    assert ahead.setting == setting and ahead.configured == 0.3
    number = ahead.lr_for_peak(0.05)
    assert walked(make, number).peak()[0] == pytest.approx(0.05)
    assert number == pytest.approx(0.05 * 0.3 / ahead.peak()[0])
    if ahead.peak()[0] == 0.3:
        assert number == 0.05


def test_a_long_run_is_walked_up_to_a_bound():
    ahead = walked(SCHEDULERS["cosine"], steps=10**6)
    assert len(ahead.rates) == rates_ahead.MOST


@pytest.mark.parametrize(("make", "expected"), [(SGD, {"momentum": 0.85}), (Adam, {"betas": (0.85, 0.999)})])
def test_the_momentum_where_a_cycle_peaks(make, expected):
    optimizer = make([nn.Parameter(torch.ones(1))], lr=0.1, **({"momentum": 0.9} if make is SGD else {}))
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=40)
    config = SimpleNamespace(scheduler=scheduler, interval="step", frequency=1, reduce_on_plateau=False)
    plan = Plan(steps=40, batches=None, batch=0, epoch=0, accumulate=1, schedulers=[config])
    present = optimizer.param_groups[0].get("momentum") or optimizer.param_groups[0]["betas"][0]
    assert present == pytest.approx(0.95)
    (found,) = read_ahead(plan, [optimizer], 0).at_peak
    assert found == {name: pytest.approx(value) for name, value in expected.items()}


def coming(rates, schedule=None, steps=10):
    known = RateTrend()
    return [known.take((0.1, rate), schedule, step, steps)[1] for step, rate in enumerate(rates)]


def test_a_rate_that_rises_by_hand_is_expected_to_go_on_rising():
    rates = [0.1 + 0.02 * step for step in range(30)]
    found = coming(rates)
    assert found[:10] == rates[:10]  # not from a few steps
    assert found[10:] == pytest.approx([rate + 10 * 0.02 for rate in rates[10:]])
    grown = [0.1 * 1.05**step for step in range(30)]
    for step, each in enumerate(coming(grown)[10:], 10):
        assert grown[step] < each < grown[step] * 1.05**10  # less than where it goes, as growth speeds up


@pytest.mark.parametrize(
    "rates",
    [
        [0.1] * 12 + [1.0] * 12,  # one that has jumped
        [0.1 - 0.003 * step for step in range(24)],
        [float("nan")] * 24,
        [0.1, 0.2] * 12,
    ],
)
def test_a_rate_that_does_not_rise_by_hand_is_expected_to_stay(rates):
    assert coming(rates) == pytest.approx(rates, nan_ok=True)


def test_the_highest_coming_rate_of_a_schedule_is_that_of_its_next_steps():
    rates = [0.1 * 0.9**step for step in range(20)] + [2.0, 1.0]
    schedule = RatesAhead(0, rates, configured=2.0)
    assert coming(rates, schedule) == [max(rates[step : step + 10]) for step in range(22)]
    # Another rate than the schedule's: it is moved by hand.
    assert coming([0.5] * 22, schedule) == [0.5] * 22
