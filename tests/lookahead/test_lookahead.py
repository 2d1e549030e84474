"""A lookahead is compared with training for real: the same steps on a copy of everything."""

import copy
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam

from lightning_maml_guard import MetaLearningModule, MetaProblem
from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import LOSS_COST, Caps, Lookahead, lookahead_of
from lightning_maml_guard.lookahead.results import LookaheadResult
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.optim.shadow import ClosureError, next_update
from lightning_maml_guard.stability.hvp import MeasurementCache
from lightning_maml_guard.stability.problems import PlainProblem
from lightning_maml_guard.tasks.regression import Sinusoid
from tests.helpers import linear_module, quadratic_batch

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.02),
    "momentum": lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: Adam(p, lr=0.01),
}


def sinusoids(count):
    return [Sinusoid().sample(3, torch.Generator().manual_seed(seed)) for seed in range(count)]


def really(module, optimizer, batches, steps, clip=None):
    """Take the steps, on the live module."""
    losses = []
    for step in range(steps):
        result = meta_gradient(module.meta_problem(batches[step % len(batches)]))
        losses.append(float(result.losses.mean()))
        for name, value in module.theta().items():
            value.grad = result.gradients[name].clone()
        if clip is not None:
            clip(list(module.theta().values()))
        optimizer.step()
    return [*losses, float(meta_gradient(module.meta_problem(batches[0])).losses.mean())]


