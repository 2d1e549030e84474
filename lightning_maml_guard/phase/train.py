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

from lightning_maml_guard.linalg.layout import rows_of
from lightning_maml_guard.maml.inner_loop import Params
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.critical_rates import GridRates, grid_rates
from lightning_maml_guard.phase.gradients import copies, grid_gradient, grid_loss
from lightning_maml_guard.phase.optimizers import MetaOptimizer, State

Family = Callable[[int], MetaProblem]

# Steps between two looks for runs whose parameters are no longer finite; those leave the program.
_CLEANUP_STEPS = 25
_SAVE_SECONDS = 60.0


def as_family(given: Any) -> Family:
    """Return the function from a step to its problem; raise a TypeError if it is none."""
    if isinstance(given, MetaProblem):
        return lambda step: given
    if not callable(given):
        raise TypeError(
            "Expected argument `problem_family` to be a MetaProblem or a function step -> MetaProblem but got "
            f"{type(given).__name__}."
        )

    def checked(step: int) -> MetaProblem:
        problem = given(step)
        if not isinstance(problem, MetaProblem):
            raise TypeError(
                f"Expected `problem_family` to return a MetaProblem but got {type(problem).__name__} for step {step}."
            )
        return problem

    return checked


@dataclass(frozen=True)
class GridSettings:
    """What all runs of a grid share."""

    family: Family
    judged_on: MetaProblem  # the errors before and after training are taken on it
    optimizer: MetaOptimizer
    steps: int
    measured_steps: tuple[int, ...]  # critical rates are measured before these steps
    exact: bool = True  # whether exact_beta_c is among them
    max_iter: int = 20
    tol: float = 1e-2


@dataclass
class _Chunk:
    """A chunk in training: its active runs, and what was recorded of all of its runs."""

    step: int
    params: Params  # of the active runs, each of shape (active, ...)
    state: State  # the same
    active: Tensor  # indices of the runs whose parameters are finite, on the CPU
    losses: list[Tensor]  # of each step, shape (runs,)
    rates: list[Tensor]  # of each measurement, shape (3, runs), on the CPU
    errors: Tensor  # before training with and without adaptation, shape (2, runs), on the CPU

    @classmethod
    def begin(cls, settings: GridSettings, alphas: Tensor) -> _Chunk:
        runs = len(alphas)
        params = copies(settings.family(0).params, runs)
        state = settings.optimizer.init(params)
        start = grid_loss(settings.judged_on, params, alphas)
        one = {name: value[:1] for name, value in params.items()}
        unadapted = grid_loss(settings.judged_on, one, torch.zeros_like(alphas[:1])).expand(runs)
        errors = torch.stack([start, unadapted]).detach().cpu()
        return cls(0, params, state, torch.arange(runs), [], [], errors)

    @classmethod
    def load(cls, saved: dict[str, Any], device: torch.device) -> _Chunk:
        return cls(
            saved["step"],
            {name: value.to(device) for name, value in saved["params"].items()},
            _each(saved["state"], lambda value: value.to(device)),
            saved["alive"],
            [loss.to(device) for loss in saved["losses"]],
            list(saved["rates"]),
            saved["errors"],
        )

    def saved(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "params": self.params,
            "state": self.state,
            "alive": self.active,
            "losses": self.losses,
            "rates": self.rates,
            "errors": self.errors,
            "result": None,
        }

    def drop_diverged(self) -> None:
        """Take the runs whose parameters are not finite out of the program."""
        finite = torch.stack([rows_of(torch.isfinite(value)).all(1) for value in self.params.values()]).all(0)
        if bool(finite.all()):
            return
        keep = finite.nonzero().flatten()
        self.params = {name: value[keep] for name, value in self.params.items()}
        self.state = _each(self.state, lambda value: value[keep])
        self.active = self.active[keep.cpu()]

    def measure(self, settings: GridSettings, problem: MetaProblem, alphas: Tensor) -> None:
        """Measure the critical rates of the active runs, whose inner learning rates are ``alphas``."""
        chosen, back = np.arange(len(alphas)), np.arange(len(alphas))
        if self.step == 0:  # all runs have the same parameters: once per inner learning rate is enough
            _, chosen, back = np.unique(alphas.cpu().numpy(), return_index=True, return_inverse=True)
        index = torch.from_numpy(chosen).to(alphas.device)
        found: GridRates = grid_rates(
            problem,
            {name: value[index] for name, value in self.params.items()},
            alphas[index],
            settings.optimizer,
            _each(self.state, lambda value: value[index]),
            self.step,
            exact=settings.exact,
            max_iter=settings.max_iter,
            tol=settings.tol,
        )
        rates = torch.full((3, self.errors.shape[1]), math.nan, dtype=torch.float64)
        rates[:, self.active] = torch.from_numpy(np.stack(found)[:, back])
        self.rates.append(rates)


