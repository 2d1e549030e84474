"""MetaProblem: one meta-training step's parameters, loss, data and settings, shared by the module and the guard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import ParameterDict
from torch.nn.parameter import is_lazy

from lightning_maml_guard.kernels.shared_weights import StackLosses
from lightning_maml_guard.maml.inner_loop import InnerRate, InnerUpdate, StepRate
from lightning_maml_guard.maml.inner_rates import by_step, is_per_step
from lightning_maml_guard.maml.inner_updates import checked_update
from lightning_maml_guard.theory.multiplier import check_order
from lightning_maml_guard.utils.checks import check_function, check_holds_rate, shown
from lightning_maml_guard.utils.task_map import TaskMap, as_tasks, first_tasks, is_listed, task_count, tree_leaves


@dataclass(frozen=True)
class MetaProblem:
    """One meta-training step's problem: parameters, task loss, data, and how MAML is configured.

    Args:
        params: ``theta``, the parameters that train, by name. Pass the module's own tensors (not copies), so that the
            optimizer's state can be matched to them.
        task_loss: ``(params, one task's data) -> scalar``, computed from the ``params`` it is given. It is vmapped over
            tasks.
        support: The data of the inner loop: a pytree of tensors with a leading task dimension, or a list of tasks, each
            a tuple, list or dict of tensors of its own sizes (a loop goes over these).
        query: The same for the meta loss, with the same number of tasks.
        inner_lr: The inner learning rate ``alpha``: one number, or one tensor per parameter, a scalar or of the
            parameter's shape. Parameters that a dict does not name are not adapted. Rates that differ between the inner
            steps (MAML++): a tensor of shape ``(K,)``, or one of shape ``(K,)`` or ``(K, *shape)`` per parameter.
        inner_steps: Number ``K`` of inner steps.
        order: The meta-gradient: ``"exact"``, ``"first"`` or ``"simplified"``.
        task_chunk_size: Tasks vmapped at once (None: all).
        looped: Run over the tasks one after another instead.
        inner_update: The inner loop's optimizer (None: gradient descent): a differentiable function ``(params, grads,
            state) -> (params, state)``, with state None before a task's first step. ``inner_lr`` multiplies its
            movement; 1.0 for one that holds its own rate. ``maml.inner_updates`` has Momentum, Adam and RMSprop.
        task_losses: ``(params, data) -> losses`` of several tasks at once, in a leading dimension of every tensor,
            where there is something faster than to vmap ``task_loss``. It has to compute the same.

    Attributes:
        tasks: Number of tasks in the batch.
        per_step: Whether the inner rates differ between the steps.

    Raises:
        TypeError: If the params or rates are not a dict of tensors or the loss is not callable.
        ValueError: If a rate, the order, the number of steps or the data's shapes are not allowed.

    Example:
        >>> import torch
        >>> from lightning_maml_guard import MetaProblem
        >>> net = torch.nn.Linear(3, 1)
        >>> def task_loss(params, data):
        ...     x, y = data
        ...     return ((torch.func.functional_call(net, params, (x,)) - y) ** 2).mean()
        >>> data = torch.randn(4, 10, 3), torch.randn(4, 10, 1)  # 4 tasks of 10 points
        >>> problem = MetaProblem(dict(net.named_parameters()), task_loss, support=data, query=data, inner_lr=0.01)
        >>> problem.tasks
        4
    """

    params: dict[str, Tensor]
    task_loss: Callable[[dict[str, Tensor], Any], Tensor]
    support: Any
    query: Any
    inner_lr: float | Tensor | dict[str, Tensor] = 0.0
    inner_steps: int = 1
    order: str = "exact"
    task_chunk_size: int | None = None
    looped: bool = False
    inner_update: InnerUpdate = None
    task_losses: Callable[[dict[str, Tensor], Any], Tensor] | None = None
    tasks: int = field(init=False, repr=False, compare=False)
    per_step: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_params(self.params)
        check_function(
            "task_loss",
            self.task_loss,
            "(params, one task's data) -> scalar tensor",
            "lambda params, data: loss(functional_call(network, params, (data[0],)), data[1])",
        )
        check_order(self.order, self.inner_steps)
        if isinstance(self.inner_lr, ParameterDict):  # in which learned rates are often held
            object.__setattr__(self, "inner_lr", dict(self.inner_lr.items()))
        object.__setattr__(self, "per_step", is_per_step(self.inner_lr, self.params, self.inner_steps))
        if not isinstance(self.inner_lr, (dict, Tensor)):
            check_holds_rate("inner_lr", self.inner_lr, self.params.values())
        self._check_update()
        TaskMap(self.task_chunk_size)
        support, query = as_tasks(self.support, self.query)
        object.__setattr__(self, "support", support)
        object.__setattr__(self, "query", query)
        sets = {"support": tree_leaves(support), "query": tree_leaves(query)}
        counts = [task_count(data, name) for name, data in (("support", support), ("query", query))]
        if counts[0] != counts[1]:
            raise ValueError(
                f"Expected `support` and `query` to hold the same tasks but got {counts[0]} tasks in `support` "
                f"and {counts[1]} in `query`. Give every task both sets, in the same order. (A tensor's dimensions are "
                f"read as (tasks, shots, ...): here {_shapes(sets)}. If its first one counts the shots of a single "
                "task, unsqueeze(0) it; tasks with different numbers of shots go into a list, [(x_1, y_1), ...].)"
            )
        for name, leaves in sets.items():
            leading = 1 if is_listed(getattr(self, name)) else 2
            if not all(leaf.numel() for leaf in leaves) and any(0 in leaf.shape[:leading] for leaf in leaves):
                shapes = [tuple(leaf.shape) for leaf in leaves]
                raise ValueError(
                    f"Expected `{name}` to hold at least one example per task but got shapes {shapes}: the loss of an "
                    "empty set is nan. Draw at least one shot."
                )
        object.__setattr__(self, "tasks", counts[0])

    def _check_update(self) -> None:
        if checked_update(self.inner_update) is None:
            return
        if self.order == "simplified":
            raise ValueError(
                "order='simplified' is about an inner loop of gradient descent, but `inner_update` was given. Choose "
                "order='exact' or 'first', or leave `inner_update` out."
            )
        if self.uniform and self.inner_lr == 0:
            raise ValueError(
                "Expected argument `inner_lr` to be above 0 but got 0: it multiplies the movement of `inner_update`. "
                "Pass the inner rate, or 1.0 for an update that holds its own."
            )

    def loss(self, params: dict[str, Tensor], data: Any) -> Tensor:
        """Compute the loss of one task, and check that it is a loss.

        Args:
            params: Parameters by name.
            data: One task's data.

        Returns:
            The scalar.

        Raises:
            ValueError: If ``task_loss`` does not return a scalar.
            TypeError: If it does not return a tensor.
        """
        value = self.task_loss(params, data)
        expected = "Expected the loss of one task to be a scalar tensor of floats but got"
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{expected} {shown(value)}. Return what torch computed, without float() or item(); a loss that is a "
                "class is made first, as in nn.MSELoss()."
            )
        if value.dim() or not value.is_floating_point():
            raise ValueError(
                f"{expected} {value.dtype} of shape {tuple(value.shape)}. Reduce it over the examples, with "
                "loss.mean() or reduction='mean'; a count is no loss."
            )
        return value

    def side_by_side(self) -> Callable[[dict[str, Tensor], Any], Tensor]:
        """Return the loss of several tasks in a leading dimension of params and data, shape ``(tasks,)``."""
        return self.task_losses or torch.func.vmap(self.loss, (0, 0), randomness="different")

    @property
    def shares_weights(self) -> bool:
        """True if the tasks' inner loops are faster run without weights of each task's own, as ``task_losses`` can."""
        plain, stack = self.order == "exact" and self.inner_update is None and self.uniform, self.task_losses
        return plain and isinstance(stack, StackLosses) and stack.is_worthwhile(self.support, self.inner_steps)

    def adapted_losses(
        self, params: dict[str, Tensor], rate: Any, support: Any, query: Any, along: Any = None
    ) -> Tensor:
        """Compute the query losses of several tasks after their inner loops, where they share their weights."""
        assert isinstance(self.task_losses, StackLosses)
        return self.task_losses.adapted(params, rate, support, query, self.inner_steps, along)

    def part(self, tasks: int) -> MetaProblem:
        """Return the problem with the batch's first tasks only, or this one if it has no more than ``tasks``."""
        if tasks >= self.tasks:
            return self
        support, query = (first_tasks(data, tasks) for data in (self.support, self.query))
        return replace(self, support=support, query=query)

    def at_factor(self, factor: float) -> MetaProblem:
        """Return the problem with every inner rate multiplied by ``factor``."""
        rate = self.inner_lr
        scaled = {name: each * factor for name, each in rate.items()} if isinstance(rate, dict) else rate * factor
        # At 0 nothing moves, whatever the update.
        return replace(self, inner_lr=scaled, inner_update=self.inner_update if factor else None)

    @property
    def alpha(self) -> float:
        """The inner rate ``alpha``: the number, or the largest of the rates."""
        if not isinstance(self.inner_lr, dict):
            return float(self.inner_lr if self.uniform else self.inner_lr.detach().max())  # type: ignore[union-attr]
        if not self.inner_lr:
            return 0.0
        return max(float(rate.detach().max()) for rate in self.inner_lr.values())

    @property
    def uniform(self) -> bool:
        """True if one rate moves every parameter in every step, as Takagi et al. assume."""
        return not isinstance(self.inner_lr, (dict, Tensor))

    @property
    def listed(self) -> bool:
        """True if the tasks are listed one by one, each of its own size."""
        return is_listed(self.support) or is_listed(self.query)

    def rate_by_step(self) -> InnerRate:
        """Return the rates as the inner loop takes them, without a graph.

        Returns:
            One rate for all steps (the number, or a tensor per parameter), or a tuple of one per step.
        """
        rates = self.inner_lr
        if isinstance(rates, dict):
            rates = {name: rate.detach() for name, rate in rates.items()}
        if self.per_step:
            return by_step(rates.detach() if isinstance(rates, Tensor) else rates, self.params, self.inner_steps)
        return rates if isinstance(rates, dict) else float(rates)

    def rates(self) -> dict[str, Tensor]:
        """Expand the inner rates to one per parameter entry, with a leading step dimension if they differ between them.

        Returns:
            Tensors of the parameters' shapes; 0 where nothing is adapted.

        Raises:
            ValueError: If a rate is not finite.
        """
        rates = self.rate_by_step()
        if isinstance(rates, tuple):
            each = [self._expanded(rate) for rate in rates]
            return {name: torch.stack([step[name] for step in each]) for name in self.params}
        return self._expanded(rates)

    def _expanded(self, rates: StepRate) -> dict[str, Tensor]:
        expanded = {}
        for name, value in self.params.items():
            rate = rates.get(name, 0.0) if isinstance(rates, dict) else rates
            rate = torch.as_tensor(rate, dtype=value.dtype, device=value.device).detach()
            if not bool(torch.isfinite(rate).all()):
                raise ValueError(
                    f"The inner rate of {name!r} holds nan or inf: no update follows from it. Start learned rates from "
                    "a finite `inner_lr`, and lower the optimizer's lr if they left it."
                )
            expanded[name] = rate.expand(value.shape)
        return expanded


