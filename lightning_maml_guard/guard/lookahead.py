"""A trial run: the coming steps on copies of parameters and optimizer state, to see whether the loss survives them.

Curvature at a point says which rates grow along some direction; healthy runs live there (the edge of stability). What
tells a dying run is that the loss itself leaves, so the guard looks: it takes the next steps with the batches at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_maml_guard.linalg.layout import Layout, Params
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.optim.shadow import Clip, Twin, refuse_closures
from lightning_maml_guard.stability.objective import MamlSubject, PlainSubject, Subject
from lightning_maml_guard.stability.plain import PlainProblem
from lightning_maml_guard.utils.distributed import Ranks
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.random_state import preserved_randomness
from lightning_maml_guard.utils.task_map import TaskMap, as_float32


@dataclass(frozen=True)
class Trial:
    """What a trial run saw.

    Attributes:
        losses: Loss before each step, on that step's batch; the last is the loss after all of them, on the batch of
            the first step.
    """

    losses: tuple[float, ...]

    @property
    def begin(self) -> float:
        """Loss of the first batch before the steps."""
        return self.losses[0]

    @property
    def end(self) -> float:
        """Loss of the first batch after the steps; ``inf`` if any loss on the way was not finite."""
        return self.losses[-1] if all(map(math.isfinite, self.losses)) else math.inf

    @property
    def growth(self) -> float:
        """Factor a step by which the loss grew."""
        steps = len(self.losses) - 1
        return (self.end / self.begin) ** (1 / steps) if self.begin > 0 and self.end >= 0 else math.nan


class TrialRunner:
    """Tries the coming steps, as configured or at lower rates.

    The batches come in the given order, round and round. Learned inner rates stay as they are,
    and every step uses one batch, also under gradient accumulation.

    Args:
        problems: The problem of the coming batch and of the batches to go on with.
        optimizer: The live optimizer, or the rate of plain SGD.
        steps: Number of steps.
        task_map: How to run over the tasks.
        clip: Clips gradients as the run does.
        ranks: The processes that step together.

    Raises:
        ClosureError: If the optimizer needs a closure.
    """

    def __init__(
        self,
        problems: Sequence[MetaProblem | PlainProblem],
        optimizer: Optimizer | float,
        steps: int,
        task_map: TaskMap | None = None,
        clip: Clip | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        tasks = task_map or TaskMap()
        self._subjects: list[Subject] = [
            PlainSubject(each) if isinstance(each, PlainProblem) else MamlSubject(each, "support", tasks)
            for each in problems
        ]
        self._live = problems[0].params
        if isinstance(optimizer, Optimizer):
            self._optimizer = optimizer
        else:
            self._optimizer = SGD([value.detach().requires_grad_() for value in self._live.values()], lr=optimizer)
        self._owned = isinstance(optimizer, Optimizer)
        refuse_closures(self._optimizer)
        self._steps, self._clip = steps, clip
        self.batches = len(problems)
        self.runs = 0

    def run(self, alpha_factor: float = 1.0, beta_factor: float = 1.0, first: int = 0) -> Trial:
        """Try the steps.

        Args:
            alpha_factor: Factor on the inner rates.
            beta_factor: Factor on the optimizer's rates.
            first: Index of the batch that the first step uses.

        Returns:
            What the trial saw.
        """
        self.runs += 1
        live = self._live
        if not self._owned:
            live = dict(zip(self._live, self._optimizer.param_groups[0]["params"], strict=True))
        with preserved_randomness(), double_backward():
            torch.manual_seed(0)  # the same dropout masks at every rate, so that trials can be compared
            twin = Twin(self._optimizer, live, beta_factor)
            losses = []
            for step in range(self._steps):
                value, gradient = self._evaluate(twin.params, first + step, alpha_factor)
                losses.append(value)
                twin.step(gradient, self._clip)
            losses.append(self._evaluate(twin.params, first, alpha_factor)[0])
            return Trial(tuple(torch.stack(losses).tolist()))

    def _evaluate(self, params: Params, index: int, factor: float) -> tuple[Tensor, Params]:
        subject = self._subjects[index % len(self._subjects)]
        field = (subject.update(factor) if isinstance(subject, MamlSubject) else subject.curvature(False))[0]
        leaves = {name: value.detach().requires_grad_() for name, value in as_float32(params).items()}
        value, gradients = field(leaves, False)
        known = {name: gradients[name] for name in leaves}
        filled = {n: torch.zeros_like(leaves[n]) if g is None else g.detach() for n, g in known.items()}
        if self._ranks.size == 1:
            return value.detach().float(), filled
        layout = Layout(filled)
        return self._ranks.mean(value.float()), layout.split(self._ranks.mean(layout.flatten(filled)))
