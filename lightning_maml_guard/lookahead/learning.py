"""What a run has learned, and whether it lost it: the losses of the same batches at the present and earlier parameters.

On the same batches neither noise nor harder tasks look like lost learning. The losses are those before a step on them,
as a network that has lost everything else still does well on the batches just trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.lookahead.divergence import FIRST_LOSSES, RunningStatistics, Scale
from lightning_maml_guard.lookahead.lookahead import Lookahead
from lightning_maml_guard.lookahead.results import LookaheadResult
from lightning_maml_guard.maml.evaluation import default_loss
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.optim.rollback_state import HoldsTensors
from lightning_maml_guard.optim.snapshot import Snapshot

# Batches to compare on.
PROBES = 4
# A snapshot is as good as the best one if it has lost no more than this share of what was learned.
_NEAR = 0.25
# Less than this share of the loss before training is no learning that could be lost.
_LEARNED = 0.1
_CROSS_ENTROPY = (F.cross_entropy, default_loss)


@dataclass(frozen=True)
class Learning:
    """Losses of some batches at several points of a run.

    Attributes:
        now: At the parameters of now or, where it was higher, before the batch was used; ``inf`` if it is not finite.
        kept: At the snapshots, the oldest first.
        untrained: An upper limit of the loss before training, for which the oldest snapshot's is taken.
        snapshots_before: How many snapshots were made before any of the batches was used.
    """

    now: tuple[float, ...]
    kept: tuple[tuple[float, ...], ...]
    untrained: float
    snapshots_before: int

    @property
    def best_snapshot(self) -> int:
        """Index of the best snapshot, of those made before any of the batches was used."""
        return min(range(max(self.snapshots_before, 1)), key=lambda index: median(self.kept[index]))

    @property
    def _best_losses(self) -> tuple[float, ...]:
        return self.kept[self.best_snapshot]

    @property
    def _untrained_losses(self) -> tuple[float, ...]:
        """Losses of the batches before training."""
        return tuple(min(loss, self.untrained) for loss in self.kept[0])

    @property
    def losses(self) -> tuple[float, float, float]:
        """Medians over the batches: at the best snapshot, now, and before training."""
        return median(self._best_losses), median(self.now), median(self._untrained_losses)

    @property
    def has_lost_half(self) -> bool:
        """Whether most batches have lost half of what was learned on them."""
        both = list(zip(self._untrained_losses, self._best_losses, strict=True))
        learned = median([before - best for before, best in both])
        if not learned > _LEARNED * abs(median(self._untrained_losses)):
            return False
        return median([now - (before + best) / 2 for now, (before, best) in zip(self.now, both, strict=True)]) >= 0

    @property
    def does_as_well(self) -> bool:
        """Whether the parameters of now do as well as the best earlier ones: then the tasks have changed."""
        return self.losses[1] <= self.highest_kept_loss

    @property
    def highest_kept_loss(self) -> float:
        """The largest loss at which nearly all of what was learned is kept."""
        best, _, before = self.losses
        return _nearly_best(best, before)

    @property
    def good_snapshots(self) -> list[int]:
        """Indices of the snapshots that are nearly as good as the best one, the youngest first; of all if none is."""
        best, before = self._best_losses, self._untrained_losses
        near = _NEAR * max(median([b - a for a, b in zip(best, before, strict=True)]), 0.0)
        near = max(near, _LEARNED * abs(median(best)))
        found = [
            index
            for index, losses in enumerate(self.kept)
            if median([loss - a if loss < math.inf else math.inf for loss, a in zip(losses, best, strict=True)]) <= near
        ]
        return (found or list(range(len(self.kept))))[::-1]


def compare_with_snapshots(
    lookahead: Lookahead,
    module: HoldsTensors,
    optimizers: Sequence[Optimizer],
    kept: Sequence[Snapshot],
    untrained: float,
    seen: Sequence[float],
    before: int,
    alpha: float = math.nan,
) -> Learning:
    """Compare the parameters of now with those of snapshots, on the batches of a lookahead.

    Args:
        lookahead: Evaluates the batches.
        module: Holds the parameters.
        optimizers: What moves them.
        kept: The snapshots, the oldest first.
        untrained: An upper limit of the loss before training, for which the oldest snapshot's is taken.
        seen: The losses of the batches before the steps that used them; ``-inf`` where that is not known.
        before: The first step that used one of them.
        alpha: The inner rate applied now; ``nan`` where it is not known. At a snapshot it is the one applied there.

    Returns:
        The losses.
    """
    kept_losses = []
    for snapshot in kept:
        with snapshot.visited(module, optimizers):
            kept_losses.append(finite_or_inf(lookahead.untrained(_inner_factor(snapshot.alpha, lookahead.alpha))))
    found = finite_or_inf(lookahead.untrained(_inner_factor(alpha, lookahead.alpha)))
    now = tuple(max(pair) for pair in zip(seen, found, strict=True))
    return Learning(now, tuple(kept_losses), untrained, sum(each.step <= before for each in kept))


def highest_kept_losses(
    found: Learning,
    lookahead: Lookahead,
    module: HoldsTensors,
    optimizers: Sequence[Optimizer],
    kept: Sequence[Snapshot],
) -> tuple[float, ...]:
    """For each batch of a lookahead, the largest loss at which nearly all of what was learned is kept."""
    losses = []
    for snapshot in (kept[found.best_snapshot], kept[0]):
        with snapshot.visited(module, optimizers):
            losses.append(finite_or_inf(lookahead.untrained(_inner_factor(snapshot.alpha, lookahead.alpha))))
    return tuple(_nearly_best(best, min(before, found.untrained)) for best, before in zip(*losses, strict=True))


def _nearly_best(best: float, before: float) -> float:
    return best + _NEAR * abs(before - best)


def _inner_factor(alpha: float, configured: float) -> float:
    """The applied inner rate over the configured one; 1 where either is not known."""
    return alpha / configured if alpha > 0 and configured > 0 else 1.0


def probe_indices(count: int) -> list[int]:
    """Indices of the batches to compare on, spread evenly over ``count``."""
    return sorted({(index * count) // PROBES for index in range(PROBES)})


def lost_reason(found: Learning, at: int, step: int) -> Reason:
    """Make the reason that a run has lost what it had learned; ``at``: the step of the best snapshot."""
    return Reason(Kind.LEARNING_LOST, losses=found.losses, steps=at, step=step)


def last_loss_reason(loss: float, scale: Scale) -> Reason:
    """Make the reason that the loss of the last step has diverged."""
    kind = Kind.LOSS_DIVERGED if math.isfinite(loss) else Kind.LOSS_NOT_FINITE
    return Reason(kind, losses=(loss, math.nan, scale.start))


def lookahead_reason(result: LookaheadResult, start: float, alpha: float, beta: float) -> Reason:
    """Make the reason that a lookahead diverges at these rates."""
    losses = (result.begin, result.end, start)
    if not math.isfinite(result.begin):
        return Reason(Kind.LOSS_NOT_FINITE, losses=losses)
    return Reason(Kind.LOOKAHEAD_DIVERGES, losses=losses, steps=len(result.losses) - 1, alpha=alpha, beta=beta)


def severity_at_hand(statistics: RunningStatistics) -> float:
    """Severity of the median of the latest losses, compared with the best mean; ``nan`` if there are too few."""
    if len(statistics.recent) < FIRST_LOSSES or not math.isfinite(statistics.best):
        return math.nan
    return statistics.scale.severity(median(statistics.recent), statistics.best)


def chance_loss(module: nn.Module, batch: object) -> float:
    """Loss of a classifier that guesses: ``log n`` where a module trains cross-entropy on ``n`` classes; else ``nan``.

    Modules of which that is known hold the loss as an attribute.
    """
    held = [each for each in (*vars(module).values(), *module.modules()) if callable(each)]
    classifies = [each for each in held if each in _CROSS_ENTROPY or isinstance(each, nn.CrossEntropyLoss)]
    if not classifies:
        return math.nan
    labels = [each for each in tree_leaves(batch) if isinstance(each, Tensor) and each.dtype is torch.int64]
    known = [int(each.max()) for each in labels if each.numel()]
    return math.log(max(known) + 1) if known and max(known) > 0 else math.nan


def finite_or_inf(losses: Sequence[float]) -> tuple[float, ...]:
    """Replace losses that are not finite by infinity, so that they can be compared."""
    return tuple(loss if math.isfinite(loss) else math.inf for loss in losses)
