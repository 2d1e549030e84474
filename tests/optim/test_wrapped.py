"""Optimizers that wrap another one, as Lookahead and SAM do: tried on copies, and rolled back, with all they hold."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, GuardWarning, suggest_rates
from lightning_maml_guard.optim.shadow import ClosureError, ShadowOptimizer, needs_closure, next_update
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.utils.lightning_compat import LightningModule
from tests.helpers import fit


class Slow(Optimizer):
    """Slow weights that follow a wrapped optimizer's: Lookahead, by hand."""

    def __init__(self, inside, every=2):
        self.inside, self.every, self.taken = inside, every, 0
        super().__init__(inside.param_groups, inside.defaults)
        self.param_groups = inside.param_groups
        self.slow = {each: each.detach().clone() for group in self.param_groups for each in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inside.step(closure)
        self.taken += 1
        if self.taken % self.every == 0:
            for parameter, slow in self.slow.items():
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)
        return loss


class Delegating(Optimizer):
    """Has the wrapped optimizer's groups and state as properties."""

    def __init__(self, inside):
        self.inside, self.pair = inside, (inside, [inside])
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    param_groups = property(lambda self: self.inside.param_groups)
    state = property(lambda self: self.inside.state)

    def step(self, closure=None):
        return self.pair[1][0].step(closure)


