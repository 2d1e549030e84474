"""The inner rate's limit in a measurement: of the mean task loss, of every task's, of rates by parameter."""

from __future__ import annotations

import math
from typing import Any

from lightning_maml_guard.linalg.lanczos import Matvec
from lightning_maml_guard.linalg.operators import Operator, scaled
from lightning_maml_guard.stability.bench import HESSIAN, Bench
from lightning_maml_guard.stability.krylov_stopping import top_eigenvalue
from lightning_maml_guard.theory.limits import Limit
from lightning_maml_guard.utils.task_map import as_float32

NAN_INTERVAL = (math.nan, math.nan)


class InnerBench(Bench):
    """A bench that finds ``alpha_c``."""

    def alpha_limit(self, hessian: Operator, known: Any, exact: bool) -> Limit:
        """Find the inner rate's limit: ``inner_limit / lambda_max(H)``.

        With rates ``A`` by parameter it is that of ``A^(1/2) H A^(1/2)``.

        Args:
            hessian: The Hessian of the task loss.
            known: What its spectrum says of the rates.
            exact: Whether of the update as configured, or else of the poster's.

        Returns:
            The limit; not a number where there is no inner loop or a rate is negative.
        """
        if self.maml is None:
            return Limit(math.nan, math.nan, NAN_INTERVAL)
        reach, rates = self._reach(exact), self.subject.rates
        if rates is None:
            if not exact:
                return Limit(self.alpha, known.alpha_c, known.alpha_c_interval)
            return _alpha_of(self.alpha, reach, known.lambda_max, known.lambda_max_interval)
        if any(bool((rate < 0).any()) for rate in rates.values()):
            self.alpha_note = "a learned inner rate is negative, and the condition is about rates of at least 0."
            return Limit(self.alpha, math.nan, NAN_INTERVAL)
        weights = hessian.layout.flatten(as_float32(rates)).to(self.like)
        return self._alpha_of_top(scaled(hessian, weights), hessian.layout.size, self.blocks, self.alpha * reach)

    def _reach(self, exact: bool) -> float:
        """``alpha_c * lambda_max``: of the update as configured, or of the poster's."""
        return self.subject.inner_limit if exact else 1 / self.subject.inner_steps

    def _alpha_of_top(self, matvec: Matvec, size: int, blocks: int | None, reach: float) -> Limit:
        found = self.over_blocks(
            lambda: top_eigenvalue(matvec, size, self.like, blocks, krylov=self.options.krylov),
            blocks,
            max,
        )
        return _alpha_of(self.alpha, reach, *found)

    def sharpest_alpha_limit(self, mean: Limit) -> Limit:
        """Find the sharpest task's limit, where the mean's does not explain a collapsed direction.

        Args:
            mean: The mean's.

        Returns:
            The sharpest task's; the mean's where tasks or rates are treated one by one already.
        """
        if self.blocks is not None or self.subject.rates is not None:
            return mean
        return self._uniform_alpha_limit(True, self._reach(True))

    def mean_alpha_c(self, exact: bool) -> float:
        """Find the mean task loss's ``alpha_c``, to stand beside the sharpest task's with ``tasks="worst"``.

        Args:
            exact: Whether of the update as configured, or else of the poster's.

        Returns:
            It; ``nan`` where it is not asked for.
        """
        if self.blocks is None or self.subject.rates is not None:
            return math.nan
        return self._uniform_alpha_limit(False, self._reach(exact)).critical

    def _uniform_alpha_limit(self, per_task: bool, reach: float) -> Limit:
        operator, _ = self.operator(HESSIAN, self.subject.curvature(per_task))
        limit = self._alpha_of_top(operator, operator.layout.size, self.subject.tasks if per_task else None, reach)
        operator.release()
        return limit

    def safe_alpha(self, alpha_limit: Limit) -> float:
        """Bring the inner rate down to its limit.

        Args:
            alpha_limit: The limit.

        Returns:
            ``margin`` times it, or the rate itself if that is lower.
        """
        capped = self.options.margin * alpha_limit.critical
        return capped if capped < self.alpha else self.alpha


def _alpha_of(alpha: float, reach: float, top: float, interval: tuple[float, float]) -> Limit:
    ends = [reach / end if end > 0 else math.inf for end in (interval[1], top, interval[0])]
    return Limit(alpha, ends[1], (ends[0], ends[2]))
