"""The inner rate's limit ``alpha_c``: of the mean task loss, of every task's, of one rate per parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_maml_guard.linalg.lanczos import Matvec
from lightning_maml_guard.linalg.operators import Operator, scaled
from lightning_maml_guard.messages.reasons import UNKNOWN_INTERVAL
from lightning_maml_guard.stability.hvp import HESSIAN, Operators
from lightning_maml_guard.stability.krylov_stopping import Krylov, RateToJudge, top_eigenvalue
from lightning_maml_guard.stability.objective import MamlObjective
from lightning_maml_guard.theory.critical_rates import CriticalRates
from lightning_maml_guard.theory.limits import Limit
from lightning_maml_guard.utils.task_map import as_float32

_NEGATIVE_RATE = "a learned inner rate is negative, and the condition is about rates of at least 0."


@dataclass(frozen=True)
class InnerRateLimit:
    """Finds ``alpha_c = inner_limit / lambda_max(H)`` of a MAML problem.

    Attributes:
        operators: The operators of the measurement.
        maml: The problem; None in plain training, which has no inner rate.
        exact: Whether of the update as configured, or else of the simplified criterion.
        krylov: How far a run goes.
    """

    operators: Operators
    maml: MamlObjective | None
    exact: bool
    krylov: Krylov

    def rate_to_judge(self, margin: float, rounding: float) -> RateToJudge | None:
        """The inner rate, if the Hessian's top eigenvalue is to judge it.

        Not for tasks one by one: each process would end its own tasks' runs elsewhere.
        """
        if self.maml is None or not self.exact or self.maml.rates is not None or self.operators.blocks is not None:
            return None
        scaled_limit = self._scaled_limit
        return RateToJudge(
            self.maml.alpha / margin, lambda curvature: (scaled_limit / curvature,) * 3, rounding=rounding
        )

    def of(self, hessian: Operator, known: CriticalRates) -> tuple[Limit, str]:
        """Find the limit; with rates ``A`` per parameter it is that of ``A^(1/2) H A^(1/2)``.

        Returns:
            The limit, ``nan`` where there is none, and why there is none; ``known`` is what the spectrum says.
        """
        if self.maml is None:
            return Limit(math.nan, math.nan, UNKNOWN_INTERVAL), ""
        alpha, rates = self.maml.alpha, self.maml.rates
        if math.isnan(self.maml.inner_limit):
            return Limit(alpha, math.nan, UNKNOWN_INTERVAL), self.maml.alpha_note
        if rates is None:
            if not self.exact:
                return Limit(alpha, known.alpha_c, known.alpha_c_interval), ""
            return _limit(alpha, self._scaled_limit, known.lambda_max, known.lambda_max_interval), ""
        if any(bool((rate < 0).any()) for rate in rates.values()):
            return Limit(alpha, math.nan, UNKNOWN_INTERVAL), _NEGATIVE_RATE
        weights = hessian.layout.flatten(as_float32(rates)).to(hessian.gradient)
        blocks = self.operators.blocks
        limit = self._of_top(scaled(hessian, weights), hessian, blocks, alpha * self._scaled_limit)
        if not self.maml.lower_bound or not self.exact:
            return limit, ""
        if limit.ratio > 1:
            return Limit(alpha, math.nan, UNKNOWN_INTERVAL), self.maml.alpha_note
        return Limit(alpha, limit.critical, (limit.interval[0], math.inf)), ""

    def sharpest(self, mean: Limit) -> Limit:
        """Find the sharpest task's limit, where the mean's does not explain a collapsed direction."""
        known = self.maml is not None and self.maml.rates is None and not math.isnan(self.maml.inner_limit)
        if not known or self.operators.blocks is not None:
            return mean  # tasks or rates are treated one by one already
        return self._uniform(True)

    def of_mean(self) -> float:
        """Find the mean task loss's ``alpha_c``, to stand beside the sharpest task's; ``nan`` where not asked for."""
        known = self.maml is not None and self.maml.rates is None and not math.isnan(self.maml.inner_limit)
        if not known or self.operators.blocks is None:
            return math.nan
        return self._uniform(False).critical

    @property
    def _scaled_limit(self) -> float:
        """``alpha_c * lambda_max``."""
        assert self.maml is not None
        return self.maml.inner_limit if self.exact else 1 / self.maml.inner_steps

    def _uniform(self, per_task: bool) -> Limit:
        assert self.maml is not None
        operator, _ = self.operators.build(HESSIAN, self.maml.curvature(per_task))
        limit = self._of_top(operator, operator, self.maml.tasks if per_task else None, self._scaled_limit)
        operator.release()
        return limit

    def _of_top(self, matvec: Matvec, hessian: Operator, blocks: int | None, scaled_limit: float) -> Limit:
        assert self.maml is not None
        like = next(iter(self.maml.params.values())).new_empty(())
        found = self.operators.over_blocks(
            lambda: top_eigenvalue(
                matvec, hessian.layout.rows, like, blocks, krylov=self.krylov, space=hessian.layout.space
            ),
            blocks,
            max,
        )
        return _limit(self.maml.alpha, scaled_limit, *found)


def _limit(alpha: float, scaled_limit: float, top: float, interval: tuple[float, float]) -> Limit:
    ends = [scaled_limit / end if end > 0 else math.inf for end in (interval[1], top, interval[0])]
    return Limit(alpha, ends[1], (ends[0], ends[2]))
