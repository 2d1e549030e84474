import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RMSprop

from lightning_maml_guard import stability_limit
from lightning_maml_guard.optim.stability_limits import (
    UnknownOptimizerError,
    decoupled_decay,
    is_preconditioned,
    preconditioner,
    unwrap,
)
from tests.helpers import bisect

LAMBDA = 3.0
FROZEN = 1 - 1e-12  # a second-moment decay so close to 1 that v stays what it is
V = 0.49

CASES = {
    "sgd": lambda p, lr: SGD(p, lr=lr),
    "momentum": lambda p, lr: SGD(p, lr=lr, momentum=0.9),
    "dampening": lambda p, lr: SGD(p, lr=lr, momentum=0.8, dampening=0.5),
    "dampening without momentum": lambda p, lr: SGD(p, lr=lr, dampening=0.5),
    "nesterov": lambda p, lr: SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "adam": lambda p, lr: Adam(p, lr=lr, betas=(0.9, FROZEN)),
    "adam b1=.5": lambda p, lr: Adam(p, lr=lr, betas=(0.5, FROZEN)),
    "amsgrad": lambda p, lr: Adam(p, lr=lr, betas=(0.9, FROZEN), amsgrad=True),
    "adamw": lambda p, lr: AdamW(p, lr=lr, betas=(0.9, FROZEN), weight_decay=0),
    "nadam": lambda p, lr: NAdam(p, lr=lr, betas=(0.9, FROZEN)),
    "rmsprop": lambda p, lr: RMSprop(p, lr=lr, alpha=FROZEN),
    "rmsprop momentum": lambda p, lr: RMSprop(p, lr=lr, alpha=FROZEN, momentum=0.7),
    "adagrad": lambda p, lr: Adagrad(p, lr=lr),
}


def optimizer_with_frozen_v(make, lr, weight):
    optimizer = make([weight], lr)
    if isinstance(optimizer, SGD):
        return optimizer
    weight.grad = torch.zeros_like(weight)
    optimizer.step()  # lets the optimizer build its own state, which is then set
    state = optimizer.state[weight]
    for name in ("exp_avg_sq", "max_exp_avg_sq", "square_avg"):
        if name in state:
            state[name].fill_(V)
    if "sum" in state:
        state["sum"].fill_(V * 1e18)
    if "mu_product" in state:
        state["mu_product"].fill_(0.0)
    if isinstance(optimizer, (Adam, AdamW, NAdam)):
        state["step"].fill_(1e15)
    return optimizer


@pytest.mark.parametrize("name", CASES)
def test_the_limit_is_where_the_torch_optimizer_stops_converging(name):
    make = CASES[name]
    weight = torch.ones(1, dtype=torch.float64)

    def converges(lr):
        w = torch.full((1,), 1e-3, dtype=torch.float64)
        optimizer = optimizer_with_frozen_v(make, lr, w)
        sizes = []
        for _ in range(1500):
            w.grad = LAMBDA * w
            optimizer.step()
            sizes.append(abs(float(w)))
            if sizes[-1] > 1.0:  # a thousandfold; much further on v would no longer be frozen
                return False
        return max(sizes[-100:]) < max(1e-9, max(sizes[400:500]))

    fresh = optimizer_with_frozen_v(make, 1.0, weight)
    p = preconditioner(fresh)[weight]
    predicted = stability_limit(fresh) * float(p) / LAMBDA
    assert bisect(converges, predicted / 3, predicted * 3) == pytest.approx(predicted, rel=1e-3)
    assert is_preconditioned(fresh) == (not isinstance(fresh, SGD))


def test_adams_38():
    assert stability_limit(Adam([torch.zeros(1)])) == pytest.approx(38.0)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_preconditioner_is_the_denominator_adam_divides_by(amsgrad):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = Adam([weight], lr=1e-3, amsgrad=amsgrad)
    assert preconditioner(optimizer) == {weight: None}
    for k in range(5):
        weight.grad = torch.tensor([3.0 - k, 0.1 * k], dtype=torch.float64)
        before = weight.detach().clone()
        optimizer.step()
    m_hat = optimizer.state[weight]["exp_avg"] / (1 - 0.9**5)
    torch.testing.assert_close(
        preconditioner(optimizer)[weight], 1e-3 * m_hat / (before - weight.detach()), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("centered", [False, True])
def test_the_preconditioner_is_the_denominator_rmsprop_divides_by(centered):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = RMSprop([weight], lr=1e-3, centered=centered)
    for k in range(5):
        weight.grad = torch.tensor([3.0 - k, 0.1 * k + 1], dtype=torch.float64)
        before = weight.detach().clone()
        optimizer.step()
    torch.testing.assert_close(
        preconditioner(optimizer)[weight], 1e-3 * weight.grad / (before - weight.detach()), rtol=1e-9, atol=0
    )


def test_several_groups_have_the_smallest_of_their_limits():
    groups = [{"params": [torch.zeros(1)], "momentum": 0.9}, {"params": [torch.zeros(1)]}]
    assert stability_limit(SGD(groups, lr=0.1)) == 2.0


class MySGD(SGD):
    pass


@pytest.mark.parametrize("optimizer", [Adamax([torch.zeros(1)]), MySGD([torch.zeros(1)], lr=0.1)])
def test_an_unknown_optimizer_gets_a_statement_not_a_guess(optimizer):
    for function in (stability_limit, preconditioner, is_preconditioned):
        with pytest.raises(UnknownOptimizerError, match=f"{type(optimizer).__name__} is not known .known: SGD, Adam"):
            function(optimizer)


def test_maximising_has_no_stable_rate():
    with pytest.raises(UnknownOptimizerError, match="climbs the loss"):
        stability_limit(SGD([torch.zeros(1)], lr=0.1, maximize=True))


def test_a_rate_the_optimizer_decays_itself_is_not_judged():
    with pytest.raises(UnknownOptimizerError, match="Adagrad with lr_decay applies a rate that is not its `lr`"):
        stability_limit(Adagrad([torch.zeros(1)], lr=0.1, lr_decay=0.5))


def test_a_wrapper_is_looked_through():
    class Wrapper:
        optimizer = SGD([torch.zeros(1)], lr=0.1)

    assert unwrap(Wrapper()) is Wrapper.optimizer
    assert stability_limit(Wrapper()) == 2.0


def test_decoupled_weight_decay_is_recognised():
    weight = [torch.zeros(1)]
    for optimizer, expected in (
        (AdamW(weight), True),
        (Adam(weight), False),
        (NAdam(weight, decoupled_weight_decay=True), True),
    ):
        assert decoupled_decay(optimizer.param_groups[0], optimizer) is expected
