"""Which rate is to blame, and to what it should be set: rates tried one after another on copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import Lookahead

# Steps that each pair of rates is tried for: rates that survive 10 steps may diverge within 30.
TRIAL_STEPS = 30
# Steps that rates have to last for before they are advised: with a memory, or where both rates are too high, 30 say
# little.
LASTING_STEPS = 100
# The outer rate to set is no lower than the lowest that learns so large a share of what the best one does, which is too
# high for a whole run.
FLAT = 0.7
# And at most this share of the largest that trains: plain SGD's, and that of optimizers with a memory, whose
# instability takes longer to show.
SHARE, SHARE_WITH_MEMORY = 0.5, 0.2
# A pair of lowered rates has to learn this much more than the better one of them alone.
BOTH = 1.25
# And an inner rate whose adaptation is not harmful this much more than a lower outer rate before it is blamed: a few
# batches are learned by heart the sooner the less a network adapts.
ALPHA = 1.1
# Lower rates must end lower by this share of the loss before they are advised to a run that does not diverge.
CLEARLY = 0.1
# Adaptation that takes the loss above this many times the one before it is harmful.
_HARMS = 1.25
ALPHA_LADDER = tuple(2.0**-k for k in range(1, 9))
BETA_LADDER = tuple(2.0**-k for k in range(1, 15))
# Inner rates below the best one that are tried before the ladder ends.
PATIENCE = 2
# Factors on the inner rate and on the outer rate that are tried to see whether lower rates do better.
PROBES, SUSPECT_PROBE = ((1.0, 0.25), (1.0, 1 / 16)), (0.5, 1.0)
# At this share of the outer rate only what is wrong with the parameters or the optimizer's state makes the loss leave.
SURE = 1 / 32


class Factors(NamedTuple):
    """Factors on the inner rates and on the outer rate."""

    alpha: float = 1.0
    beta: float = 1.0


@dataclass(frozen=True)
class Trial:
    """The next steps at some rates.

    Attributes:
        at: Factors on the rates.
        end: Mean loss over the last quarter of the steps; ``inf`` where the loss left.
        learned: By how much ``end`` is below the loss before training.
        gained: By how much it is below the loss that the same inner rates start from: what the outer rate did.
        trains: Whether the loss never left and ended no higher than before training.
        steps: Their number.
    """

    at: Factors
    end: float
    learned: float
    gained: float
    trains: bool
    steps: int = TRIAL_STEPS


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        present: A trial of the rates as they are.
        best: The one of lowered rates that learned most.
        flat: The lowest factor on the outer rate that learns nearly as much; 1 where that rate is not to blame.
        most: The highest one to set for a whole run.
        near: The highest factor on the inner rates that learns nearly as much; where the outer rate is to be lowered,
            too, that adapts nearly as well.
    """

    present: Trial
    best: Trial
    flat: float = 1.0
    most: float = 1.0
    near: float = 1.0


