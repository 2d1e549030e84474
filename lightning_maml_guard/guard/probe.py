"""What a check reads from a run: its problem, the optimizers that move it, and the steps that are coming."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_maml_guard.guard.lookahead import Trial, TrialRunner
from lightning_maml_guard.guard.rescale import Caps
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.shadow import Clip
from lightning_maml_guard.stability.hvp import Memory
from lightning_maml_guard.stability.plain import PlainProblem, training_step_problem
from lightning_maml_guard.theory.limits import passes, severity
from lightning_maml_guard.utils.checks import shown

Problem = MetaProblem | PlainProblem


def has_meta_problem(pl_module: Any) -> bool:
    """Say whether a module states its own problem.

    Args:
        pl_module: The module.

    Returns:
        Whether it has a method ``meta_problem``.
    """
    return callable(getattr(pl_module, "meta_problem", None))


def takes_no_steps(trainer: Any) -> bool:
    """Say whether the epoch at hand only runs forward, as StochasticWeightAveraging's pass for batch norm does.

    Args:
        trainer: The Trainer.

    Returns:
        Whether no optimizer step follows.
    """
    return bool(getattr(getattr(trainer, "fit_loop", None), "_skip_backward", False))


def state_problem(
    problem: Callable[[Any, Any], MetaProblem] | None, pl_module: Any, batch: Any, batch_idx: int
) -> Problem:
    """State the problem of a step.

    Args:
        problem: The user's function, which goes first.
        pl_module: The module.
        batch: The step's batch.
        batch_idx: Its index.

    Returns:
        The problem; the module's own ``training_step`` as plain training where there is no other.

    Raises:
        TypeError: If the function or the module's ``meta_problem`` returns something else.
    """
    if problem is None and not has_meta_problem(pl_module):
        return training_step_problem(pl_module, batch, batch_idx)
    found = pl_module.meta_problem(batch) if problem is None else problem(pl_module, batch)
    if not isinstance(found, (MetaProblem, PlainProblem)):
        source = f"`meta_problem` of {type(pl_module).__name__}" if problem is None else "argument `problem`"
        raise TypeError(
            f"Expected {source} to return a MetaProblem but got {shown(found)}. Return MetaProblem(params, task_loss, "
            "support, query)."
        )
    return found


def owners(problem: Problem, optimizers: Sequence[Optimizer]) -> list[int]:
    """Find the optimizers that move a problem's parameters.

    Args:
        problem: The problem.
        optimizers: The run's optimizers.

    Returns:
        Their indices; all of them if none does (measure then says so).
    """
    moved = {id(value) for value in problem.params.values()}
    found = [
        index
        for index, optimizer in enumerate(optimizers)
        if any(id(parameter) in moved for group in optimizer.param_groups for parameter in group["params"])
    ]
    return found or list(range(len(optimizers)))


@contextmanager
def configured_inner_rate(pl_module: Any) -> Iterator[None]:
    """Measure at the inner rate as configured, not as capped by an earlier check.

    Args:
        pl_module: The module.

    Yields:
        Nothing.
    """
    if not hasattr(pl_module, "inner_lr_cap"):
        yield
        return
    cap, pl_module.inner_lr_cap = pl_module.inner_lr_cap, None
    try:
        yield
    finally:
        pl_module.inner_lr_cap = cap


@dataclass(frozen=True)
class Attempts:
    """Tries the coming steps of a run under caps.

    Args:
        runner: Takes the steps.
        alpha: Inner rate as configured; ``nan`` without an inner loop.
        beta: Meta rate as scheduled.
    """

    runner: TrialRunner
    alpha: float
    beta: float

    def __call__(self, caps: Caps, first: int = 0) -> Trial:
        """Try the steps.

        Args:
            caps: The caps.
            first: Index of the batch to begin with.

        Returns:
            What the trial saw.
        """
        alpha, beta = caps.applied(self.alpha, self.beta)
        return self.runner.run(
            alpha / self.alpha if self.alpha > 0 else 1.0, beta / self.beta if self.beta > 0 else 1.0, first
        )

    def judged(self, caps: Caps, reference: float, alarm: float) -> tuple[Trial, float, float]:
        """Try the steps; if they do not pass, twice more from other batches on: one odd batch is not a dying run.

        Args:
            caps: The caps.
            reference: Loss that training started from; ``nan`` takes the one at hand.
            alarm: Factor on it that counts as failure.

        Returns:
            The trial of the median severity, the reference, and that severity.
        """
        trial = self(caps)
        reference = trial.begin if math.isnan(reference) else reference
        found = [trial]
        if not passes(severity(trial.end, reference), alarm) and self.runner.batches > 1:
            found += [self(caps, (self.runner.batches * share) // 3) for share in (1, 2)]
        found.sort(key=lambda each: severity(each.end, reference))
        median = found[len(found) // 2]
        return median, reference, severity(median.end, reference)


def attempts(problems: Sequence[Problem], optimizer: Optimizer, steps: int, trainer: Any, memory: Memory) -> Attempts:
    """Make what tries the coming steps under caps.

    Args:
        problems: The coming step's problem and those to go on with.
        optimizer: The optimizer about to step.
        steps: Number of steps.
        trainer: The Trainer, which may clip gradients.
        memory: How to run over the tasks, and which processes step together.

    Returns:
        What tries them.

    Raises:
        ClosureError: If the optimizer needs a closure.
    """
    tasks = memory.map_for(getattr(problems[0], "task_chunk_size", None), getattr(problems[0], "looped", False))
    runner = TrialRunner(problems, optimizer, steps, tasks, _clipping(trainer), memory.ranks)
    return Attempts(runner, getattr(problems[0], "alpha", math.nan), scheduled_rate(optimizer))


def _clipping(trainer: Any) -> Clip | None:
    value = trainer.gradient_clip_val
    if not value:
        return None
    if trainer.gradient_clip_algorithm == "value":
        return lambda parameters: nn.utils.clip_grad_value_(parameters, value)
    return lambda parameters: _clip_norm(parameters, value)


def _clip_norm(parameters: list[nn.Parameter], value: float) -> None:
    nn.utils.clip_grad_norm_(parameters, value)


def gradient_norm(optimizer: Optimizer) -> torch.Tensor | float | None:
    """Compute the norm of the gradient an optimizer is about to use.

    Args:
        optimizer: The optimizer.

    Returns:
        A scalar on the device, on a CPU a number; None without a gradient.
    """
    known = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [g.coalesce().values() if g.is_sparse else g for g in known]
    if not gradients:
        return None
    # What get_total_norm comes to here; its sorting by device and type takes 1 % of a small network's step.
    if all(gradient.is_cpu for gradient in gradients):
        return math.hypot(*[norm.item() for norm in torch._foreach_norm(gradients)])
    if len({(gradient.device, gradient.dtype) for gradient in gradients}) == 1:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return nn.utils.get_total_norm(gradients)
