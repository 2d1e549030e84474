"""The inner learning rates: which parameters the inner loop moves, at what rate, and the guard's cap on it.

Rates may differ between the inner steps, as in MAML++ (Antoniou et al. 2019). ``inner_lr`` then is a tensor of shape
``(K,)``, or has one of shape ``(K, ...)`` per parameter; the inner loop takes a tuple of one rate per step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_maml_guard.linalg.layout import rows_of
from lightning_maml_guard.maml.inner_loop import InnerRate, Params
from lightning_maml_guard.theory.multiplier import check_rate
from lightning_maml_guard.utils.checks import check_holds_rate, shown


class InnerRates:
    """The inner rates of a network: ``alpha`` (of each step) for all or some parameters, or learned ones.

    ``learn``: False, True for one learned rate per entry (Meta-SGD), or ``"per_step"`` for one per parameter and step.
    """

    def __init__(
        self,
        parameters: Params,
        alpha: float | list[float],
        patterns: str | Sequence[str] | None = None,
        learn: bool | str = False,
        inner_steps: int = 1,
    ) -> None:
        self.names = select(parameters, patterns)
        largest = max(alpha) if isinstance(alpha, list) else alpha
        check_holds_rate("inner_lr", largest, (parameters[name] for name in self.names))
        self.partial = patterns is not None and len(self.names) < len(parameters)
        self.learned: nn.ParameterList | None = None
        self._one_per_step = learn == "per_step"
        if learn:
            each = alpha if isinstance(alpha, list) else [alpha] * inner_steps
            start = [_at_start(parameters[name], alpha, each, learn) for name in self.names]
            self.learned = nn.ParameterList([nn.Parameter(value) for value in start])

    def applied(self, theta: Params, alpha: float | list[float], cap: float | None) -> float | Tensor | Params:
        """Return the rates the inner loop uses, as ``MetaProblem`` takes them, under the cap."""
        if self.learned is not None:
            factor = self._factor(cap)
            rates = zip(self.names, self.learned, strict=True)
            scaled = {name: rate if factor == 1 else rate * factor for name, rate in rates if name in theta}
            return {n: _wide(r, theta[n]) for n, r in scaled.items()} if self._one_per_step else scaled
        if isinstance(alpha, list):
            highest = max(alpha)
            each = torch.tensor(alpha, dtype=torch.float64) * (1.0 if cap is None or highest <= cap else cap / highest)
            named = {n: _wide(each.to(theta[n]), theta[n]) for n in self.names if n in theta}
            return named if self.partial else each.to(next(iter(theta.values())))
        alpha = alpha if cap is None else min(alpha, cap)
        if self.partial:
            return {name: theta[name].new_tensor(alpha) for name in self.names if name in theta}
        return alpha

    def with_gradients(self, gradients: Params | tuple[Params, ...], cap: float | None) -> list[tuple[Tensor, Tensor]]:
        """Pair each learned rate with its gradient, given the gradients towards the rates as applied."""
        if self.learned is None:
            return []
        factor = self._factor(cap)
        pairs = zip(self.names, self.learned, strict=True)
        if isinstance(gradients, tuple):  # of each step
            gradients = {name: torch.stack([each[name] for each in gradients]) for name in gradients[0]}
            # A rate of a whole parameter moves all of its entries.
            gradients = {
                name: rows_of(gradients[name]).sum(1) if self._one_per_step else gradients[name]
                for name, rate in zip(self.names, self.learned, strict=True)
                if name in gradients
            }
        return [(rate, factor * gradients[name]) for name, rate in pairs if name in gradients]

    def _factor(self, cap: float | None) -> float:
        # One factor for all rates, which brings the largest one down to the cap.
        if cap is None or self.learned is None:
            return 1.0
        highest = max(float(rate.detach().max()) for rate in self.learned)
        return min(1.0, cap / highest) if highest > 0 else 1.0


def _at_start(parameter: Tensor, alpha: float | list[float], each: list[float], learn: bool | str) -> Tensor:
    if learn == "per_step":
        return parameter.detach().new_tensor(each)
    if isinstance(alpha, list):
        return torch.stack([torch.full_like(parameter, rate) for rate in each])
    return torch.full_like(parameter, alpha)


def _wide(rates: Tensor, parameter: Tensor) -> Tensor:
    """Give one rate per step its parameter's dimensions, so that it cannot be taken for one per entry."""
    return rates.view(-1, *[1] * parameter.dim())


def checked_rate(inner_lr: Any, inner_steps: int, learn: Any) -> float | list[float]:
    """Return the module's ``inner_lr`` as plain numbers, which a checkpoint can hold: one, or one for each step."""
    if not isinstance(learn, bool) and not (isinstance(learn, str) and learn == "per_step"):
        raise ValueError(
            "Expected argument `learn_inner_lr` to be True or False (one learned rate per entry, Meta-SGD) or "
            f"'per_step' (one per parameter and inner step, MAML++) but got {shown(learn)}. Pass the boolean itself: "
            "learn_inner_lr=True or learn_inner_lr=False."
        )
    values = inner_lr.tolist() if isinstance(inner_lr, (Tensor, np.ndarray)) and inner_lr.ndim == 1 else inner_lr
    if not isinstance(values, (list, tuple)) or inner_steps == 1:
        check_rate(inner_lr, "inner_lr")
        return float(inner_lr)
    for index, rate in enumerate(values):
        check_rate(rate, f"inner_lr[{index}]")
    if len(values) != inner_steps:
        raise ValueError(
            f"Expected argument `inner_lr` to be one rate, or one for each of the {inner_steps} inner steps, but got "
            f"{len(values)}. Give as many rates as `inner_steps`."
        )
    return [float(rate) for rate in values]


