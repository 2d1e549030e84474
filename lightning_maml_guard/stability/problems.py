"""Which problem is measured: a MetaProblem that a function or the module states, else training_step as it is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.maml.problem import MetaProblem, check_named
from lightning_maml_guard.utils.activations import DeadUnits, ReluUnits
from lightning_maml_guard.utils.batch_copy import copied
from lightning_maml_guard.utils.checks import check_function, shown
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.functorch import gradients_taken
from lightning_maml_guard.utils.shards import any_split
from lightning_maml_guard.utils.task_map import as_float32, each_task


@dataclass(frozen=True)
class PlainProblem:
    """A loss and its parameters, without an inner loop: only the outer rate, here the learning rate, has a limit.

    Args:
        params: The parameters training moves, by name; the module's own tensors.
        loss: Function from such a dict to the scalar loss.
    """

    params: Params
    loss: Callable[[Params], Tensor]

    def __post_init__(self) -> None:
        check_named(self.params)
        check_function("loss", self.loss, "params -> scalar tensor", "lambda params: loss of the batch at params")


@dataclass(frozen=True)
class AccumulatedProblem:
    """The batches whose gradients one optimizer step averages (``accumulate_grad_batches``), each a MetaProblem."""

    parts: tuple[MetaProblem, ...]

    @property
    def first(self) -> MetaProblem:
        """The first batch: parameters, rates and order are those of all."""
        return self.parts[0]

    @property
    def params(self) -> Params:
        """The parameters."""
        return self.first.params

    @property
    def alpha(self) -> float:
        """The inner rate."""
        return self.first.alpha

    @property
    def tasks(self) -> int:
        """Number of tasks over all batches."""
        return sum(each.tasks for each in self.parts)

    def at_factor(self, factor: float) -> AccumulatedProblem:
        """Return the problem with every inner rate multiplied by ``factor``."""
        return AccumulatedProblem(tuple(each.at_factor(factor) for each in self.parts))

    def part(self, tasks: int) -> AccumulatedProblem:
        """Return the problem with the first tasks only."""
        kept: list[MetaProblem] = []
        for each in self.parts:
            if tasks > 0:
                kept.append(each.part(tasks))
                tasks -= kept[-1].tasks
        return AccumulatedProblem(tuple(kept))


Problem = MetaProblem | PlainProblem | AccumulatedProblem
ProblemSource = Callable[[Any, Any], MetaProblem]


def check_source(problem: Any) -> None:
    """Raise a ValueError if an argument ``problem`` is neither None nor a function."""
    if problem is not None and not callable(problem):
        raise ValueError(
            f"Expected argument `problem` to be a function (module, batch) -> MetaProblem but got {shown(problem)}. "
            "Pass such a function, or None for the module's own `meta_problem`."
        )


def has_meta_problem(pl_module: Any) -> bool:
    """Return True if a module states its own problem."""
    return callable(getattr(pl_module, "meta_problem", None))


def state_problem(source: ProblemSource | None, pl_module: Any, batch: Any, batch_idx: int) -> Problem:
    """State the problem of a step: by the user's function, the module's ``meta_problem``, or its ``training_step``.

    They are given a copy of the batch. Raises a BatchCopyError if it cannot be copied.
    """
    batch = copied(batch)
    if source is None and not has_meta_problem(pl_module):
        return training_step_problem(pl_module, batch, batch_idx)
    found = pl_module.meta_problem(batch) if source is None else source(pl_module, batch)
    if not isinstance(found, (MetaProblem, PlainProblem)):
        name = f"`meta_problem` of {type(pl_module).__name__}" if source is None else "argument `problem`"
        raise TypeError(
            f"Expected {name} to return a MetaProblem but got {shown(found)}. Return MetaProblem(params, task_loss, "
            "support, query)."
        )
    return found


def accumulated(problems: Sequence[Problem]) -> Problem:
    """Average the problems of the batches that one optimizer step accumulates; of a single one, itself."""
    plain = [each for each in problems if isinstance(each, PlainProblem)]
    meta = [each for each in problems if isinstance(each, MetaProblem)]
    if len(plain) == len(problems) > 1:
        return PlainProblem(plain[0].params, lambda at: torch.stack([each.loss(at) for each in plain]).mean())
    return AccumulatedProblem(tuple(meta)) if len(meta) == len(problems) > 1 else problems[0]


def first_batch(problem: Problem) -> MetaProblem | PlainProblem:
    """Return the first batch of accumulated ones, whose settings are those of all; of a single one, itself."""
    return problem.first if isinstance(problem, AccumulatedProblem) else problem


def inner_steps_of(problem: Problem) -> int:
    """Return the number of inner steps; 1 of plain training."""
    return getattr(first_batch(problem), "inner_steps", 1)


def learns_rates(problem: Problem) -> bool:
    """Return True if training moves the inner rates of a problem."""
    rates = getattr(first_batch(problem), "inner_lr", None)
    held = rates.values() if isinstance(rates, dict) else [rates]
    return any(isinstance(each, Tensor) and each.requires_grad for each in held)


def alpha_of(problem: Problem) -> float:
    """The inner rate of a problem; ``nan`` in plain training."""
    return math.nan if isinstance(problem, PlainProblem) else problem.alpha


def with_set_rates(problem: Problem, alpha: float) -> Problem:
    """Return a problem with ``alpha`` as its inner rate, unless training learns it or it is not known."""
    same = alpha_of(problem) == alpha or math.isnan(alpha)
    return problem if same or learns_rates(problem) else at_alpha(problem, alpha)


def at_alpha(problem: Problem, alpha: float) -> Problem:
    """Return a problem with ``alpha`` as its inner rate; several rates keep their proportions."""
    if isinstance(problem, PlainProblem):
        return problem
    if isinstance(problem, AccumulatedProblem):
        return AccumulatedProblem(tuple(_at_alpha(each, alpha) for each in problem.parts))
    return _at_alpha(problem, alpha)


def _at_alpha(problem: MetaProblem, alpha: float) -> MetaProblem:
    if problem.uniform:
        return replace(problem, inner_lr=alpha)
    return problem.at_factor(alpha / problem.alpha if problem.alpha > 0 else 1.0)


def owners(problem: Problem, optimizers: Sequence[Optimizer]) -> list[int]:
    """Find the indices of the optimizers that move a problem's parameters; all if none does (measure then says so)."""
    moved = {id(value) for value in problem.params.values()}
    found = [
        index
        for index, optimizer in enumerate(optimizers)
        if any(id(parameter) in moved for group in optimizer.param_groups for parameter in group["params"])
    ]
    return found or list(range(len(optimizers)))


