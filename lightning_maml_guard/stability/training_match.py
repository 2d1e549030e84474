"""Is the problem that is measured the one that training descends? Its loss and meta-gradient beside training's own."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_maml_guard.linalg.layout import Layout, Params
from lightning_maml_guard.linalg.operators import value_and_gradient
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.stability.objective import Objective, Target
from lightning_maml_guard.stability.problems import MetaProblem, PlainProblem, Problem
from lightning_maml_guard.utils.distributed import Ranks
from lightning_maml_guard.utils.random_state import preserved_randomness
from lightning_maml_guard.utils.shards import local

# Relative difference of losses, and of gradients, that is no mismatch: rounding, kinks and other orders of summation.
_LOSS_GAP, _GRADIENT_GAP = 0.01, 0.1
# The same in half precision and under autocast, for the problem is evaluated in float32.
_HALF_LOSS_GAP, _HALF_GRADIENT_GAP = 0.1, 0.5
# If training draws random numbers, its loss differs each time: within this factor there is no mismatch.
_RANDOM_FACTOR = 2.0
# Evaluations that show the problem's own scatter if two differ; multiples of their range that are no mismatch.
_DRAWS, _SCATTER = 4, 3.0
# Units in the last place by which parameters are moved to see what rounding does: a diverging inner loop amplifies it.
_LAST_PLACES = 16
# How near a ratio of losses must be to a number of tasks or batches to be explained by it, and cosines for one
# direction.
_EXPLAINED_WITHIN, _PARALLEL_FROM = 0.05, 0.995


@dataclass
class _Products:
    """Squared norms of training's gradient and of the problem's, and their inner product."""

    along: float = 0.0
    size: float = 0.0
    own_size: float = 0.0

    def add(self, along: float, size: float, own_size: float) -> None:
        """Add those of more parameters."""
        self.along, self.size, self.own_size = self.along + along, self.size + size, self.own_size + own_size

    @property
    def cosine(self) -> float:
        """Of the angle between both; ``nan`` where one is 0."""
        product = math.sqrt(self.size * self.own_size)
        return self.along / product if product > 0 else math.nan

    @property
    def is_shortened(self) -> bool:
        """Whether training's has the problem's direction and is shorter: clipped."""
        return self.cosine > _PARALLEL_FROM and self.along < (1 - _GRADIENT_GAP) * self.own_size

    def is_no_other(self, share: float) -> bool:
        """Whether training's is the problem's up to a share of its length, or that clipped."""
        if self.own_size == 0 or (self.cosine > _PARALLEL_FROM and self.along <= self.own_size):
            return self.own_size > 0 or self.size == 0
        gap = max(self.size + self.own_size - 2 * self.along, 0.0)
        return math.sqrt(gap / self.own_size) <= share


class RandomStates:
    """Whether random numbers were drawn since this was made."""

    def __init__(self) -> None:
        self._states = self._read()

    def drawn(self) -> bool:
        """Return True if they were."""
        return self._read() != self._states

    @staticmethod
    def _read() -> tuple[Any, ...]:
        tensors = [torch.get_rng_state()]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            tensors += torch.cuda.get_rng_state_all()
        numbers = repr(np.random.get_state(legacy=False)["state"])
        return [each.numpy().tobytes() for each in tensors], random.getstate(), numbers


class TrainingMatch:
    """Compares a problem with the step that trains on the same batch: once, without touching training.

    Args:
        problem: The problem of the batch, before any accumulation.
        objective: The same, made for measuring.
        optimizers: Those that move its parameters.
        others: All optimizers of the run.
        accumulated: Batches whose gradients a step averages; gradients are compared where it is 1.
        half: Whether training computes in half precision.
        ranks: The processes that train together.
    """

    def __init__(
        self,
        problem: Problem,
        objective: Objective,
        optimizers: Sequence[Optimizer],
        others: Sequence[Optimizer] = (),
        *,
        accumulated: int = 1,
        half: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._params, self._ranks, self._space = problem.params, ranks or Ranks(), objective.space
        self._optimizers, self._others = list(optimizers), list(others) or list(optimizers)
        self._tasks: int = getattr(problem, "tasks", 1)
        self._alpha: float = getattr(problem, "alpha", math.nan)
        self._accumulated, self._half, self._plain = accumulated, half, isinstance(problem, PlainProblem)
        # Learned inner rates are moved too, and are no parameters of the update that is linearized.
        self._learns_rates = isinstance(problem, MetaProblem) and not isinstance(problem.inner_lr, (int, float))
        self._evaluate(objective)
        self._random = RandomStates()
        self._all, self._by_optimizer = _Products(), [_Products() for _ in self._optimizers]
        self._seen: set[str] = set()
        self._lacking, self._finite = False, True

    def is_at(self, alpha: float) -> bool:
        """Return True if the problem was stated at this inner rate, or has none."""
        return math.isnan(self._alpha) or math.isclose(self._alpha, alpha, rel_tol=1e-6)

    def take_gradient(self, optimizer: Optimizer) -> None:
        """Compare the gradients that an optimizer is about to step along."""
        found = [self._by_optimizer[at] for at, each in enumerate(self._optimizers) if each is optimizer]
        if self._accumulated > 1 or not found:
            return
        names = {id(value): name for name, value in self._params.items()}
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            gradient, name = parameter.grad, names.get(id(parameter))
            if name in self._seen or (gradient is not None and gradient.layout != torch.strided):
                continue
            if name is None:
                self._lacking = self._lacking or (gradient is not None and bool(gradient.any()))
                continue
            own = self._gradient[name].double()
            gradient = torch.zeros_like(own) if gradient is None else local(gradient.detach()).double()
            products = self._space.total(torch.stack([(own * gradient).sum(), (gradient**2).sum(), (own**2).sum()]))
            for each in (self._all, *found):
                each.add(*products.tolist())
            self._seen.add(name)
            self._finite = self._finite and math.isfinite(self._all.size)

    def finish(self, loss: float) -> Reason | None:
        """Compare the loss (``nan``: not known) as well; returns what does not match, and why."""
        random_training = self._random.drawn() or self.spread > 0
        factor, effect = loss / self.loss if self.loss else math.nan, ""
        if math.isfinite(loss) and not math.isfinite(self.loss):
            effect = "not finite"
        elif not math.isfinite(self.loss) or math.isinf(loss):
            return None
        wrong_loss = not math.isnan(loss) and self._loss_differs(loss, random_training)
        wrong_gradient = not random_training and self._gradient_differs()
        if self._seen and self._finite and len(self._others) > len(self._optimizers) and not random_training:
            wrong_loss = wrong_loss and wrong_gradient  # the loss may be that of another optimizer
        if math.isnan(loss) and wrong_gradient and self._all.cosine > _PARALLEL_FROM:
            factor = self._all.along / self._all.own_size
        if wrong_loss or wrong_gradient or effect:
            effect = effect or self._cause(factor, wrong_loss or math.isnan(loss))
        elif self._lacking and not self._learns_rates:
            effect = "lacking"
        if not effect:
            return None
        counts = {"tasks": self._tasks, "accumulated": self._accumulated}.get(effect, self._tasks)
        names = {"frozen": self._frozen, "not held": self._not_held}.get(effect, [])
        return Reason(
            Kind.PROBLEM_DIFFERS,
            value=factor,
            losses=(self.loss, loss, math.nan),
            steps=counts,
            effect=effect,
            what=_shown(names),
        )

    def _evaluate(self, objective: Objective) -> None:
        target = objective.update()
        self.loss, self._gradient = self._evaluated(target, 0)
        losses = [self.loss]
        for seed in range(1, _DRAWS):
            losses.append(self._evaluated(target, seed)[0])
            if losses[1] == self.loss:
                break
        loss, gradient = self._evaluated(target._replace(params=_rounded(target.params)), 0)
        gaps = [(gradient[name] - own).double().square().sum() for name, own in self._gradient.items()]
        sizes = [own.double().square().sum() for own in self._gradient.values()]
        gap, size = self._space.total(torch.stack([torch.stack(gaps).sum(), torch.stack(sizes).sum()])).tolist()
        self.rounding = abs(loss - self.loss) if math.isfinite(loss - self.loss) else 0.0
        self._rounding_share = math.sqrt(gap / size) if size > 0 and math.isfinite(gap) else 0.0
        self.spread = max(losses) - min(losses) if all(map(math.isfinite, losses)) else 0.0

    def _evaluated(self, target: Target, seed: int) -> tuple[float, Params]:
        """The loss and the gradient with random numbers from a seed."""
        with preserved_randomness():
            torch.manual_seed(seed)
            value, gradient = value_and_gradient(target.field, target.params)
        layout = Layout(target.params)
        gradient = layout.split(self._ranks.mean(layout.flatten(gradient)))
        return float(self._ranks.mean(value.detach().float())), gradient

    def _loss_differs(self, loss: float, random_training: bool) -> bool:
        share = _HALF_LOSS_GAP if self._half else _LOSS_GAP
        allowed = share * max(abs(loss), abs(self.loss)) + _SCATTER * (self.spread + self.rounding)
        if random_training and loss > 0 and self.loss > 0:
            allowed = max(allowed, (_RANDOM_FACTOR - 1) * min(loss, self.loss))
        elif random_training:
            allowed = max(allowed, max(abs(loss), abs(self.loss)))
        return abs(loss - self.loss) > allowed

    def _gradient_differs(self) -> bool:
        if not self._seen or not self._finite or self._all.own_size == 0:
            return False
        share = (_HALF_GRADIENT_GAP if self._half else _GRADIENT_GAP) + _SCATTER * self._rounding_share
        # Where each optimizer's gradients are clipped by themselves, all together have another direction.
        return not (self._all.is_no_other(share) or all(each.is_no_other(share) for each in self._by_optimizer))

    @property
    def clipped_to(self) -> float:
        """Length that training brought a gradient down to before its step; ``nan`` where it did not, or to several."""
        lengths = [math.sqrt(each.size) for each in self._by_optimizer if each.is_shortened and self._finite]
        if lengths and max(lengths) < (1 + _LOSS_GAP) * min(lengths):
            return max(lengths)
        return math.sqrt(self._all.size) if self._finite and self._all.is_shortened else math.nan

    def _cause(self, factor: float, wrong_loss: bool) -> str:
        for name, number in (("tasks", self._tasks), ("accumulated", self._accumulated)):
            if (
                wrong_loss
                and number > 1
                and factor > 0
                and min(abs(math.log(factor * n)) for n in (number, 1 / number)) < _EXPLAINED_WITHIN
            ):
                return name
        lacking = self._lacking and not self._learns_rates
        if self._frozen or self._not_held:
            return "frozen" if self._frozen else "not held"
        if lacking or self._plain:
            return "lacking" if lacking else "plain"
        return "other" if wrong_loss else "gradient"

    @property
    def _frozen(self) -> list[str]:
        return [n for n, value in self._params.items() if isinstance(value, nn.Parameter) and not value.requires_grad]

    @property
    def _not_held(self) -> list[str]:
        held = {id(p) for each in self._others for group in each.param_groups for p in group["params"]}
        return [name for name, value in self._params.items() if id(value) not in held] if held else []


def _rounded(params: Params) -> Params:
    """Move parameters by some units in the last place, each up or down."""
    with preserved_randomness():
        torch.manual_seed(0)
        return {
            name: value.detach()
            * (1 + _LAST_PLACES * torch.finfo(value.dtype).eps * (2 * torch.randint_like(value, 2) - 1))
            for name, value in params.items()
        }


def check_reference(value: Any) -> float:
    """Read ``check_against``. Raises a TypeError if it is no number."""
    number = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if not number and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(
            f"Expected argument `check_against` to be the loss of training, a number or a tensor of one element, but "
            f"got {type(value).__name__}. Pass what training_step returned for the same batch."
        )
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
