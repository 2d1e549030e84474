"""Batches unlike the others: at the same parameters their loss is far above theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.learning import finite_or_inf
from lightning_maml_guard.lookahead.lookahead import Lookahead
from lightning_maml_guard.messages.advice import Advice, Cause, settable
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.stability.problems import Problem

# A batch is odd if its loss is this many times the median of the batches; of this many or fewer, none is called odd.
_ODD_FROM, _MOST_WITHOUT = 5.0, 3


def without_odd(
    problems: Sequence[Problem], lookahead: Lookahead, scale: Scale, alpha: float = 1.0
) -> tuple[list[Problem], int | None]:
    """Leave out the batches that are unlike the others at a factor on the inner rates.

    Returns the problems that stay, and the index of the most unlike one left out. The lookahead is of these problems.
    """
    if len(problems) <= _MOST_WITHOUT:
        return list(problems), None
    losses = finite_or_inf(lookahead.untrained(alpha))
    usual, worst = scale.times(_ODD_FROM, median(losses)), max(range(len(losses)), key=losses.__getitem__)
    if losses[worst] <= usual:
        return list(problems), None
    return [each for each, loss in zip(problems, losses, strict=True) if loss <= usual], worst


def clip_advice(lookahead: Lookahead, at: int, step: int, scale: Scale, alpha: float, beta: float) -> Advice:
    """Advise to clip the gradient of an odd batch, the first of a lookahead, which was that of step ``at``.

    The norm is twice the median norm of the others' gradients; None if the odd one's is not finite: clipping cannot
    help. ``alpha`` and ``beta`` are the configured rates.
    """
    (odd, *usual), (norm, *norms) = lookahead.untrained(), lookahead.gradient_norms()
    return Advice(
        cause=Cause.BATCH,
        gradient_clip_val=settable(2 * median(norms)) if math.isfinite(norm) else None,
        step=step,
        evidence=(Reason(Kind.ODD_BATCH, losses=(odd, median(usual), scale.start), step=at),),
        configured_alpha=alpha,
        configured_beta=beta,
    )
