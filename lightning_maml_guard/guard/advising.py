"""What to advise: the last sane state of the run says which rate is to blame, rates tried from there what to set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch.optim import Optimizer

from lightning_maml_guard.guard.run import GuardedRun
from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import Lookahead, LookaheadResult, lookahead_of
from lightning_maml_guard.lookahead.rate_search import TRIAL_STEPS, Factors, Found, RateSearch, Trial
from lightning_maml_guard.lookahead.resampled import resampled
from lightning_maml_guard.messages.advice import Advice, Cause, settable
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.stability.adaptation import Adaptation
from lightning_maml_guard.stability.problems import Problem, dead_units
from lightning_maml_guard.stability.report import StabilityReport

# A run's parameters count as sane while its loss is below this many times the one that training started from.
_SANE = 1.5
# A batch is odd if its loss at sane parameters is this many times the others' median; of so many others at least.
_ODD, _OTHERS = 5.0, 3
# Lower rates must end lower by this share of the loss before they are advised to a run that does not diverge.
_CLEARLY = 0.1
# Ratios of rates to their limits below which a longer look is not worth its cost.
_CLEAR = 0.5
# Share of its units that a network has lost when they are named as the cause.
_DEAD = 0.5
# A search may cost as much as some hundred steps: of one run no more than so many.
MOST_SEARCHES = 4


@dataclass(frozen=True)
class Peak:
    """Where a schedule takes the meta rate: how high, when, and which configured rate it comes from.

    Attributes:
        rate: The highest meta rate to come; the scheduled one where it does not rise.
        step: When it is reached; None where it does not rise.
        configured: The number that somebody configured, per unit of the peak.
    """

    rate: float
    step: int | None = None
    configured: float = 1.0


class Adviser:
    """Advises a run at one check.

    Attributes:
        found: The advice; None while there is none.
    """

    def __init__(
        self,
        run: GuardedRun,
        trainer: Any,
        module: Any,
        problems: Sequence[Problem],
        optimizers: list[Optimizer],
        scale: Scale,
        step: int,
        peak: Peak,
    ) -> None:
        self._run, self._trainer, self._module, self._optimizers = run, trainer, module, optimizers
        self._problems, self._scale, self._step, self._peak = list(problems), scale, step, peak
        self._ratio = run.settings.lookahead.divergence_ratio

    def look_further(self, report: StabilityReport) -> Found | None:
        """Try more steps on fresh tasks than a lookahead does; what was found, if lower rates do clearly better.

        Left out where the critical values are far above the rates.
        """
        ratios = [report.beta_ratio, *([] if math.isnan(report.alpha) else [report.alpha_ratio])]
        if all(ratio < _CLEAR for ratio in ratios):
            return None
        search = self._search(self._problems)
        if search.at().trains:
            return None
        found = search.find(alpha_suspect=report.alpha_ratio > 1, has_alpha=not math.isnan(report.alpha))
        return found if self._is_better(found) else None

    def advise(
        self,
        report: StabilityReport,
        present: LookaheadResult,
        evidence: tuple[Reason, ...],
        adaptation: Adaptation | None,
        found: Found | None = None,
        *,
        only_alpha: bool = False,
    ) -> Advice:
        """Advise a run that diverges, or whose adaptation is harmful (``only_alpha``)."""
        self._run.state.searches += 1
        with self._sane(present) as at:
            if at != self._step:  # what was measured where the run has been thrown to blames the wrong rate
                report, evidence = self._last_sane(report, at), evidence[-1:]
            if found is None:
                problems, odd = self._without_odd()
                if odd is not None and self._search(problems).at().trains:
                    return self._of_batch(problems, odd, report)
                suspect = report.alpha_ratio > 1 or (adaptation is not None and adaptation.harmful)
                search = self._search(problems)
                has_alpha = not math.isnan(report.alpha)
                found = search.find_alpha() if only_alpha else search.find(alpha_suspect=suspect, has_alpha=has_alpha)
            return self._of_rates(found, report, evidence)

    def _search(self, problems: Sequence[Problem]) -> RateSearch:
        run, count = self._run, self._run.settings.lookahead.batches
        lookahead = lookahead_of(
            self._fresh(problems), self._optimizers, count, self._trainer, run.cache, run.state.clipped_to
        )
        factor = self._peak.rate / lookahead.beta if lookahead.beta > 0 else 1.0
        return RateSearch(lookahead, self._scale, self._ratio, peak=factor)

    def _fresh(self, problems: Sequence[Problem]) -> list[Problem]:
        return list(problems) if self._run.repeats else resampled(problems, self._run.settings.lookahead.batches)

    def _is_better(self, found: Found) -> bool:
        size = self._scale.times(1 + _CLEARLY, self._scale.start) - self._scale.start
        return found.best.trains and found.best.learned > found.present.learned + size

    @contextmanager
    def _sane(self, present: LookaheadResult) -> Iterator[int]:
        """Go to the last sane state of the run, whose step is given, and come back."""
        run, step = self._run, self._step
        snapshot, loss = run.snapshot, present.begin
        sane = math.isfinite(loss) and loss <= self._scale.times(_SANE, self._scale.start)
        if sane or snapshot is None or snapshot.step >= step:
            yield step
            return
        now = Snapshot(self._module, self._trainer.optimizers, step, run.settings.snapshot_device)
        try:
            snapshot.restore(self._module, self._trainer.optimizers)
            yield snapshot.step
        finally:
            now.restore(self._module, self._trainer.optimizers)

    def _last_sane(self, report: StabilityReport, at: int) -> StabilityReport:
        return next((each for each in reversed(self._run.state.history) if (each.step or 0) <= at), report)

    def _without_odd(self) -> tuple[list[Problem], int | None]:
        """Leave out a batch that is unlike the others at sane parameters; its index."""
        if len(self._problems) <= _OTHERS or self._run.repeats:
            return self._problems, None
        lookahead = self._lookahead(self._problems)
        losses = [loss if math.isfinite(loss) else math.inf for loss in lookahead.untrained()]
        worst = max(range(len(losses)), key=losses.__getitem__)
        others = [loss for index, loss in enumerate(losses) if index != worst]
        if not losses[worst] > self._scale.times(_ODD, median(others)):
            return self._problems, None
        return [each for index, each in enumerate(self._problems) if index != worst], worst

    def _lookahead(self, problems: Sequence[Problem]) -> Lookahead:
        run = self._run
        return lookahead_of(problems, self._optimizers, 1, self._trainer, run.cache, run.state.clipped_to)

    def _of_batch(self, problems: Sequence[Problem], odd: int, report: StabilityReport) -> Advice:
        """Advise to clip what an odd batch does: at twice the gradients of the others."""
        norms = self._lookahead(problems).gradient_norms()
        losses = self._lookahead([self._problems[odd], *problems]).untrained()
        reason = Reason(
            Kind.ODD_BATCH, losses=(losses[0], median(losses[1:]), self._scale.start), step=self._step - odd
        )
        return Advice(
            cause=Cause.BATCH,
            gradient_clip_val=settable(2 * median(norms)),
            step=self._step,
            evidence=(reason,),
            configured_alpha=report.alpha,
            configured_beta=self._peak.rate * self._peak.configured,
        )

    def _of_rates(self, found: Found, report: StabilityReport, evidence: tuple[Reason, ...]) -> Advice:
        rates = found.rates if found.best.trains else Factors()
        lower_alpha, lower_beta = rates.alpha < 1, rates.beta < 1
        rises, died = self._peak.step is not None, None
        if lower_alpha and lower_beta:
            cause = Cause.BOTH
        elif lower_alpha:
            cause = Cause.ALPHA
        elif lower_beta:
            died = self._died()
            cause = Cause.DEAD_UNITS if died is not None else Cause.SCHEDULE if rises else Cause.BETA
        else:
            cause = Cause.UNKNOWN
        beta = self._peak.rate * self._peak.configured
        tried = Reason(
            Kind.RATES_TRIED,
            losses=(found.present.end, found.best.end, self._scale.start),
            steps=TRIAL_STEPS,
            alpha=found.best.at.alpha * report.alpha,
            beta=found.best.at.beta * beta,
        )
        return Advice(
            cause=cause,
            alpha=settable(rates.alpha * report.alpha) if lower_alpha else None,
            beta=settable(rates.beta * beta) if lower_beta else None,
            step=self._step,
            evidence=(*evidence, *([died] if died is not None else []), tried),
            configured_alpha=report.alpha,
            configured_beta=beta,
            peak_step=self._peak.step,
        )

    def _died(self) -> Reason | None:
        """The units that are dead where the run is now, if most are."""
        counted = dead_units(self._problems[0])
        if not counted.total or counted.dead < _DEAD * counted.total:
            return None
        return Reason(Kind.UNITS_DIED, counts=(counted.dead, counted.total))


def described(trial: Trial) -> str:
    """Where a trial ended, for logs."""
    return f"{trial.end:.3g}"
