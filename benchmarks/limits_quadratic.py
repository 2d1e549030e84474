"""The guard's limits against training on a quadratic: ``python -m benchmarks.limits_quadratic [ORDER ...]``.

For every order of MAML, number of inner steps and optimizer: the largest outer learning rate that converges on a
quadratic (eigenvalues .3, 1, 2, 4; alpha = .1, for simplified MAML .1/K). It is found by bisection over runs of
``torch.optim`` through ``MetaLearningModule.training_step``, and printed beside the guard's ``exact_beta_c`` for that
optimizer in its current state.

The limits of adaptive optimizers hold for a frozen second moment ``v``. Above its limit, real Adam raises its own ``v``
and oscillates instead of diverging. So ``v`` is preset and held here: by AMSGrad's maximum, or by a decay of 1 - 1e-12
from a start so small that the gradients add nothing to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from benchmarks.common.workers import each_done
from lightning_maml_guard import CurvatureOptions, MetaLearningModule, measure
from lightning_maml_guard.theory.multiplier import ORDERS
from lightning_maml_guard.utils.checks import check_choice, checked
from tests.helpers import bisect, quadratic_batch

SPECTRUM = [0.3, 1.0, 2.0, 4.0]
ALPHA, START, STEPS, SETTLED, HELD = 0.1, 1e-9, 400, 1e6, 1 - 1e-12

Make = Callable[[Iterable[Any]], Optimizer]


def grouped(parameters: Iterable[Any]) -> Optimizer:
    first, *rest = list(parameters)
    return SGD([{"params": [first], "lr": 1e-3}, {"params": rest, "lr": 2.5e-4}], lr=1e-3)


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: SGD(p, lr=1e-3),
    "SGD, weight decay .5": lambda p: SGD(p, lr=1e-3, weight_decay=0.5),
    "SGD, two groups, lr 4:1": grouped,
    "SGD momentum .9": lambda p: SGD(p, lr=1e-3, momentum=0.9),
    "SGD momentum .9, dampening .5": lambda p: SGD(p, lr=1e-3, momentum=0.9, dampening=0.5),
    "SGD Nesterov .9": lambda p: SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "Adam, v held": lambda p: Adam(p, lr=1e-3, betas=(0.9, HELD)),
    "AMSGrad": lambda p: Adam(p, lr=1e-3, amsgrad=True),
    "AdamW, v held, decay .1": lambda p: AdamW(p, lr=1e-3, betas=(0.9, HELD), weight_decay=0.1),
    "NAdam, v held": lambda p: NAdam(p, lr=1e-3, betas=(0.9, HELD)),
    "RMSprop, v held": lambda p: RMSprop(p, lr=1e-3, alpha=HELD),
    "RMSprop momentum .5, v held": lambda p: RMSprop(p, lr=1e-3, alpha=HELD, momentum=0.5),
    "Adagrad": lambda p: Adagrad(p, lr=1e-3),
}


class Split(nn.Module):
    """A linear model in two parameters, so that groups can differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.full((2, 1), START, dtype=torch.float64))
        self.second = nn.Parameter(torch.full((2, 1), START, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] @ self.first + x[:, 2:] @ self.second


def settled(order: str, inner_steps: int, make: Make) -> tuple[MetaLearningModule, Optimizer]:
    """A module near its minimum, and its optimizer with settled moments."""
    # K simplified steps act as K*alpha, which must stay below alpha_c = .25 for any meta rate to be stable.
    alpha = ALPHA / inner_steps if order == "simplified" else ALPHA
    module = MetaLearningModule(Split(), inner_lr=alpha, inner_steps=inner_steps, order=order)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer = make(module.theta().values())
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    generator = torch.Generator().manual_seed(7)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        for parameter in group["params"]:
            held = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 0.5 + 0.1
            state = optimizer.state[parameter]
            for key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"):
                if key in state and not (key == "exp_avg_sq" and "max_exp_avg_sq" in state):
                    state[key].copy_(held)
            if "exp_avg" in state:
                state["step"].fill_(SETTLED)
            if "mu_product" in state:
                state["mu_product"].fill_(0.0)
            if optimizer.__class__ is Adagrad:
                state["step"].fill_(SETTLED)
    return module, optimizer


def converges(order: str, inner_steps: int, make: Make, batch: Any, rate: float) -> bool:
    """Return True if the distance to the minimum (0) shrinks over the last half of a run."""
    module, optimizer = settled(order, inner_steps, make)
    highest = max(group["lr"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] *= rate / highest
    distances = []
    for step in range(STEPS):
        distances.append(float(torch.cat([p.detach().flatten() for p in module.theta().values()]).norm()))
        if distances[-1] > 1e5 * START:
            return False  # before the gradients are large enough to add to a `v` that is held
        optimizer.zero_grad()
        module.training_step(batch, step).backward()
        optimizer.step()
    return max(distances[-20:]) < max(distances[STEPS // 2 : STEPS // 2 + 20])


def limits(order: str, inner_steps: int, make: Make, batch: Any) -> tuple[float, float]:
    """The limit by bisection, and the guard's."""
    module, optimizer = settled(order, inner_steps, make)
    options = CurvatureOptions(tol=1e-8)
    limit = measure(module.meta_problem(batch), optimizer=optimizer, curvature=options).exact_beta_c
    found = bisect(partial(converges, order, inner_steps, make, batch), 0.98 * limit, 1.02 * limit, relative=3e-4)
    return found, limit


def main(orders: Iterable[str] = ORDERS, steps: Iterable[int] = (1, 2, 5)) -> float:
    torch.manual_seed(0)
    batch = quadratic_batch(SPECTRUM)
    print("| order | K | optimizer | bisected | guard | ratio |\n|---|---|---|---|---|---|")
    worst, cases = 0.0, list(product(orders, steps, OPTIMIZERS))
    jobs = [partial(limits, order, inner_steps, OPTIMIZERS[name], batch) for order, inner_steps, name in cases]
    done = each_done(jobs, "10 minutes with all orders")
    for (order, inner_steps, name), (found, limit) in zip(cases, done, strict=True):
        ratio = found / limit
        worst = max(worst, abs(ratio - 1))
        print(f"| {order} | {inner_steps} | {name} | {found:.5g} | {limit:.5g} | {ratio:.5f} |", flush=True)
    print(f"\nlargest distance from 1: {worst:.1e}")
    return worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits_quadratic", description=__doc__)
    known = checked(str, lambda order: check_choice("order", order, ORDERS))
    parser.add_argument("orders", nargs="*", type=known, default=ORDERS, help=f"of {', '.join(ORDERS)} (default: all)")
    main(parser.parse_args().orders)
