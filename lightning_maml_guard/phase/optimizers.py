"""Meta-optimizers as functions, with one learning rate per run; each steps as its namesake of ``torch.optim``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_maml_guard.optim.stability_limits import adam_response, sgd_response
from lightning_maml_guard.theory.linear_response import Response

Params = dict[str, Tensor]
State = dict[str, Params]


def broadcast_runs(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one value per run, shape ``(runs,)``, to multiply a parameter of shape ``(runs, ...)``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


class MetaOptimizer(ABC):
    """A meta-optimizer as a function of parameters, gradients and state."""

    @property
    @abstractmethod
    def response(self) -> Response:
        """Its linear response once bias corrections have settled; ``response.limit`` is the stability limit ``c``."""

    @abstractmethod
    def init(self, params: Params) -> State:
        """Make the state before the first step.

        Args:
            params: Parameters, each of shape ``(runs, ...)``.

        Returns:
            The state: named groups of tensors with the parameters' names and shapes.
        """

    @abstractmethod
    def step(self, params: Params, gradients: Params, state: State, rates: Tensor, taken: int) -> tuple[Params, State]:
        """Take a step.

        Args:
            params: Parameters, each of shape ``(runs, ...)``.
            gradients: Meta-gradients of the same shapes.
            state: The state.
            rates: Outer learning rate ``beta`` of each run, shape ``(runs,)``.
            taken: Steps taken before.

        Returns:
            The new parameters and the new state.
        """

    def preconditioner(self, state: State, taken: int) -> Params | None:
        """Compute the diagonal ``P`` that divides the gradient.

        Args:
            state: The state.
            taken: Steps taken.

        Returns:
            ``P`` by parameter, each of shape ``(runs, ...)``; None where ``P = 1``.
        """
        return None

    @property
    def preconditioned(self) -> bool:
        """Whether second moments divide the gradient; they do not exist before the first step."""
        return False


@dataclass(frozen=True)
class SGD(MetaOptimizer):
    """Stochastic gradient descent, as ``torch.optim.SGD``.

    Args:
        momentum: Share of the momentum buffer that is kept, in [0, 1).
        nesterov: Use Nesterov's momentum.

    Raises:
        ValueError: If the momentum is out of its range, or if ``nesterov`` is set without momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Expected argument `momentum` to be at least 0 and below 1 but got {self.momentum!r}.")
        if self.nesterov and not self.momentum:
            raise ValueError("Argument `nesterov` needs a `momentum` above 0 but got momentum=0: set one of them.")

    @property
    def response(self) -> Response:
        """Its linear response."""
        return sgd_response(self.momentum, nesterov=self.nesterov)

    def init(self, params: Params) -> State:
        """Make the state: the momentum buffer, or nothing without momentum."""
        return {"buffer": {n: torch.zeros_like(p) for n, p in params.items()}} if self.momentum else {}

    def step(self, params: Params, gradients: Params, state: State, rates: Tensor, taken: int) -> tuple[Params, State]:
        """Take a step; see :meth:`MetaOptimizer.step`."""
        moves = gradients
        if self.momentum:
            buffer = {n: self.momentum * state["buffer"][n] + g for n, g in gradients.items()}
            state = {"buffer": buffer}
            moves = {n: g + self.momentum * buffer[n] for n, g in gradients.items()} if self.nesterov else buffer
        return {n: p - broadcast_runs(rates, p) * moves[n] for n, p in params.items()}, state


@dataclass(frozen=True)
class Adam(MetaOptimizer):
    """Adam (Kingma and Ba 2015), as ``torch.optim.Adam``.

    Args:
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.

    Raises:
        ValueError: If a number is out of its range.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"Expected argument `{name}` to be at least 0 and below 1 but got {value!r}.")
        if not self.eps >= 0:
            raise ValueError(f"Expected argument `eps` to be at least 0 but got {self.eps!r}.")

    @property
    def response(self) -> Response:
        """Its linear response for a frozen second moment and a settled bias correction."""
        return adam_response(self.beta1)

    @property
    def preconditioned(self) -> bool:
        """Whether second moments divide the gradient: True."""
        return True

    def init(self, params: Params) -> State:
        """Make the state: the first and the second moment."""
        return {moment: {n: torch.zeros_like(p) for n, p in params.items()} for moment in ("first", "second")}

    def step(self, params: Params, gradients: Params, state: State, rates: Tensor, taken: int) -> tuple[Params, State]:
        """Take a step; see :meth:`MetaOptimizer.step`."""
        first = {n: self.beta1 * state["first"][n] + (1 - self.beta1) * g for n, g in gradients.items()}
        second = {n: self.beta2 * state["second"][n] + (1 - self.beta2) * g * g for n, g in gradients.items()}
        state = {"first": first, "second": second}
        divisor = self.preconditioner(state, taken + 1)
        corrected = rates / (1 - self.beta1 ** (taken + 1))
        return {n: p - broadcast_runs(corrected, p) * first[n] / divisor[n] for n, p in params.items()}, state

    def preconditioner(self, state: State, taken: int) -> Params:
        """Compute ``P = sqrt(v_hat) + eps``, for ``taken`` of at least 1; see :meth:`MetaOptimizer.preconditioner`."""
        correction = (1 - self.beta2**taken) ** 0.5
        return {n: v.sqrt() / correction + self.eps for n, v in state["second"].items()}


_BY_NAME: dict[str, MetaOptimizer] = {"sgd": SGD(), "adam": Adam()}


def meta_optimizer(given: str | MetaOptimizer) -> MetaOptimizer:
    """Look a meta-optimizer up by name.

    Args:
        given: ``"sgd"``, ``"adam"``, or a meta-optimizer, which is returned as it is.

    Returns:
        The meta-optimizer.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(given, MetaOptimizer):
        return given
    if not isinstance(given, str) or given not in _BY_NAME:
        raise ValueError(
            f"Expected argument `optimizer` to be one of {sorted(_BY_NAME)} or a MetaOptimizer of "
            f"lightning_maml_guard.phase.optimizers, such as SGD(momentum=0.9), but got {given!r}."
        )
    return _BY_NAME[given]
