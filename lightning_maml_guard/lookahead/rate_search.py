"""Which rate is to blame, and to what it should be set: rates tried one after another on copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from itertools import pairwise

from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import Lookahead
from lightning_maml_guard.lookahead.new_tasks import NewTasks
from lightning_maml_guard.lookahead.results import (
    TRIAL_STEPS,
    Factors,
    SearchResult,
    Trial,
    best_of,
    mean_at_end,
    mean_of,
)

# Steps that rates have to survive before they are advised: 30 say little for optimizers with momentum, or where both
# rates are too high.
LASTING_STEPS = 100
# Lower bound of the outer rate to set: the lowest one that learns this share of what the best one does, and ends at no
# more than so many times its loss or such a share of that before. The best one itself is too high for a whole run.
NEARLY_AS_MUCH, NEARLY_AS_LOW, LOW = 0.7, 4.0, 0.08
# Upper bound of the outer rate to set, as a share of the largest that trains: for plain SGD, and for optimizers with
# momentum, whose instability takes longer to show.
SHARE, SHARE_WITH_MEMORY = 0.5, 0.2
# Both rates are lowered only if that learns this many times as much as the better one alone.
BOTH = 1.25
# An inner rate whose adaptation is not harmful is blamed only if lowering it learns this many times as much as lowering
# the outer rate: a network memorises a few batches the sooner the less it adapts.
ALPHA = 1.1
# Lower rates must end lower by this share of the loss before they are advised to a run that does not diverge.
CLEAR_SHARE = 0.1
NO_LOSS = 0.01  # share of what was learned that is next to no loss
_HARMS = 1.25  # adaptation that takes the loss above this many times the one before it is harmful
# Factors on the rates, from high to low.
ALPHA_LADDER = tuple(2.0**-k for k in range(1, 9))
BETA_LADDER = tuple(2.0**-k for k in range(1, 15))
PATIENCE = 2  # inner rates below the best one that are tried before the search stops
# Factors on both rates with which `probe` sees whether lower rates do better.
BETA_PROBES, ALPHA_PROBE = ((1.0, 0.25), (1.0, 1 / 16)), (0.5, 1.0)
# At this factor on the outer rate a loss that still diverges is the fault of the parameters or the optimizer's state.
FAR_LOWER_BETA = 1 / 32


class RateSearch:
    """Tries pairs of rates on copies, each pair once. "Learned" is measured from the loss before training.

    Args:
        lookahead: Takes steps on copies.
        scale: How losses are compared.
        ratio: Factor on the loss before training at which a trial counts as diverged and ends.
        alpha_suspect: Whether the inner rate may be to blame.
        peak: Peak of the schedule over the outer rate at hand; factors on the outer rate are relative to the peak.
        steps: Steps of a trial.
        new_tasks: Judges inner rates by other tasks than those they are tried on; None: by those.
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
        new_tasks: NewTasks | None = None,
    ) -> None:
        self.lookahead, self._scale, self._ratio, self._peak, self.steps = lookahead, scale, ratio, peak, steps
        self._new_tasks = new_tasks
        self.share_of_largest = SHARE_WITH_MEMORY if lookahead.has_memory else SHARE
        self._alpha_suspect, self._has_alpha = alpha_suspect, not math.isnan(lookahead.alpha)
        self._trials: dict[tuple[Factors, int], Trial] = {}
        # Shared with the searches that `like_this` makes.
        self._initial_losses: dict[float, tuple[float, ...]] = {}
        self._runs: dict[tuple[Factors, int], tuple[float, ...]] = {}

    def like_this(self, alpha_suspect: bool, steps: int) -> RateSearch:
        """Make a search from the same state on the same batches: what one of them has run, none runs again."""
        other = copy(self)
        other._alpha_suspect, other.steps, other._trials = alpha_suspect, steps, {}
        return other

    def initial_losses(self, alpha: float) -> tuple[float, ...]:
        """Losses of the batches before the first step, at a factor on the inner rates."""
        if alpha not in self._initial_losses:
            self._initial_losses[alpha] = self.lookahead.untrained(alpha)
        return self._initial_losses[alpha]

    def harms(self, alpha: float) -> bool:
        """Whether adaptation at a factor on the inner rates makes the loss clearly worse than no adaptation."""
        return not mean_of(self.initial_losses(alpha)) <= self._scale.times(_HARMS, mean_of(self.initial_losses(0.0)))

    @property
    def reference(self) -> tuple[float, ...]:
        """Losses of the batches before training, with adaptation or, if adaptation may be harmful, without."""
        adapted = self.initial_losses(1.0)
        if self._has_alpha and (self._alpha_suspect or not math.isfinite(mean_of(adapted))):
            return min(adapted, self.initial_losses(0.0), key=mean_of)
        return adapted

    def trial(self, alpha: float = 1.0, beta: float = 1.0, steps: int | None = None) -> Trial:
        """Try factors on the rates, for another number of steps if one is given."""
        key = Factors(alpha, beta), steps or self.steps
        if key not in self._trials:
            self._trials[key] = self._tried(*key)
        return self._trials[key]

    def _tried(self, factors: Factors, steps: int) -> Trial:
        start, initial = self.reference, self.initial_losses(factors.alpha)
        # A loss may begin high if the inner rate is to blame, but it may not rise.
        highest = self._scale.times(self._ratio, max(*start, *initial))
        if not math.isfinite(highest):
            return Trial(factors, math.inf, -math.inf, -math.inf, trains=False, steps=steps)
        losses = self._runs.get((factors, steps), ())
        if len(losses) <= steps and all(loss <= highest for loss in losses):  # none yet, or they ended below this bound
            losses = self.lookahead.run(factors.alpha, factors.beta * self._peak, steps=steps, highest=highest).losses
            self._runs[factors, steps] = losses
        if not all(loss <= highest for loss in losses):
            return Trial(factors, math.inf, -math.inf, -math.inf, trains=False, steps=steps)
        end, before, initial_loss = (mean_at_end(each, steps) for each in (losses[:steps], start, initial))
        return Trial(factors, end, before - end, initial_loss - end, trains=end <= before, steps=steps)

    def probe(self) -> tuple[Trial, Trial]:
        """Try the rates as they are and a few lower ones; return the trial of the former and the best of all.

        If the run trains at a lower rate but learns less, still lower ones are not tried. A lower inner rate counts if
        it learns clearly more on new tasks, too.
        """
        tried = [self.trial()]
        if self._has_alpha and self._alpha_suspect and self._half_alpha_learns_more():
            tried.append(self.trial(*ALPHA_PROBE))
        for factors in BETA_PROBES:
            tried.append(self.trial(*factors))
            if tried[-1].trains and tried[-1].learned < tried[0].learned:
                break
        return tried[0], best_of(tried)

    def _half_alpha_learns_more(self) -> bool:
        """Whether half the inner rates learn more than the present ones, and clearly more on new tasks."""
        half, present = Factors(*ALPHA_PROBE), self.trial()
        begins_lower = mean_of(self.initial_losses(half.alpha)) < mean_of(self.initial_losses(1.0))
        if begins_lower and not self._more_anew([half], present, share=CLEAR_SHARE):
            return False  # without a trial on its own tasks, where it is likely to end lower, too
        return self.trial(*half).learned > present.learned and self._more_anew([half], present, share=CLEAR_SHARE)

    @property
    def far_below(self) -> Trial:
        """Try a far lower outer rate: where even that does not train, rates cannot be compared."""
        return self.trial(beta=FAR_LOWER_BETA)

    def is_soon_below(self, loss: float) -> bool:
        """Whether a trial at a far lower outer rate ends below a loss; if not, the run may just begin slowly."""
        return self.trial(*BETA_PROBES[-1], steps=TRIAL_STEPS).end < loss

    def lowest_far_below(self) -> Trial:
        """Try each rate alone far below its present value; return the trial that ends lowest."""
        alphas = [self.trial(factor) for _, factor in BETA_PROBES] if self._has_alpha else []
        return min([*(self.trial(*factors) for factors in BETA_PROBES), *alphas], key=lambda each: each.end)

    def find(self, beta_handicap: float = 1.0) -> SearchResult:
        """Find which rate to lower, and to what.

        Each rate is lowered alone, the suspect in factors of two and the other one in large strides. The one whose
        lowering learns more is to blame; the outer one has to learn ``beta_handicap`` times as much.
        """
        if not self._has_alpha:
            return self._beta_result(self._lower_betas())
        if mean_of(self.initial_losses(1.0)) < mean_of(self.initial_losses(0.5)) < mean_of(self.initial_losses(0.0)):
            beta_handicap = 1.0  # adaptation helps, the more the higher the inner rate: it does not diverge
        if self._alpha_suspect:
            betas = self._lower_betas(stride=3)
            alphas = self._lower_alphas([self.trial(), *betas], 1 / beta_handicap)
            if best_of(betas).learned > best_of(alphas).learned:
                betas = self._lower_betas()
        else:
            betas, alphas = self._lower_betas(), [self.trial(factor, 1.0) for factor in (0.5, 0.125)]
            more = best_of(alphas).learned > ALPHA * best_of(betas).learned
            if more and self._learns_more(alphas, betas):
                alphas = self._lower_alphas()
        if self._is_alpha_to_blame(alphas, betas, beta_handicap):
            return self._alpha_result(alphas)
        betas = self._lower_betas()
        return (self._alpha_suspect and self._both_lowered(betas, beta_handicap)) or self._beta_result(betas)

    def _is_alpha_to_blame(self, alphas: list[Trial], betas: list[Trial], beta_handicap: float) -> bool:
        """Whether lowering the inner rate alone learns more than lowering the outer rate alone."""
        best, factor = best_of(alphas), (1.0 if self._alpha_suspect else ALPHA) / beta_handicap
        # Below an inner rate that is too high lower ones do not diverge; if they do, one has survived by chance.
        lower_diverge = not all(math.isfinite(each.end) for each in alphas[alphas.index(best) :])
        by_chance = lower_diverge and factor > 0 and best_of(betas).trains
        more = best.trains and not by_chance and best.learned > factor * max(best_of(betas).learned, 0.0)
        return more and self._learns_more([*alphas[:1], *alphas[2:3], best], [self.trial(), *betas], factor=factor)

    def _learns_more(self, lower: Sequence[Trial], others: Sequence[Trial], factor: float = 1.0) -> bool:
        """Whether rates of which one trains learn more than ``factor`` times what the best others do on new tasks."""
        return self._more_anew([each.factors for each in lower if each.trains], best_of(others), factor)

    def _more_anew(self, rates: Sequence[Factors], other: Trial, factor: float = 1.0, share: float = 0.0) -> bool:
        """See `NewTasks.learn_more`; True where that is not known."""
        if self._new_tasks is None or not (other.trains and factor > 0 and self._new_tasks.known):
            return True
        return self._new_tasks.learn_more(rates, other.factors, self.steps, factor, share)

    def _memorises(self, tried: Sequence[Trial], others: Sequence[Trial], factor: float) -> bool:
        """Whether the latest of two inner rates that train learns more than the other one, and less on new tasks."""
        last, anew = [each for each in tried if each.trains][-2:], self._new_tasks
        if anew is None or not others or len(last) < 2 or last[0].learned > last[1].learned:
            return False
        more = self._learns_more(last, others, factor)
        return not more and anew.learned(last[0].factors, self.steps) > anew.learned(last[1].factors, self.steps)

    def _both_lowered(self, betas: list[Trial], beta_handicap: float) -> SearchResult | None:
        """Lower the outer rate at the inner rate that adapts best; None if lowering the outer rate alone suffices."""
        alone = best_of(betas)
        needed = not math.isfinite(beta_handicap) or not alone.trains
        if not needed and self._scale.unit is None and BOTH * alone.learned >= alone.learned + alone.end:
            return None  # a loss of 0 would not do
        adapted = {factor: mean_of(self.initial_losses(factor)) for factor in ALPHA_LADDER}
        lowest = min(adapted, key=adapted.__getitem__)
        if not needed and not self._more_anew([Factors(lowest, alone.factors.beta)], alone, BOTH):
            return None
        first = self.trial(lowest, BETA_LADDER[0])
        no_loss = self._scale.unit is None and first.end < NO_LOSS * first.learned  # no other learns more
        if not needed and no_loss and not self._more_anew([first.factors], alone, BOTH):
            return None
        both = self._lower_betas(lowest)
        more = best_of(both).learned > BOTH * max(alone.learned, 0.0)
        if not needed and not (more and self._learns_more([best_of(both)], betas, BOTH)):
            return None
        nearly = adapted[lowest] + self.clear_margin()
        highest = next((factor for factor, loss in adapted.items() if loss <= nearly), lowest)
        return replace(self._beta_result(both), highest_alpha=highest)

    def find_alpha(self) -> SearchResult:
        """Find the inner rate to set where the outer rate is to be left alone."""
        return self._alpha_result(self._lower_alphas())

    def find_beta(self, alpha: float) -> SearchResult:
        """Find the outer rate to set at a factor on the inner rates."""
        return self._beta_result(self._lower_betas(alpha))

    def _lower_betas(self, alpha: float = 1.0, stride: int = 1) -> list[Trial]:
        """Try lower and lower outer rates until one learns much less than the best one."""
        ladder = [Factors(alpha, factor) for factor in BETA_LADDER]
        return self._descend(ladder, lambda tried, best: tried[-1].trains and not self._nearly(tried[-1], best), stride)

    def _lower_alphas(self, others: Sequence[Trial] = (), factor: float = 0.0) -> list[Trial]:
        """Try lower and lower inner rates until several in a row learn less than the best one, or they memorise."""
        return self._descend(
            [Factors(alpha=each) for each in ALPHA_LADDER],
            lambda tried, best: len(tried) - tried.index(best) > PATIENCE or self._memorises(tried, others, factor),
        )

    def _descend(
        self, ladder: Sequence[Factors], falls: Callable[[list[Trial], Trial], bool], stride: int = 1
    ) -> list[Trial]:
        """Try rates from high to low until they learn less (``falls``), and no lower one is known to learn more."""
        tried: list[Trial] = []
        for index in range(stride - 1, len(ladder), stride):
            at, *below = [self._trials.get((each, self.steps)) for each in ladder[index:]]
            known = [each for each in below if each is not None]
            between = at is None and tried and known and best_of(tried).learned > tried[-1].learned > known[0].learned
            if between and known[0].trains and not falls([*tried, known[0]], best_of(tried)):
                continue  # both of the trials that it lies between are below the best one
            tried.append(self.trial(*ladder[index]))
            best = best_of(tried)
            if best.trains and falls(tried, best) and not any(each.learned > best.learned for each in known):
                break
        return tried

    def _alpha_result(self, ladder: Sequence[Trial]) -> SearchResult:
        best = best_of(ladder)
        nearly = min(NEARLY_AS_MUCH * best.learned, best.learned - self.clear_margin())
        highest = next((each for each in ladder if each.trains and each.learned >= nearly), best)
        return SearchResult(self.trial(), best, highest_alpha=highest.factors.alpha)

    def _beta_result(self, ladder: Sequence[Trial]) -> SearchResult:
        best = best_of(ladder)
        largest = next((each for each, below in pairwise(ladder) if each.trains and below.trains), best)
        lowest = next((each for each in reversed(ladder) if self._nearly(each, best)), best)
        return SearchResult(self.trial(), best, lowest.factors.beta, self.share_of_largest * largest.factors.beta)

    def _nearly(self, tried: Trial, best: Trial) -> bool:
        """Whether an outer rate learns nearly as much as the best one."""
        low = max(self._scale.times(NEARLY_AS_LOW, best.end), LOW * (best.end + best.learned))
        return tried.end <= low and tried.outer_gain >= NEARLY_AS_MUCH * best.outer_gain

    def clear_margin(self, share: float = CLEAR_SHARE) -> float:
        """A share of the loss before these trials, which may be far from the loss that the run started from."""
        before = mean_of(self.reference)
        return self._scale.times(1 + share, before) - before