def is_per_step(inner_lr: Any, params: Params, inner_steps: int) -> bool:
    """Return True if the rates differ between the steps; raise if they are not rates of these parameters."""
    if not isinstance(inner_lr, dict):
        return _is_step_tensor(inner_lr, params, inner_steps)
    unknown = sorted(set(inner_lr) - set(params), key=str)
    if unknown:
        raise ValueError(
            f"Argument `inner_lr` names {unknown}, which are not among the parameters {sorted(params)}. Name the "
            "parameters as `params` does."
        )
    for name, rate in inner_lr.items():
        if not isinstance(rate, Tensor):
            raise TypeError(
                f"Expected argument `inner_lr[{name!r}]` to be a tensor but got {shown(rate)}. Pass "
                "torch.tensor(0.01), or one number as `inner_lr` for all parameters."
            )
        _check_kind(f"inner_lr[{name!r}]", rate, params[name])
    uneven = [name for name, rate in inner_lr.items() if not _fits(rate.shape, params[name].shape)]
    if not uneven:
        _check_clear(inner_lr, params, inner_steps)
        return False
    for name in uneven:
        rate, value = inner_lr[name], params[name]
        if not _fits_steps(rate, value, inner_steps):
            raise ValueError(
                f"Expected argument `inner_lr[{name!r}]` to be a scalar or of its parameter's shape "
                f"{tuple(value.shape)}, or to have a leading dimension of the {inner_steps} inner steps, but got "
                f"{tuple(rate.shape)}. Pass one rate per entry, or one for all, or such rates for each step."
            )
    return True


def _is_step_tensor(inner_lr: Any, params: Params, inner_steps: int) -> bool:
    if not isinstance(inner_lr, Tensor):
        check_rate(inner_lr, "inner_lr")
        return False
    _check_kind("inner_lr", inner_lr, next(iter(params.values())))
    if inner_lr.shape != (inner_steps,) or not bool((torch.isfinite(inner_lr) & (inner_lr >= 0)).all()):
        raise ValueError(
            f"Expected argument `inner_lr` to be a number, a tensor of {inner_steps} finite rates of at least 0 (one "
            f"for each inner step) or a dict of tensors but got {shown(inner_lr)}. float(x) makes a number of a tensor."
        )
    return True


def _check_kind(name: str, rate: Tensor, value: Tensor) -> None:
    if not rate.is_floating_point() or rate.device != value.device:
        raise ValueError(
            f"Expected argument `{name}` to be a floating-point tensor on {value.device}, as its "
            f"parameter, but got {rate.dtype} on {rate.device}. Convert it: rate.to(parameter)."
        )


def _fits(rate: torch.Size, value: torch.Size) -> bool:
    """Whether a rate is a scalar or broadcasts to its parameter's shape."""
    ends = rate[::-1], value[::-1]
    return len(rate) <= len(value) and all(own in {1, size} for own, size in zip(*ends, strict=False))


def _fits_steps(rate: Tensor, value: Tensor, inner_steps: int) -> bool:
    whole = rate.dim() == 1 or (rate.dim() == value.dim() + 1 and _fits(rate.shape[1:], value.shape))
    return rate.dim() > 0 and rate.shape[0] == inner_steps and whole


def _check_clear(rates: Params, params: Params, inner_steps: int) -> None:
    # Rates of shape (K,) where every parameter's last dimension happens to be K as well.
    steps = inner_steps > 1 and all(rate.shape == (inner_steps,) for rate in rates.values())
    if steps and rates and any(params[name].shape != rate.shape for name, rate in rates.items()):
        raise ValueError(
            f"Argument `inner_lr` can be read in two ways: its tensors of shape ({inner_steps},) may be one rate for "
            "each inner step, or one for each entry of the parameters' last dimension. Give one rate per step its "
            "parameter's dimensions too, rate.view(-1, *[1] * parameter.dim()), or one rate per entry its whole shape, "
            "rate.expand(parameter.shape)."
        )


def by_step(inner_lr: Any, params: Params, inner_steps: int) -> InnerRate:
    """Return rates that differ between the steps as the inner loop takes them: a tuple of one rate per step."""
    if isinstance(inner_lr, Tensor):
        return tuple(inner_lr.to(next(iter(params.values())).dtype).unbind())

    def of_step(name: str, step: int) -> Tensor:
        rate, value = inner_lr[name], params[name]
        return rate[step] if _fits_steps(rate, value, inner_steps) else rate

    return tuple({name: of_step(name, step) for name in inner_lr} for step in range(inner_steps))


def select(names: Iterable[str], patterns: str | Sequence[str] | None) -> list[str]:
    """Select by name (``"head.weight"``), shell pattern (``"*.bias"``) or module prefix (``"head"``); None: all."""
    names = list(names)
    if patterns is None:
        return names
    wanted = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(wanted, Sequence) or not all(isinstance(pattern, str) for pattern in wanted):
        raise TypeError(
            f"Expected argument `adapt` to be a name or a list of names but got {shown(patterns)}. Pass parameter "
            "names, shell patterns or module prefixes, or None for all."
        )
    if not wanted:
        raise ValueError(
            "Argument `adapt` is empty: the inner loop would move nothing. Name a parameter, or pass None for all."
        )
    chosen: set[str] = set()
    for pattern in wanted:
        hits = {name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")}
        if not hits:
            raise ValueError(
                f"Argument `adapt` holds {pattern!r}, which matches no trainable parameter. There are: {names}. Pass "
                "one of these, a shell pattern or a prefix of them."
            )
        chosen |= hits
    return [name for name in names if name in chosen]