def train_runs(
    settings: GridSettings,
    alphas: Tensor,
    betas: Tensor,
    *,
    saved: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda progress: None,
    advance: Callable[[int], object] = lambda steps: None,
) -> dict[str, Tensor]:
    """Train runs that differ only in their learning rates; ``alphas`` and ``betas`` have shape ``(runs,)``.

    ``save`` is called now and then, and at the end, with what ``saved`` takes to go on; ``advance`` with the number of
    steps done since its last call. Returned on the CPU: ``losses``, shape ``(steps, runs)``, of each step's tasks
    before the step; ``start``, ``unadapted`` and ``final``, shape ``(runs,)``, ``inf`` where a run blew up;
    ``alpha_c``, ``beta_c`` and ``exact_beta_c``, shape ``(measured, runs)``.
    """
    if saved is not None and saved["result"] is not None:
        advance(settings.steps)
        return saved["result"]
    runs, device = len(alphas), alphas.device
    chunk = _Chunk.begin(settings, alphas) if saved is None else _Chunk.load(saved, device)
    advance(chunk.step)
    last_save = time.monotonic()
    for step in range(chunk.step, settings.steps):
        problem = settings.family(step)
        here = chunk.active.to(device)
        if step in settings.measured_steps:
            chunk.measure(settings, problem, alphas[here])
        gradients, loss = grid_gradient(problem, chunk.params, alphas[here])
        chunk.losses.append(loss.new_full((runs,), math.nan).index_copy(0, here, loss))
        chunk.params, chunk.state = settings.optimizer.step(chunk.params, gradients, chunk.state, betas[here], step)
        chunk.step = step + 1
        if chunk.step % _CLEANUP_STEPS == 0:
            chunk.drop_diverged()
        advance(1)
        if time.monotonic() - last_save > _SAVE_SECONDS:
            save(chunk.saved())
            last_save = time.monotonic()
        if not len(chunk.active):
            break
    chunk.drop_diverged()
    chunk.step = settings.steps
    final = alphas.new_full((runs,), math.inf)
    if len(chunk.active):
        here = chunk.active.to(device)
        if settings.steps in settings.measured_steps:
            chunk.measure(settings, settings.family(settings.steps - 1), alphas[here])
        loss = grid_loss(settings.judged_on, chunk.params, alphas[here])
        final[here] = torch.nan_to_num(loss, nan=math.inf, posinf=math.inf)
    result = _result(chunk, settings, final)
    save({"step": settings.steps, "result": result})
    return result


def _result(chunk: _Chunk, settings: GridSettings, final: Tensor) -> dict[str, Tensor]:
    # A chunk whose runs all blew up has stopped early: the missing steps and measurements are nan.
    runs = len(final)
    missing = final.new_full((runs,), math.nan)
    losses = chunk.losses + [missing] * (settings.steps - len(chunk.losses))
    unmeasured = torch.full((3, runs), math.nan, dtype=torch.float64)
    rates = chunk.rates + [unmeasured] * (len(settings.measured_steps) - len(chunk.rates))
    by_rate = torch.stack(rates, 1) if rates else torch.zeros(3, 0, runs, dtype=torch.float64)
    return {
        "losses": torch.stack(losses).detach().cpu(),
        "start": chunk.errors[0],
        "unadapted": chunk.errors[1],
        "final": final.detach().cpu(),
        **dict(zip(("alpha_c", "beta_c", "exact_beta_c"), by_rate, strict=True)),
    }


def _each(state: State, function: Callable[[Tensor], Tensor]) -> State:
    return {group: {name: function(value) for name, value in each.items()} for group, each in state.items()}
