"""Rates at which a run failed: they are tried again only after a while, which doubles with each failure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_maml_guard.lookahead.lookahead import Caps

# Rates above this share of those that failed count as the same.
_NEAR = 0.7
# Steps before they are tried again, the first time.
_WAIT = 32


@dataclass(frozen=True)
class Ceiling:
    """The rates that failed last.

    Attributes:
        alpha: The inner rate; ``inf`` before anything failed, ``nan`` without an inner loop.
        beta: The meta rate.
        until: Step from which they may be tried again.
        wait: Steps that the next failure adds.
    """

    alpha: float = math.inf
    beta: float = math.inf
    until: int = 0
    wait: int = _WAIT

    def failed(self, alpha: float, beta: float, step: int) -> Ceiling:
        """Take a failure in."""
        return Ceiling(alpha, beta, step + self.wait, 2 * self.wait)

    def allows(self, caps: Caps, alpha: float, beta: float, step: int) -> bool:
        """Whether caps on these configured rates may be tried at a step."""
        inner, outer = caps.applied(alpha, beta)
        return step >= self.until or inner < _NEAR * self.alpha or outer < _NEAR * self.beta