class RateSearch:
    """Tries rates on copies, each pair once.

    Args:
        lookahead: Tries steps.
        scale: How losses are compared.
        ratio: Factor on the loss before training at which a trial ends.
        alpha_suspect: Whether the inner rate may be to blame.
        peak: Factor on the scheduled outer rate that stands for 1 here: where the schedule goes.
        steps: Steps of a trial.
    """

    def __init__(
        self,
        lookahead: Lookahead,
        scale: Scale,
        ratio: float,
        *,
        alpha_suspect: bool,
        peak: float = 1.0,
        steps: int = TRIAL_STEPS,
    ) -> None:
        self.lookahead, self._scale, self._ratio, self._peak, self.steps = lookahead, scale, ratio, peak, steps
        self._alpha_suspect, self._has_alpha = alpha_suspect, not math.isnan(lookahead.alpha)
        self._known: dict[tuple[Factors, int], Trial] = {}
        self._untrained: dict[float, tuple[float, ...]] = {}

    def untrained(self, alpha: float) -> tuple[float, ...]:
        """The losses of the batches before training, at a factor on the inner rates."""
        if alpha not in self._untrained:
            self._untrained[alpha] = self.lookahead.untrained(alpha)
        return self._untrained[alpha]

    def harms(self, alpha: float) -> bool:
        """Whether adaptation at a factor on the inner rates makes the batches clearly worse than none."""
        return not _mean(self.untrained(alpha)) <= self._scale.times(_HARMS, _mean(self.untrained(0.0)))

    @property
    def reference(self) -> tuple[float, ...]:
        """The losses of the batches before training, with adaptation or, where that may be harmful, without."""
        adapted = self.untrained(1.0)
        if self._has_alpha and (self._alpha_suspect or not math.isfinite(_mean(adapted))):
            return min(adapted, self.untrained(0.0), key=_mean)
        return adapted

    def at(self, alpha: float = 1.0, beta: float = 1.0, steps: int | None = None) -> Trial:
        """Try factors on the rates, for another number of steps if one is given."""
        key = Factors(alpha, beta), steps or self.steps
        if key not in self._known:
            self._known[key] = self._tried(*key)
        return self._known[key]

    def _tried(self, at: Factors, steps: int) -> Trial:
        start, untrained = self.reference, self.untrained(at.alpha)
        # A loss may begin high, where the inner rate is to blame, but may not rise.
        highest = self._scale.times(self._ratio, max(*start, *untrained))
        if not math.isfinite(highest):
            return Trial(at, math.inf, -math.inf, -math.inf, trains=False, steps=steps)
        losses = self.lookahead.run(at.alpha, at.beta * self._peak, steps=steps, highest=highest).losses
        if not all(loss <= highest for loss in losses):
            return Trial(at, math.inf, -math.inf, -math.inf, trains=False, steps=steps)
        end, before, own = (self._at_end(each, steps) for each in (losses[:steps], start, untrained))
        return Trial(at, end, before - end, own - end, trains=end <= before, steps=steps)

    def probe(self) -> tuple[Trial, Trial]:
        """Try the rates as they are and a few lower ones: the former, and the one of all that learns most.

        Where a run trains at a lower rate and learns less than at its own, it is not tried at still lower ones.
        """
        tried = [self.at(), *([self.at(*SUSPECT_PROBE)] if self._has_alpha and self._alpha_suspect else [])]
        for factors in PROBES:
            tried.append(self.at(*factors))
            if tried[-1].trains and tried[-1].learned < tried[0].learned:
                break
        return tried[0], _best(tried)

    @property
    def survives(self) -> bool:
        """Whether the loss does not leave at a very low outer rate; else this is no place to try rates from."""
        return math.isfinite(self.at(beta=SURE).end)

    def begins_below(self, loss: float) -> bool:
        """Whether a few steps at a far lower outer rate end below a loss; else a run may only begin slowly."""
        return self.at(*PROBES[-1], steps=TRIAL_STEPS).end < loss

    def spread(self) -> Trial:
        """Try rates far below those at hand, one lowered at a time; the one that ends lowest."""
        alphas = [self.at(factor) for _, factor in PROBES] if self._has_alpha else []
        return min([*(self.at(*factors) for factors in PROBES), *alphas], key=lambda each: each.end)

    def comes_back(self, kept: Sequence[float], clearly: float) -> bool:
        """Whether the rates as they are lead the batches down to losses, and no lower ones learn clearly more."""
        present, best = self.probe()
        lost = present.end > self._at_end(kept, self.steps)
        return present.trains and not lost and best.learned <= present.learned + clearly

    def _at_end(self, losses: Sequence[float], steps: int) -> float:
        """Mean loss over the last quarter of the steps, each on its batch."""
        return _mean([losses[step % len(losses)] for step in range(steps)[-max(steps // 4, 1) :]])

    def find(self, outweighs: float = 1.0) -> Found:
        """Find which rate to lower, and to what; a lower outer rate is blamed if it learns so many times as much.

        Lowering the right rate alone lets the run learn; lowering the other one alone does not, or learns less. The
        suspect's ladder is gone down rung by rung, the other one's in long strides, to compare.
        """
        if not self._has_alpha:
            return self._found_beta(self._betas())
        if self._alpha_suspect:
            alphas, betas = self._alphas(), self._betas(strides=3)
            if _best(betas).learned > _best(alphas).learned:
                betas = self._betas()
        else:
            betas, alphas = self._betas(), [self.at(factor, 1.0) for factor in (0.5, 0.125)]
            if _best(alphas).learned > ALPHA * _best(betas).learned:
                alphas = self._alphas()
        if _mean(self.untrained(1.0)) < _mean(self.untrained(0.5)) < _mean(self.untrained(0.0)):
            outweighs = 1.0  # an inner loop that diverges does not help the more the higher its rate
        best, factor = _best(alphas), (1.0 if self._alpha_suspect else ALPHA) / outweighs
        # Below an inner rate that is too high lower ones do not diverge; where they do, one has survived by chance.
        lower_diverge = not all(math.isfinite(each.end) for each in alphas[alphas.index(best) :])
        by_chance = lower_diverge and factor > 0 and _best(betas).trains
        if best.trains and not by_chance and best.learned > factor * max(_best(betas).learned, 0.0):
            return self._found_alpha(alphas)
        betas = self._betas()
        if self._alpha_suspect:
            adapted = {factor: _mean(self.untrained(factor)) for factor in ALPHA_LADDER}
            lowest = min(adapted, key=adapted.__getitem__)
            both = self._betas(lowest)
            blamed = not math.isfinite(outweighs) or not _best(betas).trains
            if blamed or _best(both).learned > BOTH * max(_best(betas).learned, 0.0):
                nearly = adapted[lowest] + self.clearly()
                near = next((factor for factor, loss in adapted.items() if loss <= nearly), lowest)
                return replace(self._found_beta(both), near=near)
        return self._found_beta(betas)

    def find_alpha(self) -> Found:
        """Find the inner rate to set where the outer rate is to be left alone."""
        return self._found_alpha(self._alphas())

    def find_beta(self, alpha: float) -> Found:
        """Find the outer rate to set at a factor on the inner rates."""
        return self._found_beta(self._betas(alpha))

    def _betas(self, alpha: float = 1.0, strides: int = 1) -> list[Trial]:
        """Try lower and lower outer rates until one learns much less than the best one."""
        found: list[Trial] = []
        for factor in BETA_LADDER[strides - 1 :: strides]:
            found.append(self.at(alpha, factor))
            best, lower = _best(found), [Factors(alpha, below) for below in BETA_LADDER if below < factor]
            falls = best.trains and found[-1].trains and found[-1].gained < FLAT * best.gained
            if falls and not self._known_below(best, lower):
                break
        return found

    def _alphas(self) -> list[Trial]:
        """Try lower and lower inner rates until several in a row learn less than the best one."""
        found: list[Trial] = []
        for factor in ALPHA_LADDER:
            found.append(self.at(factor, 1.0))
            best, lower = _best(found), [Factors(below, 1.0) for below in ALPHA_LADDER if below < factor]
            falls = best.trains and len(found) - found.index(best) > PATIENCE
            if falls and not self._known_below(best, lower):
                break
        return found

    def _known_below(self, best: Trial, lower: Sequence[Factors]) -> bool:
        """Whether lower rates are known to learn more than the best ones of a ladder: one that kills is not its end."""
        known = [self._known[at, self.steps] for at in lower if (at, self.steps) in self._known]
        return any(each.learned > best.learned for each in known)

    def _found_alpha(self, ladder: Sequence[Trial]) -> Found:
        best = _best(ladder)
        nearly = min(FLAT * best.learned, best.learned - self.clearly())
        near = next((each for each in ladder if each.trains and each.learned >= nearly), best)
        return Found(self.at(), best, near=near.at.alpha)

    def _found_beta(self, ladder: Sequence[Trial]) -> Found:
        best = _best(ladder)
        largest = next((each for each, below in pairwise(ladder) if each.trains and below.trains), best)
        flat = [each for each in ladder if each.gained >= FLAT * best.gained]
        return Found(self.at(), best, flat[-1].at.beta if flat else best.at.beta, self.share * largest.at.beta)

    def clearly(self, share: float = CLEARLY) -> float:
        """A share of the loss before training, which may be far from the one that the run started from."""
        before = _mean(self.reference)
        return self._scale.times(1 + share, before) - before

    @property
    def share(self) -> float:
        """The share to set of the largest outer rate that trains."""
        return SHARE_WITH_MEMORY if self.lookahead.has_memory else SHARE


def _mean(losses: Sequence[float]) -> float:
    """Mean of losses; infinite where one is not finite."""
    return sum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf


def _best(ladder: Sequence[Trial]) -> Trial:
    return max(ladder, key=lambda each: each.learned)
