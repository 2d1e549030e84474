import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from lightning_maml_guard.optim.lr_cap import LRCap, known_rate, scheduled_rate


def test_a_tensor_rate_stays_the_same_object():
    weight = nn.Parameter(torch.ones(1))
    optimizer = Adam([weight], lr=torch.tensor(1.0), capturable=False, foreach=False)
    rate = optimizer.param_groups[0]["lr"]
    cap = LRCap([optimizer], 0.25)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == 1.0
    assert float(1 - weight) == pytest.approx(0.25, rel=1e-4)
    cap.remove()


def test_one_factor_scales_all_groups():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}], lr=1.0)
    assert scheduled_rate(optimizer) == 1.0
    cap = LRCap([optimizer], 0.5)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert (float(1 - a), float(1 - b)) == pytest.approx((0.5, 0.05))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]
    cap.remove()


def test_a_step_that_raises_leaves_no_cap_behind():
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    cap = LRCap([optimizer], 0.5)

    def closure():
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        optimizer.step(closure)
    cap.remove()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_remove_takes_every_hook_out():
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    LRCap([optimizer], 0.5).remove()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_two_caps_apply_the_lower_cap_and_leave_the_schedule():
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    caps = [LRCap([optimizer], 0.5), LRCap([optimizer], 0.25)]
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
    for cap in caps:
        cap.remove()


class Recording(SGD):
    """Steps in its base class, whose step hooks torch runs as well, and goes on."""

    def step(self, closure=None):
        self.rates = [self.param_groups[0]["lr"]]
        loss = super().step(closure)
        self.rates.append(self.param_groups[0]["lr"])
        return loss


@pytest.mark.parametrize("closed", [False, True])
def test_the_cap_holds_through_the_whole_step_of_a_subclass(closed):
    SGD([nn.Parameter(torch.ones(1))])  # from the first SGD on, torch calls hooks in SGD.step too
    weight = nn.Parameter(torch.ones(1))
    optimizer = Recording([weight], lr=1.0)
    caps = [LRCap([optimizer], 0.5), LRCap([optimizer], 0.25)]
    weight.grad = torch.ones(1)
    for _ in range(2):
        optimizer.step((lambda: weight.sum()) if closed else None)
        assert optimizer.rates == [0.25, 0.25] and optimizer.param_groups[0]["lr"] == 1.0
    for cap in caps:
        cap.remove()


def test_what_a_closure_reads_and_writes_is_the_schedule():
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    caps = [LRCap([optimizer], 0.5), LRCap([optimizer], 0.4)]
    read = []

    def closure(rate):
        read.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.ones(1)

    for rate, applied in ((2.0, 0.4), (0.25, 0.25), (3.0, 0.4)):
        before = weight.item()
        optimizer.step(closure=lambda rate=rate: closure(rate))
        assert before - weight.item() == pytest.approx(applied) and optimizer.param_groups[0]["lr"] == rate
    assert read == [1.0, 2.0, 0.25]
    for cap in caps:
        cap.remove()


def fused(rate):
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [weight]} for weight in weights]
    return weights, torch.optim.Adam(groups, lr=torch.tensor(rate), fused=True)


def test_groups_that_share_a_tensor_rate_are_capped_once():
    """And a fused step with a tensor rate is bitwise that of an optimizer which was given the cap."""
    weights, optimizer = fused(0.8)
    expected, reference = fused(0.3)
    rate = optimizer.param_groups[0]["lr"]
    assert rate is optimizer.param_groups[1]["lr"]
    cap = LRCap([optimizer], 0.3)
    schedule = ExponentialLR(optimizer, 0.9)
    for step in range(4):
        for weight in [*weights, *expected]:
            weight.grad = torch.full((1,), 1.0 + step)
        optimizer.step()
        reference.step()
        schedule.step()
    assert all(map(torch.equal, weights, expected))
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    cap.remove()
    free = fused(0.8)[1]
    schedule = ExponentialLR(free, 0.9)
    for _ in range(4):
        free.step()
        schedule.step()
    assert torch.equal(rate, free.param_groups[0]["lr"])


def test_a_step_that_a_scaler_skips_touches_no_rate():
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    cap, scaler = LRCap([optimizer], 0.25), torch.amp.GradScaler("cpu", init_scale=2.0)
    schedule, moved = LambdaLR(optimizer, lambda step: 1 / (1 + step)), []
    for factor in (1.0, torch.inf, 1.0):
        before = weight.item()
        optimizer.zero_grad()
        scaler.scale(weight * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(before - weight.item())
        schedule.step()
    assert moved == [0.25, 0.0, 0.25] and optimizer.param_groups[0]["lr"] == 0.25
    cap.remove()


def test_the_known_rate_is_the_largest_of_all_groups():
    weight = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    one = SGD([{"params": weight[:1], "lr": 0.1}, {"params": weight[1:2], "lr": 0.4}], lr=1.0)
    other = Adam(weight[2:], lr=torch.tensor(0.7), capturable=False, foreach=False)
    assert known_rate([one]) == 0.4 and known_rate([one, other]) == pytest.approx(0.7)
    assert known_rate([one, other]) == scheduled_rate([one, other])
    assert math.isnan(known_rate([]))


def test_a_rate_on_a_device_is_not_read_from_there():
    """Reading it would wait for the device in every step."""
    weight = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    on_device = SGD(weight[:1], lr=0.1)
    on_device.param_groups[0]["lr"] = torch.empty((), device="meta")  # which cannot be read at all
    assert math.isnan(known_rate([on_device])) and math.isnan(known_rate([SGD(weight[1:], lr=0.5), on_device]))


@pytest.mark.parametrize("make", [SGD, lambda params, lr: SGD(params, lr=lr, momentum=0.9), Adam, AdamW])
@pytest.mark.parametrize("by_closure", [False, True])
def test_a_cap_of_zero_moves_nothing_whatever_the_gradient(make, by_closure):
    weight = nn.Parameter(torch.ones(3))
    optimizer = make([weight], lr=1.0)
    cap = LRCap([optimizer], 0.0)

    def compute():
        weight.grad = torch.tensor([math.nan, math.inf, 2.0])
        return torch.zeros(())

    if not by_closure:
        compute()
    optimizer.step(compute if by_closure else None)
    assert weight.tolist() == [1.0, 1.0, 1.0] and optimizer.param_groups[0]["lr"] == 1.0
    cap.remove()


def test_a_cap_of_zero_moves_nothing_by_a_sparse_gradient():
    weight = nn.Parameter(torch.ones(3, 1))
    optimizer = SGD([weight], lr=1.0)
    cap = LRCap([optimizer], 0.0)
    weight.grad = torch.sparse_coo_tensor([[1]], [[math.nan]], (3, 1))
    optimizer.step()
    assert weight.flatten().tolist() == [1.0, 1.0, 1.0]
    cap.remove()