def _shapes(sets: dict[str, list[Tensor]]) -> str:
    return "; ".join(f"`{name}` {[tuple(leaf.shape) for leaf in leaves]}" for name, leaves in sets.items())


def check_named(params: Any) -> None:
    """Raise a TypeError if a value is no dict from names to tensors."""
    if not isinstance(params, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in params.items()
    ):
        raise TypeError(
            "Expected argument `params` to be a dict from names to tensors but got "
            f"{shown(params) if isinstance(params, dict) else type(params).__name__}. Pass "
            "dict(module.named_parameters())."
        )


def _check_params(params: dict[str, Tensor]) -> None:
    check_named(params)
    # One of each kind stands for all of them: this runs at every step.
    kinds = {(type(value), value.dtype, value.device): value for value in params.values()}
    if any(is_lazy(value) for value in kinds.values()):
        lazy = [name for name, value in params.items() if is_lazy(value)]
        raise ValueError(
            f"Expected argument `params` to be initialised but the shapes of {lazy} are not known yet (lazy layers). "
            "Run the network once on a batch before training."
        )
    if not any(value.numel() for value in params.values()):
        raise ValueError(
            "Expected argument `params` to hold at least one parameter but it is empty: the network has none, "
            "or all of them are frozen (requires_grad=False). Unfreeze at least one."
        )
    if not all(value.is_floating_point() for value in kinds.values()):
        odd = {name: value.dtype for name, value in params.items() if not value.is_floating_point()}
        raise ValueError(
            f"Expected argument `params` to hold real floating-point tensors but got {odd}. Pass the parameters that "
            "train; leave buffers and complex ones out."
        )
    devices = {device for _, _, device in kinds}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise ValueError(
            "Expected argument `params` to lie on one device that holds values but got "
            f"{sorted(str(device) for device in devices)}. Move the network there, as in network.to('cpu')."
        )
