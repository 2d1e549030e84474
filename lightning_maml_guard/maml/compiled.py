"""The meta-gradient under torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from lightning_maml_guard._vectorize import TaskMap
from lightning_maml_guard._warnings import GuardWarning
from lightning_maml_guard.maml.gradients import Auxiliary, MetaGradient, meta_gradient, task_meta_gradient
from lightning_maml_guard.maml.problem import MetaProblem


class CompiledMetaGradient:
    """Computes what :func:`~lightning_maml_guard.maml.gradients.meta_gradient` does, compiled.

    What is compiled is the meta-gradient of one task for a map that loops, of the vmapped tasks otherwise. If that
    fails and the plain computation does not, it says so once and computes plainly from then on.
    """

    def __init__(self) -> None:
        self.given_up = False
        self._functions: dict[Any, Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the functions out of copies and pickles: they hold the original's network, and can't be pickled."""
        return {"given_up": self.given_up, "_functions": {}}

    def __call__(
        self, problem: MetaProblem, *, tasks: TaskMap, learn_rates: bool, auxiliary: Auxiliary
    ) -> MetaGradient:
        """Compute the mean meta-gradient over a problem's tasks.

        Args:
            problem: The problem.
            tasks: How to run over the tasks.
            learn_rates: Also differentiate towards the inner rates.
            auxiliary: ``(adapted params, query) -> pytree of tensors`` of one task.

        Returns:
            The meta-gradient.
        """
        options: dict[str, Any] = {"learn_rates": learn_rates, "auxiliary": auxiliary}
        if self.given_up:
            return meta_gradient(problem, tasks=tasks, **options)
        try:
            return self._compiled(problem, tasks, options)
        except Exception as error:
            result = meta_gradient(problem, tasks=tasks, **options)  # raises what the user's own code raises
            self.given_up = True
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(
                "compile=True: the meta-gradient cannot be compiled here, so it is computed without (slower, same "
                f"result). torch.compile said: {type(error).__name__}: {reason[0]}",
                GuardWarning,
                stacklevel=2,
            )
            return result

    def _compiled(self, problem: MetaProblem, tasks: TaskMap, options: dict[str, Any]) -> MetaGradient:
        params = {name: value.detach() for name, value in problem.params.items()}
        like = next(iter(params.values()))
        rates: Any = problem.inner_lr
        # A tensor: a number would be compiled in, and every cap of the guard would compile anew.
        rates = (
            {name: value.detach() for name, value in rates.items()}
            if isinstance(rates, dict)
            else torch.tensor(rates, dtype=like.dtype, device=like.device)
        )
        function = self._function(problem, tasks.looped, options)
        count = problem.tasks
        size = 1 if tasks.looped else tasks.chunk_size or count
        if size >= count and not tasks.looped:
            (gradients, rate_gradients), (losses, extra) = function(params, rates, problem.support, problem.query)
            return MetaGradient(gradients, rate_gradients if options["learn_rates"] else None, losses, extra)
        total: Any = None
        losses, extras = [], []
        for start in range(0, count, size):
            chosen = start if tasks.looped else slice(start, start + size)
            support, query = (
                tree_map(lambda leaf, at=chosen: leaf[at], data) for data in (problem.support, problem.query)
            )
            found, (loss, extra) = function(params, rates, support, query)
            losses.append(loss.reshape(-1))
            extras.append(tree_map(lambda leaf: leaf.unsqueeze(0), extra) if tasks.looped else extra)
            share = len(losses[-1]) / count
            if total is None:
                total = tree_map(lambda each, share=share: each * share, found)
            else:
                torch._foreach_add_(tree_leaves(total), tree_leaves(found), alpha=share)
        gradients, rate_gradients = total
        return MetaGradient(
            gradients,
            rate_gradients if options["learn_rates"] else None,
            torch.cat(losses),
            tree_map(lambda *leaves: torch.cat(leaves), *extras),
        )

    def _function(self, problem: MetaProblem, looped: bool, options: dict[str, Any]) -> Callable[..., Any]:
        key = problem.order, problem.inner_steps, looped, options["learn_rates"], problem.uniform
        if key not in self._functions:
            loss, order, inner_steps = problem.task_loss, problem.order, problem.inner_steps

            def one(params: Any, rates: Any, support: Any, query: Any) -> Any:
                return task_meta_gradient(
                    loss, params, rates, support, query, inner_steps=inner_steps, order=order, **options
                )

            def chunk(params: Any, rates: Any, support: Any, query: Any) -> Any:
                found, report = torch.func.vmap(one, (None, None, 0, 0), randomness="different")(
                    params, rates, support, query
                )
                return tree_map(lambda each: each.mean(0), found), report

            self._functions[key] = torch.compile(one if looped else chunk)
        return self._functions[key]
