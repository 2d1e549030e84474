"""Learned inner rates (Meta-SGD, MAML++), which a lookahead moves as training does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_maml_guard.linalg.layout import Params, real_pairs
from lightning_maml_guard.linalg.operators import value_and_gradient
from lightning_maml_guard.maml.inner_rates import by_step
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.stability.objective import MamlObjective, Objective
from lightning_maml_guard.stability.problems import PlainProblem, Problem, first_batch
from lightning_maml_guard.utils.shards import any_split, local
from lightning_maml_guard.utils.task_map import as_float32


class LearnedRates:
    """The inner rates of a problem that are parameters of its optimizers, or views of such.

    Rates that are computed from parameters, as their exponentials are, stay fixed.

    Attributes:
        live: The parameters, by a name that none of the problem's has.
    """

    def __init__(self, problem: Problem, optimizers: Sequence[Optimizer]) -> None:
        self.live: dict[str, Tensor] = {}
        self._given: dict[str, Tensor] = {}
        one = first_batch(problem)
        if isinstance(one, PlainProblem) or one.uniform or any_split(one.params.values()):
            return
        self._problem: MetaProblem = one
        self._given = dict(one.inner_lr) if isinstance(one.inner_lr, dict) else {"": one.inner_lr}  # type: ignore[dict-item]
        held = {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
        known = {id(each) for each in one.params.values()}
        for name, rate in self._given.items():
            source = rate if rate._base is None else rate._base
            if isinstance(source, nn.Parameter) and id(source) in held - known and source.numel() == rate.numel():
                self.live[f"inner_lr {name}"] = source

    def evaluate(self, objective: Objective, params: Params, factor: float) -> tuple[Tensor, Params]:
        """Compute the loss, and the gradients of parameters and learned rates, at scaled inner rates."""
        if not self.live or not isinstance(objective, MamlObjective):
            return _loss_and_gradient(objective, params, factor)
        with torch.enable_grad():
            leaves = {name: as_float32(params[name].detach()).requires_grad_() for name in self.live}
            rates = {
                name: leaves[key].view(rate.shape) if (key := f"inner_lr {name}") in leaves else rate.detach()
                for name, rate in self._given.items()
            }
            entries = [
                {
                    name: (factor * rate[name]).expand(value.shape)
                    for name, value in self._problem.params.items()
                    if name in rate
                }
                for rate in self._by_step(rates, params)
            ]
        theta = as_float32({name: value for name, value in params.items() if name not in leaves})
        flat = [(at, name) for at, each in enumerate(entries) for name in each]
        steps = tuple({name: each[name].detach() for name in each} for each in entries)
        value, gradients, found = objective.update_and_rates(theta, steps if self._problem.per_step else steps[0])
        outputs = [entries[at][name] for at, name in flat]
        slopes = torch.autograd.grad(
            outputs, list(leaves.values()), [found[at][name] for at, name in flat], allow_unused=True
        )
        known = zip(leaves.items(), slopes, strict=True)
        return value, {**gradients, **{n: torch.zeros_like(v) if g is None else g for (n, v), g in known}}

    def loss(self, objective: Objective, params: Params, factor: float) -> Tensor:
        """Compute the loss alone, which costs a half of what it costs with the gradients, or less."""
        if self.live and isinstance(objective, MamlObjective):
            return self.evaluate(objective, params, factor)[0]
        return objective.loss(_point(params), factor)

    def _by_step(self, rates: dict[str, Tensor], params: Params) -> Sequence[dict[str, Tensor]]:
        """The rates of each step by parameter; of the first alone where they do not differ."""
        problem = self._problem
        if not problem.per_step:
            return [rates]
        found: Any = by_step(rates.get("", rates), problem.params, problem.inner_steps)
        return [each if isinstance(each, dict) else dict.fromkeys(problem.params, each) for each in found]


def _loss_and_gradient(objective: Objective, params: Params, factor: float) -> tuple[Tensor, Params]:
    return value_and_gradient(objective.update(factor).field, _point(params))


def _point(params: Params) -> Params:
    """The parameters as an objective takes them."""
    return {name: local(value.detach()) for name, value in real_pairs(as_float32(params)).items()}
