"""The meta-gradient under torch.compile."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lightning_maml_guard.maml.inner_loop import InnerRate
from lightning_maml_guard.maml.meta_gradient import Auxiliary, MetaGradient, meta_gradient, task_meta_gradient
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.utils.checks import first_line
from lightning_maml_guard.utils.task_map import TaskMap
from lightning_maml_guard.utils.warnings import GuardWarning

# Guards of torch.compile on torch's functions and on ours, which check that no one has replaced them.
_LIBRARY = re.compile(r"G\['__import_(torch|lightning_maml_guard)('|_dot_)")


def _on_users_code(guards: Sequence[Any]) -> list[bool]:
    # torch promises no form of these; a guard without a name is kept.
    return [_LIBRARY.match(str(getattr(guard, "name", ""))) is None for guard in guards]


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the guards on library code, which take 5 to 10 % of a small network's step."""
    # Torch 2.6 has no such filter.
    known = hasattr(torch.compiler, "skip_guard_on_globals_unsafe")
    return torch.compile(function, options={"guard_filter_fn": _on_users_code} if known else None)


class CompiledMetaGradient:
    """Computes what ``meta_gradient`` does, compiled: of one task for a map that loops, else of the vmapped tasks.

    If that fails and the eager computation does not, it warns once and computes eagerly from then on.
    """

    def __init__(self) -> None:
        self.given_up = False
        self._functions: dict[Any, Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The compiled functions hold the original's network, and cannot be pickled.
        return {"given_up": self.given_up, "_functions": {}}

    def __call__(
        self, problem: MetaProblem, *, tasks: TaskMap, learn_rates: bool, auxiliary: Auxiliary
    ) -> MetaGradient:
        options: dict[str, Any] = {"learn_rates": learn_rates, "auxiliary": auxiliary}
        # Sets of ever new sizes would be compiled ever anew.
        if self.given_up or problem.listed:
            return meta_gradient(problem, tasks=tasks, **options)
        try:
            return self._compiled(problem, tasks, options)
        except Exception as error:
            result = meta_gradient(problem, tasks=tasks, **options)  # raises what the user's own code raises
            self.given_up = True
            warnings.warn(
                "compile=True: the meta-gradient cannot be compiled here, so it is computed without (slower, same "
                f"result). torch.compile said: {type(error).__name__}: {first_line(error)}",
                GuardWarning,
                stacklevel=2,
            )
            return result

    def _compiled(self, problem: MetaProblem, tasks: TaskMap, options: dict[str, Any]) -> MetaGradient:
        params = {name: value.detach() for name, value in problem.params.items()}
        like = next(iter(params.values()))
        rates: InnerRate = problem.rate_by_step()
        if problem.uniform:
            # A number would be compiled in, and every new cap of the guard would compile again.
            rates = torch.tensor(rates, dtype=like.dtype, device=like.device)
        whole = not tasks.looped and (tasks.chunk_size or problem.tasks) >= problem.tasks
        function = partial(self._function(problem, tasks.looped, whole, options), params, rates)
        if whole:
            return function(problem.support, problem.query)
        strict = TaskMap(tasks.chunk_size, tasks.looped, strict=True)
        return _averaged(strict.apply(function, function, problem.support, problem.query), options["learn_rates"])

    def _function(self, problem: MetaProblem, looped: bool, whole: bool, options: dict[str, Any]) -> Callable[..., Any]:
        learn_rates = options["learn_rates"]
        update = problem.inner_update
        key = problem.order, problem.inner_steps, looped, whole, learn_rates, problem.uniform, id(update)
        if key not in self._functions:
            loss, order, inner_steps = problem.task_loss, problem.order, problem.inner_steps

            def one(params: Any, rates: Any, support: Any, query: Any) -> Any:
                return task_meta_gradient(
                    loss, params, rates, support, query, inner_steps=inner_steps, order=order, update=update, **options
                )

            several = torch.func.vmap(one, (None, None, 0, 0), randomness="different")

            def mean(*args: Any) -> MetaGradient:
                return _averaged(several(*args), learn_rates)

            self._functions[key] = _compile(one if looped else mean if whole else several)
        return self._functions[key]


def _averaged(found: Any, learn_rates: bool) -> MetaGradient:
    """Take the mean over the tasks of what ``task_meta_gradient`` returned for each."""
    (gradients, rate_gradients), (losses, extra) = found
    return MetaGradient(
        {name: value.mean(0) for name, value in gradients.items()},
        tree_map(lambda value: value.mean(0), rate_gradients) if learn_rates else None,
        losses,
        extra,
    )
