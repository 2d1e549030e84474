"""The inner learning rates: which parameters the inner loop moves, at what rate, and the guard's cap on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_maml_guard.maml.inner_loop import Params
from lightning_maml_guard.utils.checks import check_holds_rate, shown


class InnerRates:
    """The inner rates of a network: one ``alpha`` for all or some parameters, or one learned rate per entry."""

    def __init__(
        self, parameters: Params, alpha: float, patterns: str | Sequence[str] | None = None, learn: bool = False
    ) -> None:
        self.names = select(parameters, patterns)
        check_holds_rate("inner_lr", alpha, (parameters[name] for name in self.names))
        self.partial = patterns is not None and len(self.names) < len(parameters)
        self.learned: nn.ParameterList | None = None
        if learn:
            self.learned = nn.ParameterList(
                [nn.Parameter(torch.full_like(parameters[name], alpha)) for name in self.names]
            )

    def applied(self, theta: Params, alpha: float, cap: float | None) -> float | Params:
        """Return the rates the inner loop uses: ``alpha``, or one tensor per adapted parameter of ``theta``."""
        if self.learned is not None:
            factor = self._factor(cap)
            return {name: rate * factor for name, rate in zip(self.names, self.learned, strict=True) if name in theta}
        alpha = alpha if cap is None else min(alpha, cap)
        if self.partial:
            return {name: theta[name].new_tensor(alpha) for name in self.names if name in theta}
        return alpha

    def with_gradients(self, gradients: Params, cap: float | None) -> list[tuple[Tensor, Tensor]]:
        """Pair each learned rate with its gradient, given the gradients towards the rates as applied."""
        if self.learned is None:
            return []
        factor = self._factor(cap)
        pairs = zip(self.names, self.learned, strict=True)
        return [(rate, factor * gradients[name]) for name, rate in pairs if name in gradients]

    def _factor(self, cap: float | None) -> float:
        # One factor for all rates, which brings the largest one down to the cap.
        if cap is None or self.learned is None:
            return 1.0
        highest = max(float(rate.detach().max()) for rate in self.learned)
        return min(1.0, cap / highest) if highest > 0 else 1.0


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