def a_run(make, steps, rate=0.1):
    """A weight after some steps down a bowl."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make([weight], rate)
    go_on(weight, optimizer, steps)
    return weight, optimizer


def go_on(weight, optimizer, steps):
    for _ in range(steps):
        weight.grad = weight.detach() * torch.tensor([1.0, 3.0])
        optimizer.step()
    weight.grad = None


KINDS = {
    "Adam inside": lambda params, lr: Slow(Adam(params, lr=lr)),
    "momentum inside": lambda params, lr: Slow(SGD(params, lr=lr, momentum=0.9), every=3),
    "twice": lambda params, lr: Slow(Slow(Adam(params, lr=lr))),
    "properties": lambda params, lr: Delegating(Adam(params, lr=lr)),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_its_steps_on_copies_are_its_steps(make):
    weight, optimizer = a_run(make, 5)
    before = weight.detach().clone()
    shadow = ShadowOptimizer(optimizer, {"w": weight})
    for _ in range(4):
        shadow.step({"w": shadow.params["w"] * torch.tensor([1.0, 3.0])})
    assert torch.equal(weight, before)
    go_on(weight, optimizer, 4)
    assert not torch.equal(weight, before) and torch.equal(shadow.params["w"], weight)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_its_rate_on_copies_is_lowered(make):
    weight, optimizer = a_run(make, 0, rate=0.4)
    shadow = ShadowOptimizer(optimizer, {"w": weight}, factor=0.25)
    for _ in range(4):
        shadow.step({"w": shadow.params["w"] * torch.tensor([1.0, 3.0])})
    assert torch.equal(shadow.params["w"], a_run(make, 4, rate=0.1)[0])
    assert optimizer.param_groups[0]["lr"] == 0.4


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_rollback_takes_all_of_it_back(make):
    module = nn.Module()
    module.weight, optimizer = a_run(make, 6)
    snapshot = Snapshot(module, [optimizer], 6)
    go_on(module.weight, optimizer, 6)
    after = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.fill_(torch.nan)
    go_on(module.weight, optimizer, 6)
    snapshot = Snapshot.restored(copy.deepcopy(snapshot.state()))
    snapshot.restore(module, [optimizer])
    go_on(module.weight, optimizer, 6)
    assert torch.equal(module.weight, after)


def test_state_that_belongs_to_no_parameter_is_copied():
    class Counting(SGD):
        def step(self, closure=None):
            counted = self.state["all"]
            counted["steps"] = counted.get("steps", 0) + 1
            self.param_groups[0]["lr"] = 0.1 / counted["steps"]
            return super().step(closure)

    weight, optimizer = a_run(Counting, 3)
    shadow = ShadowOptimizer(optimizer, {"w": weight})
    shadow.step({"w": weight.detach() * torch.tensor([1.0, 3.0])})
    assert optimizer.state["all"] == {"steps": 3}
    go_on(weight, optimizer, 1)
    assert torch.equal(shadow.params["w"], weight)


class Sharpness(Optimizer):
    """SAM as the package that most use has it: its closure is None by default, and asserted."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.base_optimizer = SGD(self.param_groups, lr=lr)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "SAM requires closure, but it was not provided"
        closure = torch.enable_grad()(closure)
        loss = closure()
        moved = [(p, 0.05 * p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, by in moved:
            parameter.add_(by)
        self.zero_grad()
        closure()
        for parameter, by in moved:
            parameter.sub_(by)
        self.base_optimizer.step()
        return loss


class Broken(SGD):
    def step(self, closure=None):
        if closure is not None:
            closure()
        raise RuntimeError("a step of its own")


def test_one_that_asserts_its_closure_is_known_from_then_on():
    weight = nn.Parameter(torch.ones(2))
    optimizer = Sharpness([weight], lr=0.1)
    gradient = {"w": torch.ones(2)}
    assert next_update(optimizer, {"w": weight}, gradient) is None
    assert needs_closure(optimizer) and weight.tolist() == [1, 1]
    with pytest.raises(ClosureError, match="Sharpness needs a closure for a step"):
        ShadowOptimizer(optimizer, {"w": weight})


def test_an_error_of_its_own_is_no_missing_closure():
    weight = nn.Parameter(torch.ones(2))
    shadow = ShadowOptimizer(Broken([weight], lr=0.1), {"w": weight})
    with pytest.raises(RuntimeError, match="a step of its own"):
        shadow.step({"w": torch.ones(2)})
    assert not needs_closure(Broken([weight], lr=0.1))


def test_an_error_that_passes_is_no_missing_closure():
    class Once(SGD):
        """Its first step fails, as where memory runs out for a moment."""

        failed = False

        def step(self, closure=None):
            if not Once.failed:
                Once.failed = True
                raise MemoryError("a moment's lack of memory")
            return super().step(closure)

    weight = nn.Parameter(torch.ones(2))
    optimizer = Once([weight], lr=0.1)
    with pytest.raises(MemoryError, match="a moment's lack"):
        ShadowOptimizer(optimizer, {"w": weight}).step({"w": torch.ones(2)})
    assert not needs_closure(optimizer)
    update = next_update(optimizer, {"w": weight}, {"w": torch.ones(2)})
    torch.testing.assert_close(update["w"], torch.full((2,), 0.1))


def test_a_guard_says_so_where_no_step_can_be_tried():
    class Own(Sharpness):  # not seen by another test
        pass

    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    guard = ConvergenceGuard(every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Wrapped(0.01, Own), (x, x.sum(1, keepdim=True)), 3, [guard])
    said = [" ".join(str(each.message).split()) for each in caught if each.category is GuardWarning]
    assert sum("Own needs a closure for a step." in each for each in said) == 1
    assert not any("failed" in each for each in said)
    assert len(guard.history) == 3


def test_rates_before_training_say_so_too():
    class Own(Sharpness):
        pass

    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    found = suggest_rates(Wrapped(0.01, Own), DataLoader([(x, x.sum(1, keepdim=True))] * 3, batch_size=None))
    assert "Own needs a closure for a step" in " ".join(str(found).split())


class Wrapped(LightningModule):
    def __init__(self, lr, kind=lambda params, lr: Slow(SGD(params, lr=lr))):
        super().__init__()
        self.lr, self.kind, self.net = lr, kind, nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return self.kind(self.parameters(), self.lr)


@pytest.mark.parametrize(("lr", "unsafe"), [(0.01, False), (2.0, True)])
def test_a_guard_sees_whether_it_diverges(lr, unsafe):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=generator)
    guard = ConvergenceGuard(action="log")
    fit(Wrapped(lr), (x, x.sum(1, keepdim=True)), 1, [guard])
    assert (guard.advice is not None) == unsafe
    assert not unsafe or guard.advice.beta < 1
