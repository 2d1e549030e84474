"""The training loop of a chunk of runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_maml_guard.maml.inner_loop import Params
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.critical_rates import GridRates, grid_rates
from lightning_maml_guard.phase.gradients import copies, grid_gradient, grid_loss
from lightning_maml_guard.phase.optimizers import MetaOptimizer, State

Family = Callable[[int], MetaProblem]
Kept = dict[str, Any]

# Runs whose loss is no longer finite are looked for this often, and leave the program: nan never comes back.
_SWEEP = 25
_SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Recipe:
    """What all runs of a grid share.

    Attributes:
        family: The problem of each step.
        judged_on: The problem the first and the final error are taken on.
        optimizer: The meta-optimizer.
        steps: Training steps.
        measured_steps: Steps before which critical rates are measured.
        exact: Whether ``exact_beta_c`` is among them.
        max_iter: Products at most of a measurement.
        tol: Relative residual at which one stops.
    """

    family: Family
    judged_on: MetaProblem
    optimizer: MetaOptimizer
    steps: int
    measured_steps: tuple[int, ...]
    exact: bool = True
    max_iter: int = 20
    tol: float = 1e-2


def train_runs(
    recipe: Recipe,
    alphas: Tensor,
    betas: Tensor,
    *,
    kept: Kept | None = None,
    save: Callable[[Kept], None] = lambda kept: None,
    advance: Callable[[int], object] = lambda steps: None,
) -> dict[str, Tensor]:
    """Train runs that differ in their rates alone.

    Args:
        recipe: What they share.
        alphas: Inner rates, shape ``(runs,)``, of the parameters' type, on their device.
        betas: Meta rates, the same.
        kept: What ``save`` was given when the work was broken off; it goes on from there.
        save: Called now and then, and at the end, with what is needed to go on.
        advance: Called after every step with the number of steps done.

    Returns:
        On the CPU: ``losses``, shape ``(steps, runs)``, the loss of each step's tasks before the step; ``start``,
        ``unadapted`` and ``final``, shape ``(runs,)``, ``inf`` where a run blew up; ``alpha_c``, ``beta_c`` and
        ``exact_beta_c``, shape ``(measured, runs)``.
    """
    runs = len(alphas)
    device = alphas.device
    if kept is None:
        params = copies(recipe.family(0).params, runs)
        state = recipe.optimizer.init(params)
        alive = torch.arange(runs)
        start = grid_loss(recipe.judged_on, params, alphas)
        one = {name: value[:1] for name, value in params.items()}
        unadapted = grid_loss(recipe.judged_on, one, torch.zeros_like(alphas[:1])).expand(runs)
        errors = torch.stack([start, unadapted]).detach().cpu()
        kept = {"step": 0, "losses": [], "rates": [], "errors": errors, "result": None}
        first = 0
    elif kept["result"] is not None:
        advance(recipe.steps)
        return kept["result"]
    else:
        params, state = ({n: p.to(device) for n, p in kept["params"].items()}, _moved(kept["state"], device))
        alive, first = kept["alive"], kept["step"]
        advance(first)
    losses: list[Tensor] = [each.to(device) for each in kept["losses"]]
    rates: list[Tensor] = list(kept["rates"])
    saved = time.monotonic()

    def everything(step: int, result: Any = None) -> Kept:
        return {
            "step": step,
            "params": params,
            "state": state,
            "alive": alive,
            "losses": losses,
            "rates": rates,
            "errors": kept["errors"],
            "result": result,
        }

    for step in range(first, recipe.steps):
        problem = recipe.family(step)
        here = alive.to(device)
        if step in recipe.measured_steps:
            rates.append(_measured(recipe, problem, params, alphas[here], state, step, alive, runs))
        gradients, loss = grid_gradient(problem, params, alphas[here])
        losses.append(loss.new_full((runs,), math.nan).index_copy(0, here, loss))
        params, state = recipe.optimizer.step(params, gradients, state, betas[here], step)
        if (step + 1) % _SWEEP == 0:
            params, state, alive = _swept(params, state, alive)
        advance(1)
        if time.monotonic() - saved > _SAVE_SECONDS:
            save(everything(step + 1))
            saved = time.monotonic()
        if not len(alive):
            break
    params, state, alive = _swept(params, state, alive)
    final = alphas.new_full((runs,), math.inf)
    if len(alive):
        here = alive.to(device)
        if recipe.steps in recipe.measured_steps:
            problem = recipe.family(recipe.steps - 1)
            rates.append(_measured(recipe, problem, params, alphas[here], state, recipe.steps, alive, runs))
        final[here] = torch.nan_to_num(grid_loss(recipe.judged_on, params, alphas[here]), nan=math.inf, posinf=math.inf)
    missing = alphas.new_full((runs,), math.nan)
    losses += [missing] * (recipe.steps - len(losses))
    rates += [torch.full((3, runs), math.nan, dtype=torch.float64)] * (len(recipe.measured_steps) - len(rates))
    by_rate = torch.stack(rates, 1) if rates else torch.zeros(3, 0, runs, dtype=torch.float64)
    result = {
        "losses": torch.stack(losses).detach().cpu() if losses else torch.zeros(0, runs),
        "start": kept["errors"][0],
        "unadapted": kept["errors"][1],
        "final": final.detach().cpu(),
        **dict(zip(("alpha_c", "beta_c", "exact_beta_c"), by_rate, strict=True)),
    }
    params, state, losses = {}, {}, []
    save(everything(recipe.steps, result))
    return result


def _measured(
    recipe: Recipe,
    problem: MetaProblem,
    params: Params,
    alphas: Tensor,
    state: State,
    step: int,
    alive: Tensor,
    runs: int,
) -> Tensor:
    """Measure the runs alive; before training once an inner rate, for all runs start at the same parameters."""
    chosen, back = np.arange(len(alphas)), np.arange(len(alphas))
    if step == 0:
        _, chosen, back = np.unique(alphas.cpu().numpy(), return_index=True, return_inverse=True)
    index = torch.from_numpy(chosen).to(alphas.device)
    found: GridRates = grid_rates(
        problem,
        {name: value[index] for name, value in params.items()},
        alphas[index],
        recipe.optimizer,
        {group: {n: value[index] for n, value in each.items()} for group, each in state.items()},
        step,
        exact=recipe.exact,
        max_iter=recipe.max_iter,
        tol=recipe.tol,
    )
    rates = torch.full((3, runs), math.nan, dtype=torch.float64)
    rates[:, alive] = torch.from_numpy(np.stack(found)[:, back])
    return rates


def _swept(params: Params, state: State, alive: Tensor) -> tuple[Params, State, Tensor]:
    finite = torch.stack([torch.isfinite(value).flatten(1).all(1) for value in params.values()]).all(0)
    if bool(finite.all()):
        return params, state, alive
    keep = finite.nonzero().flatten()
    return (
        {name: value[keep] for name, value in params.items()},
        {group: {n: value[keep] for n, value in each.items()} for group, each in state.items()},
        alive[keep.cpu()],
    )


def _moved(state: State, device: torch.device) -> State:
    return {group: {n: value.to(device) for n, value in each.items()} for group, each in state.items()}
