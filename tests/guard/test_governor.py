import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    StepLR,
)

from lightning_maml_guard.guard.governor import RateGovernor, scheduled_rate

SCHEDULERS = {
    "step": lambda o: StepLR(o, 3),
    "exponential": lambda o: ExponentialLR(o, 0.8),
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: OneCycleLR(o, 1.0, total_steps=20, cycle_momentum=False),
    "warm restarts": lambda o: CosineAnnealingWarmRestarts(o, 4),
}


def stepped(make, cap, steps=10, **options):
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], **{"lr": 1.0, **options})
    scheduler = make(optimizer)
    governor = RateGovernor([optimizer], cap)
    scheduled, moved = [], []
    for _ in range(steps):
        weight.grad = torch.ones(1)
        before = weight.detach().clone()
        optimizer.step()
        moved.append(float((before - weight).detach()))
        scheduled.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step()
    governor.remove()
    return scheduled, moved


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedule_goes_its_way_and_the_applied_rate_is_the_cap(name):
    free, _ = stepped(SCHEDULERS[name], None)
    scheduled, moved = stepped(SCHEDULERS[name], 0.25)
    assert scheduled == free
    assert moved == pytest.approx([min(rate, 0.25) for rate in scheduled], abs=1e-6)


def test_a_tensor_rate_stays_the_same_object():
    weight = nn.Parameter(torch.ones(1))
    optimizer = Adam([weight], lr=torch.tensor(1.0), capturable=False, foreach=False)
    rate = optimizer.param_groups[0]["lr"]
    governor = RateGovernor([optimizer], 0.25)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == 1.0
    assert float(1 - weight) == pytest.approx(0.25, rel=1e-4)
    governor.remove()


def test_one_factor_scales_all_groups():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}], lr=1.0)
    assert scheduled_rate(optimizer) == 1.0
    governor = RateGovernor([optimizer], 0.5)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert (float(1 - a), float(1 - b)) == pytest.approx((0.5, 0.05))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]
    governor.remove()


def test_a_step_that_raises_leaves_no_cap_behind():
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    governor = RateGovernor([optimizer], 0.5)

    def closure():
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        optimizer.step(closure)
    governor.remove()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_remove_takes_every_hook_out():
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    RateGovernor([optimizer], 0.5).remove()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_two_governors_apply_the_lower_cap_and_leave_the_schedule():
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    governors = [RateGovernor([optimizer], 0.5), RateGovernor([optimizer], 0.25)]
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.ones(1)
        optimizer.step()
        assert float((before - weight).detach()) == pytest.approx(0.25)
        assert optimizer.param_groups[0]["lr"] == 1.0
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0
    for governor in governors:
        governor.remove()