@pytest.mark.parametrize("order", ["exact", "first", "simplified"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_lookahead_sees_what_training_will_do_and_touches_nothing(name, order):
    torch.manual_seed(0)
    module = MetaLearningModule(mlp().double(), inner_lr=0.02, inner_steps=2, order=order).double()
    optimizer = OPTIMIZERS[name](module.parameters())
    batches = [tuple(tuple(x.double() for x in part) for part in batch) for batch in sinusoids(3)]
    really(module, optimizer, batches, 2)  # so that there is momentum
    before = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    found = Lookahead([module.meta_problem(batch) for batch in batches], optimizer, 5).run()
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in before[0].items())
    assert str(before[1]) == str(optimizer.state_dict())
    assert torch.equal(before[2], torch.get_rng_state())
    assert found.losses == pytest.approx(really(module, optimizer, batches, 5), rel=1e-6)


def test_it_can_begin_with_another_batch():
    torch.manual_seed(0)
    batches = sinusoids(3)
    module = MetaLearningModule(mlp(), inner_lr=0.02)
    optimizer = SGD(module.parameters(), lr=0.02)
    found = Lookahead([module.meta_problem(batch) for batch in batches], optimizer, 4).run(first=2)
    turned = [batches[2], batches[0], batches[1]]
    assert found.losses == pytest.approx(really(module, optimizer, turned, 4), rel=1e-5)


@pytest.mark.parametrize(("sharpness", "fails"), [([40.0, 1, 1, 1, 1, 1], False), ([40.0] * 4, True), ([40.0], True)])
def test_one_odd_batch_is_not_a_diverging_run(sharpness, fails):
    weight = nn.Parameter(torch.ones(1))
    problems = [PlainProblem({"w": weight}, lambda p, c=c: 0.5 * c * (p["w"] ** 2).sum()) for c in sharpness]
    trainer = SimpleNamespace(gradient_clip_val=None)
    lookahead = lookahead_of(problems, SGD([weight], lr=0.1), 2, trainer, MeasurementCache())
    found, reference, severe = lookahead.judged(Caps(), Scale(1.0), 3.0)
    # One step on the odd batch multiplies the weight by 1 - 0.1 * 40 = -3, one on the others by 0.9.
    end = 20 * 3**4 if fails else 0.5 * 0.9**4
    assert reference.start == 1.0 and found.end == pytest.approx(end) and severe == pytest.approx(math.log(end))
    # Two gradients a run, and the loss after them.
    assert lookahead.gradients == (2 + LOSS_COST) * (1 if len(sharpness) == 1 else 3)


def test_without_a_start_the_loss_at_hand_is_the_reference():
    weight = nn.Parameter(torch.ones(1))
    problem = PlainProblem({"w": weight}, lambda p: (p["w"] ** 2).sum())
    lookahead = lookahead_of(
        [problem], SGD([weight], lr=0.25), 2, SimpleNamespace(gradient_clip_val=None), MeasurementCache()
    )
    _, reference, severe = lookahead.judged(Caps(), Scale(), 3.0)
    assert (repr(reference), severe) == (repr(Scale(1.0)), pytest.approx(math.log(1 / 16)))


def test_lower_rates_are_those_of_a_run_configured_with_them():
    torch.manual_seed(0)
    batches = sinusoids(1)
    module = MetaLearningModule(mlp(), inner_lr=0.04)
    found = Lookahead([module.meta_problem(batches[0])], SGD(module.parameters(), lr=0.08), 4).run(0.25, 0.5)
    module.inner_lr = 0.01
    assert found.losses == pytest.approx(really(module, SGD(module.parameters(), lr=0.04), batches, 4), rel=1e-5)


def test_gradients_are_clipped_as_in_the_run():
    torch.manual_seed(0)
    batches = sinusoids(1)
    module = MetaLearningModule(mlp(), inner_lr=0.01)
    optimizer = SGD(module.parameters(), lr=0.5)

    def clip(parameters):
        nn.utils.clip_grad_norm_(parameters, 0.1)

    found = Lookahead([module.meta_problem(batches[0])], optimizer, 4, clip=clip).run()
    assert found.losses == pytest.approx(really(module, optimizer, batches, 4, clip), rel=1e-5)


def test_on_a_quadratic_it_is_the_power_of_the_multiplier():
    module = linear_module(2, 1.0, inner_lr=0.0, order="simplified")
    problem = module.meta_problem(quadratic_batch([4.0, 4.0], target=1.0))
    found = Lookahead([problem], 0.75, 6).run()  # 1 - 0.75*4 = -2 per step, so the loss grows fourfold
    assert found.growth == pytest.approx(4.0) and found.end == pytest.approx(4.0**6 * found.begin)


def test_plain_training_is_tried_too():
    weight = nn.Parameter(torch.ones(1))
    found = Lookahead([PlainProblem({"w": weight}, lambda p: (p["w"] ** 2).sum())], SGD([weight], lr=0.25), 3).run()
    assert found.losses == pytest.approx((1, 0.25, 0.0625, 0.015625))


def test_a_loss_that_was_not_finite_on_the_way_has_diverged():
    assert LookaheadResult((1.0, math.nan, 0.5)).end == LookaheadResult((1.0, math.inf)).end == math.inf


def test_an_optimizer_that_wants_a_closure_is_refused():
    module = linear_module(2, 1.0)
    with pytest.raises(ClosureError, match="LBFGS needs a closure"):
        Lookahead([module.meta_problem(quadratic_batch([1.0, 2.0]))], LBFGS(module.parameters()), 2)


def test_a_shadow_moves_the_parameters_an_optimizer_keeps_in_a_list_of_its_own():
    class Listed(SGD):
        def __init__(self, parameters, lr):
            super().__init__(parameters, lr=lr)
            self.mine = [value for group in self.param_groups for value in group["params"]]

        @torch.no_grad()
        def step(self):
            for value in self.mine:
                value.sub_(0.5 * value.grad)

    weight = nn.Parameter(torch.ones(2))
    optimizer, gradient = Listed([weight], lr=0.1), torch.tensor([1.0, 2.0])
    update = next_update(optimizer, {"w": weight}, {"w": gradient})
    assert torch.equal(update["w"], 0.5 * gradient) and torch.equal(weight, torch.ones(2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_losses_before_training_are_those_of_every_batch_at_the_same_parameters(name):
    torch.manual_seed(0)
    module = MetaLearningModule(mlp(), inner_lr=0.02, inner_steps=2)
    optimizer, batches = OPTIMIZERS[name](module.parameters()), sinusoids(3)
    really(module, optimizer, batches, 2)  # so that there is momentum, which must move nothing
    lookahead = Lookahead([module.meta_problem(batch) for batch in batches], optimizer, 5)
    for factor in (1.0, 0.5, 0.0):
        module.inner_lr = 0.02 * factor
        expected = [float(meta_gradient(module.meta_problem(batch)).losses.mean()) for batch in batches]
        assert lookahead.untrained(factor) == pytest.approx(expected, rel=1e-5)


def test_the_norm_of_every_batchs_gradient_is_that_of_the_meta_gradient():
    torch.manual_seed(0)
    module = MetaLearningModule(mlp(), inner_lr=0.02)
    problems = [module.meta_problem(batch) for batch in sinusoids(3)]
    expected = [
        torch.cat([each.flatten() for each in meta_gradient(problem).gradients.values()]).norm().item()
        for problem in problems
    ]
    lookahead, state = Lookahead(problems, SGD(module.parameters(), lr=0.1), 5), torch.get_rng_state()
    assert lookahead.gradient_norms() == pytest.approx(expected, rel=1e-5)
    assert lookahead.gradients == 3 and torch.equal(torch.get_rng_state(), state)


def test_a_number_of_steps_can_be_given_and_a_highest_loss_ends_them():
    weight = nn.Parameter(torch.ones(1))
    problem = PlainProblem({"w": weight}, lambda p: 0.5 * (p["w"] ** 2).sum())
    lookahead = Lookahead([problem], SGD([weight], lr=3.0), 10)  # the loss grows fourfold in each step
    grown = [0.5 * 4**step for step in range(7)]
    assert lookahead.run(steps=6).losses == pytest.approx(grown) and lookahead.gradients == 6 + LOSS_COST
    # The loss above the highest is the last one that is tried; one at the highest is not above it.
    assert (
        lookahead.run(steps=6, highest=grown[3]).losses == pytest.approx(grown[:5])
        and lookahead.gradients == 11 + LOSS_COST
    )
    assert lookahead.run(steps=6, highest=1e9).losses == pytest.approx(grown)
    # Without a highest loss all steps are tried, also beyond what is finite.
    assert len(lookahead.run(steps=100).losses) == 101
    ended = lookahead.run(steps=100, highest=1e38).losses
    assert len(ended) < 70 and not ended[-1] <= 1e38


def test_a_lookahead_knows_whether_a_step_depends_on_earlier_gradients():
    weight = nn.Parameter(torch.ones(1))
    problem = PlainProblem({"w": weight}, lambda p: (p["w"] ** 2).sum())
    for optimizer, memory in (
        (SGD([weight], lr=0.1), False),
        (SGD([weight], lr=0.1, momentum=0.9), True),
        (Adam([weight], lr=0.1), True),
    ):
        assert Lookahead([problem], optimizer, 1).has_memory == memory
    assert not Lookahead([problem], 0.1, 1).has_memory


@pytest.mark.parametrize(("evaluate", "gradients"), [(Lookahead.untrained, 0), (Lookahead.gradient_norms, 8)])
def test_batches_are_evaluated_one_gradient_at_a_time(evaluate, gradients, monkeypatch):
    weight, alive, most = nn.Parameter(torch.ones(5)), [], []
    problems = [PlainProblem({"weight": weight}, lambda params: params["weight"].pow(2).sum()) for _ in range(8)]
    evaluated = Lookahead._evaluate

    def counted(self, *args):
        value, gradient = evaluated(self, *args)
        alive.append(weakref.ref(gradient["weight"]))
        most.append(sum(each() is not None for each in alive))
        return value, gradient

    monkeypatch.setattr(Lookahead, "_evaluate", counted)
    assert len(evaluate(Lookahead(problems, SGD([weight], lr=0.1), 1))) == 8
    assert len(most) == gradients and max(most, default=0) <= 2


class LearnsRates(nn.Module):
    """MAML written by hand, with learned inner rates: of each entry, of each step, of the first layer alone."""

    def __init__(self, kind, steps=2):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.steps, self.kind = mlp().double(), steps, kind
        names = [name for name, _ in self.net.named_parameters()]
        shapes = {
            "entries": {name: value.shape for name, value in self.net.named_parameters()},
            "steps": {"": (steps,)},
            "some": {names[0]: (), names[1]: (steps, *dict(self.net.named_parameters())[names[1]].shape)},
        }[kind]
        made = (nn.Parameter(torch.full(shape, 0.02, dtype=torch.float64)) for shape in shapes.values())
        self.rates, self.shapes = nn.ParameterList(made), shapes

    @property
    def inner_lr(self):
        return self.rates[0] if self.kind == "steps" else dict(zip(self.shapes, self.rates, strict=True))

    def loss(self, params, data):
        return (torch.func.functional_call(self.net, params, (data[0],)) - data[1]).square().mean()

    def problem(self, batch):
        return MetaProblem(dict(self.net.named_parameters()), self.loss, *batch, self.inner_lr, self.steps)

    def mean_loss(self, batch):
        (sx, sy), (qx, qy) = batch
        total = 0.0
        for task in range(len(sx)):
            params, rates = dict(self.net.named_parameters()), self.inner_lr
            for step in range(self.steps):
                grads = torch.autograd.grad(self.loss(params, (sx[task], sy[task])), params.values(), create_graph=True)
                for (name, value), grad in zip(list(params.items()), grads, strict=True):
                    rate = rates[step] if self.kind == "steps" else rates.get(name, torch.zeros(()))
                    rate = rate[step] if rate.dim() == value.dim() + 1 else rate
                    params[name] = value - rate * grad
            total = total + self.loss(params, (qx[task], qy[task])) / len(sx)
        return total


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["entries", "steps", "some"])
def test_learned_inner_rates_move_as_training_moves_them(kind, name):
    module, batches = LearnsRates(kind), [tuple(tuple(x.double() for x in y) for y in each) for each in sinusoids(3)]
    optimizer = OPTIMIZERS[name](module.parameters())
    optimizer.param_groups[0]["lr"] *= 0.05
    problems = [module.problem(batch) for batch in batches]
    before = copy.deepcopy(module.state_dict())
    found = Lookahead(problems, optimizer, 6).run().losses
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in before.items())
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        loss = module.mean_loss(batches[step % 3])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    losses.append(module.mean_loss(batches[0]).item())
    assert found == pytest.approx(losses, rel=1e-6)
    assert any(not torch.equal(rate, before[f"rates.{index}"]) for index, rate in enumerate(module.rates))


@pytest.mark.parametrize("order", ["exact", "first"])
@pytest.mark.parametrize("learn", [True, "per_step"])
def test_our_own_learned_rates_move_too_and_those_of_no_optimizer_stay(order, learn):
    torch.manual_seed(0)
    arguments = {"inner_lr": 0.02, "inner_steps": 2, "order": order, "learn_inner_lr": learn}
    module = MetaLearningModule(mlp().double(), **arguments).double()
    batches = [tuple(tuple(x.double() for x in part) for part in batch) for batch in sinusoids(2)]
    optimizer, alone = SGD(module.parameters(), lr=2e-3), SGD(module.network.parameters(), lr=2e-3)
    problems = [module.meta_problem(batch) for batch in batches]
    found, fixed = (Lookahead(problems, each, 4).run().losses for each in (optimizer, alone))
    start, losses = copy.deepcopy(module.state_dict()), []
    assert fixed == pytest.approx(really(module, alone, batches, 4), rel=1e-6)
    module.load_state_dict(start)
    for step in range(4):
        result = meta_gradient(module.meta_problem(batches[step % 2]), learn_rates=True)
        losses.append(float(result.losses.mean()))
        for name, value in module.theta().items():
            value.grad = result.gradients[name].clone()
        for rate, gradient in module.inner_rates.with_gradients(result.rate_gradients, None):
            rate.grad = gradient.clone()
        optimizer.step()
    losses.append(float(meta_gradient(module.meta_problem(batches[0])).losses.mean()))
    assert found == pytest.approx(losses, rel=1e-6) and found[-1] != pytest.approx(fixed[-1], rel=1e-6)


def test_a_loss_that_takes_gradients_itself_is_evaluated_where_none_is_taken_of_it():
    weight = nn.Parameter(torch.ones(1))

    def penalty(params):
        return torch.autograd.grad((params["w"] ** 3).sum(), params["w"], create_graph=True)[0].pow(2).sum()

    lookahead = Lookahead([PlainProblem({"w": weight}, penalty)], SGD([weight], lr=0.01), 1)
    assert lookahead.untrained() == (9.0,) and lookahead.gradients == LOSS_COST
    assert lookahead.run().losses == pytest.approx((9.0, 9 * (1 - 0.01 * 36) ** 4))