def dead_units(problem: Problem) -> DeadUnits:
    """Count the units of ReLU-like activations that are 0 on all of a problem's data, one task after another."""
    params = problem.params
    if not any_split(params.values()):
        params = {
            name: as_float32(value.detach()).requires_grad_(value.requires_grad) for name, value in params.items()
        }
    watch = ReluUnits()

    with double_backward(), watch:
        if isinstance(problem, PlainProblem):
            problem.loss(params)
            return watch.count()
        one = first_batch(problem)
        assert isinstance(one, MetaProblem)
        for data in (one.support, one.query):
            for each in each_task(data):
                watch.restart()
                one.loss(params, as_float32(each))
    return watch.count()


def takes_gradients(problem: Problem) -> bool:
    """Whether the loss of plain training takes gradients itself, as an inner loop does.

    Gradients by the data alone, of a differential equation or a penalty, do not count.
    """
    one = first_batch(problem)
    if not isinstance(one, PlainProblem):
        return False
    with double_backward(), gradients_taken() as found:
        one.loss(as_float32(one.params))
    shapes = {value.shape for value in one.params.values()}
    return not all(inputs and all(_is_data(each, shapes) for each in inputs) for inputs in found)


def _is_data(tensor: Tensor, shapes: set[torch.Size]) -> bool:
    """Whether a gradient's input is data: no parameter, no copy of one, nor computed from any."""
    return tensor.grad_fn is None and not isinstance(tensor, nn.Parameter) and tensor.shape not in shapes


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class NoLossError(ValueError):
    """The ``training_step`` returns None: Lightning skips the step."""


class _TrainingStep(nn.Module):
    """A module whose ``forward`` is another module's ``training_step``, for ``functional_call``."""

    def __init__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self) -> Tensor:
        # The parameters come in float32, also those of a run in half precision.
        arguments = copied(self.arguments, lambda tensor: as_float32(tensor.clone()))
        output = self.module.training_step(*arguments)  # type: ignore[operator]
        loss = output["loss"] if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            kind = NoLossError if loss is None else ValueError
            raise kind(
                "Expected training_step to return a loss tensor or a dict with a 'loss' but got "
                f"{type(output).__name__}: there is nothing to measure at this step."
            )
        return loss


def training_step_problem(module: nn.Module, batch: Any, batch_idx: int) -> PlainProblem:
    """State the loss of the coming ``training_step``, run on copies of batch and buffers, in float32."""
    kinds = [each.kind for each in inspect.signature(module.training_step).parameters.values()]  # type: ignore[arg-type]
    # As Lightning decides it; what is given by keyword only has a default.
    takes_index = inspect.Parameter.VAR_POSITIONAL in kinds or sum(each in _POSITIONAL for each in kinds) > 1
    step = _TrainingStep(module, (batch, batch_idx) if takes_index else (batch,))
    params: Params = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if any_split(params.values()):
        return PlainProblem(params, lambda live: step())  # by the module's own parameters, which are these
    names = {id(value): name for name, value in params.items()}
    # Every place a parameter is registered at, so that tied parameters and shared submodules get one tensor without
    # functional_call's own tying, which replaces a shared submodule's live parameters (pytorch#164759).
    places = {
        f"module.{prefix}{'.' if prefix else ''}{name}": names[id(value)]
        for prefix, part in module.named_modules()
        for name, value in part._parameters.items()
        if value is not None and id(value) in names
    }

    def loss(at: Params) -> Tensor:
        buffers = as_float32({f"module.{name}": value.clone() for name, value in module.named_buffers()})
        swapped = {place: at[name] for place, name in places.items()}
        return torch.func.functional_call(step, {**buffers, **swapped}, (), tie_weights=False)

    return PlainProblem(params, loss)
