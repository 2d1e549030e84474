"""The next steps tried on copies of parameters and optimizer state, to see whether the loss survives them.

Curvature at a point says at which rates the error grows along some direction. Healthy runs are often there (the edge of
stability). A run diverges only if its loss rises too, so the guard takes the next steps, with the batches at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_maml_guard.linalg.layout import Layout, Params, unpaired
from lightning_maml_guard.lookahead.divergence import Scale, passes
from lightning_maml_guard.lookahead.learned_rates import LearnedRates
from lightning_maml_guard.lookahead.results import LookaheadResult
from lightning_maml_guard.optim.clipping import ModuleClipping, run_clipping
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.shadow import Clip, ShadowOptimizer, check_no_closure
from lightning_maml_guard.optim.stability_limits import Optimizers, is_memoryless, listed
from lightning_maml_guard.stability.hvp import MeasurementCache
from lightning_maml_guard.stability.objective import Objective, objective_of
from lightning_maml_guard.stability.problems import Problem
from lightning_maml_guard.utils.checks import check_count, check_flag, check_number
from lightning_maml_guard.utils.distributed import Ranks
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.random_state import preserved_randomness, seed_generators
from lightning_maml_guard.utils.task_map import TaskMap

# Cost of a loss, in gradients.
LOSS_COST = 0.5


@dataclass(frozen=True)
class LookaheadOptions:
    """How a guard looks ahead: it tries the next steps on copies, to see whether the run diverges.

    Args:
        steps: Steps to try, each about the cost of a training step; 0 tries none, and the critical values alone decide.
        batches: Batches to try them on, those of the coming step and of the steps before it. They stay on the device:
            by reference, or as copies where a training step changes its batch. With fewer than 8, most diverging runs
            are missed where every step draws new tasks (GuardBench).
        divergence_ratio: Factor over the loss that training started from at which a run counts as diverging, above 1.
        triggers: Whether a loss above twice its running mean, or a gradient norm above four times its own, calls a
            check between the scheduled ones. For this one number per step is read from the device.

    Raises:
        ValueError: If a value is not allowed.

    Example:
        >>> from lightning_maml_guard import ConvergenceGuard, LookaheadOptions
        >>> ConvergenceGuard(lookahead=LookaheadOptions(steps=5)).lookahead.divergence_ratio
        3.0
    """

    steps: int = 10
    batches: int = 8
    divergence_ratio: float = 3.0
    triggers: bool = True

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 0)
        check_count("batches", self.batches)
        check_number("divergence_ratio", self.divergence_ratio, above=1)
        check_flag("triggers", self.triggers)


def check_lookahead(value: Any) -> None:
    """Raise a TypeError if a value is no LookaheadOptions."""
    if not isinstance(value, LookaheadOptions):
        raise TypeError(
            f"Expected argument `lookahead` to be a LookaheadOptions but got {type(value).__name__}. Pass "
            "LookaheadOptions(steps=5), say, with the options that differ from their defaults."
        )


@dataclass(frozen=True)
class Caps:
    """Largest rates to apply; None applies the configured ones."""

    alpha: float | None = None
    beta: float | None = None

    def applied(self, alpha: float, beta: float) -> tuple[float, float]:
        """Apply the caps to the configured inner rate (``nan`` without an inner loop) and the scheduled outer rate."""
        return _capped(alpha, self.alpha), _capped(beta, self.beta)

    def at_most(self, beta: float | None) -> Caps:
        """Lower the cap on the outer rate to a value, if one is given."""
        return self if beta is None else Caps(self.alpha, _capped(beta, self.beta))

    def halved(self, beta: float) -> Caps:
        """Cap at half the outer rate that is applied."""
        return Caps(self.alpha, _capped(beta, self.beta) / 2)


def _capped(rate: float, cap: float | None) -> float:
    return rate if cap is None or not rate > cap else cap


class Lookahead:
    """Tries the next steps, as configured or under caps.

    The batches come in the given order, round and round; under gradient accumulation a problem is that of all batches
    of a step. Learned inner rates move as well. Several optimizers step together. Raises a ClosureError if one needs a
    closure. ``hook`` clips as the module does; ``sees_clipping`` is False where clipping is out of sight.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        optimizers: Optimizers | float,
        steps: int,
        task_map: TaskMap | None = None,
        clip: Clip | None = None,
        ranks: Ranks | None = None,
        *,
        hook: ModuleClipping | None = None,
        sees_clipping: bool = True,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._tasks = task_map or TaskMap()
        self._objectives, self._after = self._objectives_of(problems), list[Objective]()
        self._owned = not isinstance(optimizers, (int, float))
        self._optimizers: list[Optimizer]
        if isinstance(optimizers, (int, float)):
            self._optimizers = [
                SGD([value.detach().requires_grad_() for value in problems[0].params.values()], lr=optimizers)
            ]
        else:
            self._optimizers = listed(optimizers)
        for each in self._optimizers:
            check_no_closure(each)
        self._learned = LearnedRates(problems[0], self._optimizers)
        self._live: Params = {**problems[0].params, **self._learned.live}
        self._steps, self._clip, self._hook, self._sees_clipping = steps, clip, hook, sees_clipping
        self.alpha: float = getattr(problems[0], "alpha", math.nan)
        self.beta = scheduled_rate(self._optimizers)
        self.batches = len(problems)
        self.groups: Sequence[dict[str, Any]] = ()  # settings of the optimizers to try instead of those at hand
        self.before_run: Callable[[], None] | None = None
        self.gradients = 0.0  # computed so far
        self.begin = math.nan  # loss of the first batch, where the next steps were judged

    def _objectives_of(self, problems: Sequence[Problem]) -> list[Objective]:
        return [objective_of(each, "support", self._tasks) for each in problems]

    def evaluate_after(self, problems: Sequence[Problem]) -> None:
        """Evaluate these problems after the steps of a run, instead of the batch of its first step."""
        self._after = self._objectives_of(problems)

    @property
    def has_memory(self) -> bool:
        """Whether a step depends on earlier gradients, as with momentum or Adam."""
        return not all(is_memoryless(each) for each in self._optimizers)

    @property
    def clipping_failure(self) -> Exception | None:
        """Why the module's own clipping could not be done on a copy; None if it could."""
        return None if self._hook is None else self._hook.failure

    @property
    def sees_clipping(self) -> bool:
        """Whether gradients are clipped here as they are in the run."""
        return self._sees_clipping and self.clipping_failure is None

    def under(self, caps: Caps, first: int = 0) -> LookaheadResult:
        """Try the steps under caps, beginning with the batch of index ``first``."""
        alpha, beta = caps.applied(self.alpha, self.beta)
        inner = alpha / self.alpha if self.alpha > 0 else 1.0
        return self.run(inner, beta / self.beta if self.beta > 0 else 1.0, first)

    def judged(self, caps: Caps, scale: Scale, ratio: float) -> tuple[LookaheadResult, Scale, float]:
        """Try the steps; if they do not pass, twice more from other batches on: one odd batch is no divergence.

        Returns:
            The result of the median severity, how its losses are compared (with the loss that training started from,
            or the loss at hand where that is not known), and the severity.
        """
        result = self.under(caps)
        self.begin = result.begin
        scale = scale.completed_by(result.losses)
        found = [result]
        if not passes(scale.severity(result.end, result.begin), ratio) and self.batches > 1:
            found += [self.under(caps, (self.batches * share) // 3) for share in (1, 2)]
        found.sort(key=lambda each: scale.severity(each.end, each.begin))
        median = found[len(found) // 2]
        return median, scale, scale.severity(median.end, median.begin)

    def run(
        self,
        alpha_factor: float = 1.0,
        beta_factor: float = 1.0,
        first: int = 0,
        *,
        steps: int | None = None,
        highest: float = math.inf,
    ) -> LookaheadResult:
        """Try the steps with factors on the inner rates and on the optimizer's; ``steps`` of them, if given.

        Where a ``highest`` loss is given, a loss above it, or one that is not finite, is the last that is tried.
        """
        if self.before_run is not None:
            self.before_run()
        steps = self._steps if steps is None else steps
        live = self._live
        if not self._owned:
            live = dict(zip(self._live, self._optimizers[0].param_groups[0]["params"], strict=True))
        with preserved_randomness(), double_backward():
            seed_generators()  # at every rate, so that results can be compared
            shadow = ShadowOptimizer(self._optimizers, live, beta_factor)
            if self.groups:
                shadow.set_groups(self.groups)
            losses = []
            for step in range(steps):
                value, gradient = self._evaluate(shadow.params, self._objective(first + step), alpha_factor)
                losses.append(value)
                if highest < math.inf and not value <= highest:
                    break
                shadow.step(gradient, self._clip, self._hook)
            else:
                after = self._after or [self._objective(first)]
                losses.append(torch.stack([self._loss(shadow.params, each, alpha_factor) for each in after]).mean())
            return LookaheadResult(tuple(torch.stack(losses).tolist()))

    def untrained(self, alpha_factor: float = 1.0) -> tuple[float, ...]:
        """Evaluate every batch at the parameters as they are, with a factor on the inner rates."""
        with preserved_randomness(), double_backward():
            seed_generators()
            losses = [self._loss(self._live, each, alpha_factor) for each in self._objectives]
        return tuple(torch.stack(losses).tolist())

    def gradient_norms(self) -> tuple[float, ...]:
        """Compute the norm of every batch's gradient at the parameters as they are."""
        space, norms = self._objectives[0].space, []
        with preserved_randomness(), double_backward():
            seed_generators()
            for objective in self._objectives:  # one gradient at a time in memory
                gradient = self._evaluate(self._live, objective, 1.0)[1]
                norms.append(float(space.norm(torch.stack(torch._foreach_norm(list(gradient.values()))))))
        return tuple(norms)

    def _objective(self, index: int) -> Objective:
        return self._objectives[index % self.batches]

    def _loss(self, params: Params, objective: Objective, factor: float) -> Tensor:
        self.gradients += LOSS_COST
        return self._ranks.mean(self._learned.loss(objective, params, factor).detach().float())

    def _evaluate(self, params: Params, objective: Objective, factor: float) -> tuple[Tensor, Params]:
        self.gradients += 1
        value, filled = self._learned.evaluate(objective, params, factor)
        if self._ranks.size == 1:
            return value.detach().float(), unpaired(filled, params)
        layout = Layout(filled)
        mean = layout.split(self._ranks.mean(layout.flatten(filled)))
        return self._ranks.mean(value.float()), unpaired(mean, params)


def lookahead_of(
    problems: Sequence[Problem],
    optimizers: Optimizers,
    steps: int,
    trainer: Any,
    cache: MeasurementCache,
    clipped_to: float = math.nan,
) -> Lookahead:
    """Make the lookahead of a run: its clipping, its way to go over tasks, its processes.

    ``clipped_to`` is the norm to which a training step was seen to clip by itself.
    """
    tasks = cache.map_of(problems[0])
    clip, hook, seen = run_clipping(trainer, clipped_to)
    return Lookahead(problems, optimizers, steps, tasks, clip, cache.ranks, hook=hook, sees_clipping=seen)
