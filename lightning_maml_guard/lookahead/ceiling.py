"""Rates at which a run failed, and the advised one: higher rates are tried again only after some steps.

Their number doubles with each failure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_maml_guard.lookahead.lookahead import Caps

# A rate above this share of one that failed counts as that one.
_NEAR = 0.7
# A rate up to this many times the advised one counts as that one.
_ABOVE = 1.05
# Steps before rates that failed are tried again, the first time.
_WAIT = 32


@dataclass(frozen=True)
class Ceiling:
    """The rates that failed last.

    Attributes:
        alpha: The inner rate; ``inf`` before anything failed, ``nan`` without an inner loop.
        beta: The outer rate.
        until: Step from which they may be tried again.
        wait: Steps that the next failure adds.
        advised: The outer rate that is advised; ``inf`` where none is. A higher one has to take the loss further down.
    """

    alpha: float = math.inf
    beta: float = math.inf
    until: int = 0
    wait: int = _WAIT
    advised: float = math.inf

    def with_failure(self, alpha: float, beta: float, step: int) -> Ceiling:
        """Take a failure in."""
        return replace(self, alpha=alpha, beta=beta, until=step + self.wait, wait=2 * self.wait)

    def with_advised(self, beta: float, step: int) -> Ceiling:
        """Take in the outer rate that is advised at a step."""
        return replace(self, advised=beta, until=max(self.until, step + _WAIT))

    def allows(self, caps: Caps, alpha: float, beta: float, step: int, *, learned: bool = True) -> bool:
        """Whether caps on these configured rates may be tried at a step, by a run that has learned or not.

        Where nothing was learned, nothing tells that a rate above the advised one has killed a run.
        """
        inner, outer = caps.applied(alpha, beta)
        near = not (inner < _NEAR * self.alpha or outer < _NEAR * self.beta)
        above = outer > _ABOVE * self.advised
        return (step >= self.until and (learned or not above)) or not (near or above)
