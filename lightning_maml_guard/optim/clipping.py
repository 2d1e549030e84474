"""The norm of a gradient, and gradient clipping as a run does it, on the copies of a lookahead."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_maml_guard.optim.shadow import Clip
from lightning_maml_guard.utils.shards import any_split, norm

_is_sparse, _is_on_cpu = attrgetter("is_sparse"), attrgetter("is_cpu")  # asked of every gradient at every step


def trainer_clipping(trainer: Any) -> Clip | None:
    """Clip as the Trainer's arguments say; None if they say nothing."""
    value = trainer.gradient_clip_val
    if not value:
        return None
    if trainer.gradient_clip_algorithm == "value":
        return lambda parameters: nn.utils.clip_grad_value_(parameters, value)
    return _to_norm(value)


class ModuleClipping:
    """Clips copies by the module's own ``configure_gradient_clipping``, which finds the copies' gradients in its own.

    It is called inside an isolation context. Where it fails on a copy, the Trainer's clipping is done instead, and
    ``failure`` holds why.
    """

    def __init__(self, module: Any, trainer: Any) -> None:
        self._module, self._trainer = module, trainer
        self.failure: Exception | None = None

    def __call__(self, copy: Optimizer, pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
        """Clip the gradients of a copied optimizer; beside each of its parameters is the live one."""
        if self.failure is None:
            try:
                self._by_hook(copy, pairs)
                return
            except Exception as error:  # whatever a hook of the user's does not find on a copy; the guard says so
                self.failure = error
        clip = trainer_clipping(self._trainer)
        if clip is not None:
            clip([replica for replica, _ in pairs])

    def _by_hook(self, copy: Optimizer, pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
        # The hook may go over the optimizer's parameters or over the module's: both find the same gradients.
        before = [(live, live.grad) for _, live in pairs]
        given = [replica.grad for replica, _ in pairs]
        try:
            for (_, live), gradient in zip(pairs, given, strict=True):
                live.grad = gradient
            self._module.configure_gradient_clipping(
                copy,
                gradient_clip_val=self._trainer.gradient_clip_val,
                gradient_clip_algorithm=self._trainer.gradient_clip_algorithm,
            )
            for (replica, live), gradient in zip(pairs, given, strict=True):
                if live.grad is not gradient:
                    replica.grad = live.grad
        finally:
            for live, gradient in before:
                live.grad = gradient


def run_clipping(trainer: Any, clipped_to: float = math.nan) -> tuple[Clip | None, ModuleClipping | None, bool]:
    """Find how a run clips: as the Trainer or ``clipped_to`` says, or by the module's own hook; whether that is all.

    It may not be where a training step takes its own steps: then what it clips is known only by ``clipped_to``, the
    norm to which it was seen to bring a gradient down.
    """
    # Here, so that `LookaheadOptions` can be imported without Lightning.
    from lightning_maml_guard.utils.lightning_compat import overrides

    module = getattr(trainer, "lightning_module", None)
    if module is not None and module.automatic_optimization and overrides(module, "configure_gradient_clipping"):
        return None, ModuleClipping(module, trainer), True
    if not math.isnan(clipped_to):
        return _to_norm(clipped_to), None, True
    return trainer_clipping(trainer), None, module is None or module.automatic_optimization


def _to_norm(norm: float) -> Clip:
    def clip(parameters: list[nn.Parameter]) -> None:
        nn.utils.clip_grad_norm_(parameters, norm)

    return clip


def gradient_norm(optimizer: Optimizer) -> torch.Tensor | float | None:
    """Compute the norm of the gradient an optimizer is about to use: on a CPU a number, None without a gradient."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return None
    if any(map(_is_sparse, gradients)):
        gradients = [each.coalesce().values() if each.is_sparse else each for each in gradients]
    if any_split(gradients):
        return norm(gradients)
    # Equal to get_total_norm here; its sorting by device and type takes 1 % of a small network's step.
    if all(map(_is_on_cpu, gradients)):
        return math.hypot(*[each.item() for each in torch._foreach_norm(gradients)])
    if len({(gradient.device, gradient.dtype) for gradient in gradients}) == 1:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return nn.utils.get_total_norm(gradients)
