"""What a MAML module and the guard share: the problem as it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_maml_guard._vectorize import TaskMap, task_count
from lightning_maml_guard.theory.multiplier import check_order, check_rate


@dataclass(frozen=True)
class MetaProblem:
    """One meta-training step's problem: parameters, task loss, data, and how MAML is configured.

    Args:
        params: ``theta``, the parameters training moves, by name. Pass the module's own tensors (not
            copies), so that the optimizer's state can be matched to them.
        task_loss: ``(params, one task's data) -> scalar``, computed from the ``params`` it is given. It is
            vmapped over tasks.
        support: Pytree of tensors with a leading task dimension: what the inner loop descends on.
        query: The same for the meta loss. The two have the same number of tasks.
        inner_lr: The inner rate ``alpha``: one number, or a tensor a parameter (parameters that are not
            named are not adapted).
        inner_steps: Number ``K`` of inner steps.
        order: How the meta-gradient is taken: ``"exact"``, ``"first"`` or ``"simplified"``.
        task_chunk_size: Tasks vmapped at once (None: all).

    Raises:
        TypeError: If the params are not a dict of tensors or the loss is not callable.
        ValueError: If a rate, the order, the number of steps or the data's shapes are not allowed.
    """

    params: dict[str, Tensor]
    task_loss: Callable[[dict[str, Tensor], Any], Tensor]
    support: Any
    query: Any
    inner_lr: float | dict[str, Tensor] = 0.0
    inner_steps: int = 1
    order: str = "exact"
    task_chunk_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.params, dict) or not all(isinstance(p, Tensor) for p in self.params.values()):
            raise TypeError(
                "Expected argument `params` to be a dict from names to tensors, as in "
                f"dict(module.named_parameters()), but got {type(self.params).__name__}."
            )
        if not self.params:
            raise ValueError(
                "Expected argument `params` to hold at least one parameter but it is empty: the network has none, "
                "or all of them are frozen (requires_grad=False)."
            )
        if not callable(self.task_loss):
            raise TypeError(f"Expected argument `task_loss` to be callable but got {type(self.task_loss).__name__}.")
        check_order(self.order, self.inner_steps)
        if isinstance(self.inner_lr, dict):
            unknown = sorted(set(self.inner_lr) - set(self.params))
            if unknown:
                raise ValueError(
                    f"Argument `inner_lr` names {unknown}, which are not among the parameters {sorted(self.params)}."
                )
        else:
            check_rate(self.inner_lr, "inner_lr")
        TaskMap(self.task_chunk_size)
        counts = task_count(self.support, "support"), task_count(self.query, "query")
        if counts[0] != counts[1]:
            raise ValueError(
                f"Expected `support` and `query` to hold the same tasks but got {counts[0]} tasks in `support` "
                f"and {counts[1]} in `query`."
            )

    @property
    def tasks(self) -> int:
        """Number of tasks in the batch."""
        return task_count(self.support, "support")

    @property
    def alpha(self) -> float:
        """The inner rate ``alpha``: the number, or the largest of the rates by parameter."""
        if not isinstance(self.inner_lr, dict):
            return float(self.inner_lr)
        if not self.inner_lr:
            return 0.0
        return max(float(rate.detach().max()) for rate in self.inner_lr.values())

    @property
    def uniform(self) -> bool:
        """Whether one rate moves every parameter, as the poster assumes."""
        return not isinstance(self.inner_lr, dict)

    def rates(self) -> dict[str, Tensor]:
        """Expand the inner rates to one a parameter entry.

        Returns:
            Tensors of the parameters' shapes; 0 where nothing is adapted.

        Raises:
            ValueError: If a rate is not finite.
        """
        expanded = {}
        for name, value in self.params.items():
            rate = self.inner_lr.get(name, 0.0) if isinstance(self.inner_lr, dict) else self.inner_lr
            rate = torch.as_tensor(rate, dtype=value.dtype, device=value.device).detach()
            if not bool(torch.isfinite(rate).all()):
                raise ValueError(f"The inner rate of {name!r} holds nan or inf: no update follows from it.")
            expanded[name] = rate.expand(value.shape)
        return expanded
