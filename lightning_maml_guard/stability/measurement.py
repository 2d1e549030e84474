"""One measurement in progress: from the subject's curvature to a report."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from lightning_maml_guard.linalg.layout import Layout, Params
from lightning_maml_guard.linalg.operators import Operator
from lightning_maml_guard.optim.shadow import predicted_change
from lightning_maml_guard.stability.alpha_c import NAN_INTERVAL, InnerBench
from lightning_maml_guard.stability.bench import HESSIAN, META_UPDATE
from lightning_maml_guard.stability.beta_c import UNKNOWN, MetaRateLimit, exact_limit, poster_limit
from lightning_maml_guard.stability.budget import CURVATURE, UPDATE
from lightning_maml_guard.stability.estimators import Spectrum, hessian_spectrum, merged
from lightning_maml_guard.stability.judgement import judged
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import Limit


class Measurement(InnerBench):
    """Measures one subject for one optimizer."""

    def report(self, began: float) -> StabilityReport:
        """Measure.

        Args:
            began: When the measurement began.

        Returns:
            The report.

        Raises:
            NonFiniteProductError: If the loss or a product is not finite.
        """
        hessian, noise = self.operator(HESSIAN, self.subject.curvature(self.blocks is not None))
        # Over blocks the value is this rank's own, and what ends a measurement must end it on every rank.
        value = hessian.value if self.blocks is None else self.ranks.mean(hessian.value)
        exact = self.options.criterion == "exact" and self.maml is not None
        poster_alpha = 0.0 if self.maml is None else self.alpha
        spectrum = self.over_blocks(
            lambda: hessian_spectrum(
                hessian,
                self.subject.mean_loss,
                self.subject.params,
                estimator=self.options.estimator,
                blocks=self.blocks,
                alpha=0.0 if exact else poster_alpha * self.subject.inner_steps,
                krylov=self.options.krylov,
                noise=noise,
                value=("The task loss", value),
            ),
            self.blocks,
            merged,
        )
        if self.options.estimator == "pyhessian":
            self.charge(spectrum.matvecs, UPDATE if self.maml is None else CURVATURE)  # on copies of its own
        known = spectrum.rates(poster_alpha, self.subject.inner_steps)
        alpha_limit = self.alpha_limit(hessian, known, exact)
        # One graph at a time: each is often several times the parameters' size.
        poster = None if exact else self._poster_limits(hessian, spectrum, alpha_limit)
        if self.maml is not None:
            hessian.release()
        jacobian, exact_beta = self._exact(hessian, exact)
        change = predicted_change(jacobian, self.optimizer, self.beta, self.subject.live)
        if jacobian is not None:
            jacobian.release()
        if exact and exact_beta.beta_c == 0 and not alpha_limit.ratio > 1:
            alpha_limit = self.sharpest_alpha_limit(alpha_limit)
        beta_limit, at_safe, safe_alpha = poster or self._exact_limits(alpha_limit, exact_beta)
        flat = known.lambda_max == 0 and known.lambda_min == 0
        predicted, noise_limit = self._along(change, exact_beta)
        verdict = judged(
            None if self.maml is None else alpha_limit,
            None if math.isnan(self.beta) else Limit(self.beta, beta_limit.beta_c, beta_limit.interval),
            order=self.subject.order,
            exact=exact,
            flat=flat,
            plain_sgd=self.outer.plain_sgd,
            margin=self.options.margin,
            hvps=self.hvps,
            step=self.options.step,
            alpha_note=self.alpha_note,
            beta_note=self.outer.note,
        )
        self.notices += list(self.memory.finite.values())
        if flat:
            self.notices += verdict.reasons
        elif self.outer.lasting:
            self.notices.append(self.outer.note)
        return self._report(
            began,
            alpha_c=alpha_limit.critical,
            beta_c=beta_limit.beta_c,
            sgd_beta_c=math.nan if self.maml is None or self.subject.rates is not None else known.beta_c,
            exact_beta_c=exact_beta.beta_c if self.maml is not None else math.nan,
            exact_beta_c_interval=exact_beta.interval if self.maml is not None else NAN_INTERVAL,
            beta_c_noise=noise_limit,
            mean_alpha_c=self.mean_alpha_c(exact),
            predicted_change=predicted,
            lambda_max=known.lambda_max,
            lambda_min=known.lambda_min,
            status=verdict.status,
            reasons=verdict.reasons,
            alpha_status=verdict.alpha_status,
            beta_status=verdict.beta_status,
            safe_alpha=safe_alpha,
            safe_beta=self.beta if math.isnan(at_safe) else min(self.beta, self.options.margin * at_safe),
            safe_beta_c=at_safe,
            lambda_max_interval=known.lambda_max_interval,
            alpha_c_interval=alpha_limit.interval,
            beta_c_interval=beta_limit.interval,
            spectrum=spectrum,
        )

    def _exact(self, hessian: Operator, acting: bool) -> tuple[Operator | None, MetaRateLimit]:
        """Measure the update's own Jacobian; where nothing acts on it, a failure costs that number alone."""
        if self.maml is None:
            return hessian, UNKNOWN
        if acting:
            return self._exact_at(1.0)
        try:
            with self.ranks.together():
                return self._exact_at(1.0)
        except Exception as error:
            self.notices.append(
                f"exact_beta_c could not be measured ({type(error).__name__}: {error}); the poster's conditions are "
                "still checked."
            )
            return None, UNKNOWN

    def _exact_at(self, factor: float) -> tuple[Operator, MetaRateLimit]:
        assert self.maml is not None
        jacobian, noise = self.operator(META_UPDATE, self.maml.update(factor))
        limit = exact_limit(
            jacobian,
            self.maml.symmetric,
            self.outer,
            self.like,
            krylov=self.options.krylov,
            noise=noise,
            value=("The query loss after adaptation", jacobian.value),
        )
        if limit.lowest_direction is not None and self._turned(limit.lowest_direction):
            limit = MetaRateLimit(0.0, (0.0, 0.0), limit.direction)
        return jacobian, limit

    def _turned(self, direction: Tensor) -> bool:
        """Whether the inner rate turned a direction that a task's curvature makes too sharp for it."""
        # Directions that the task losses curve down themselves are saddles, not the rates' doing.
        if self.maml is None or self.maml.symmetric or self.alpha == 0:
            return False
        direction = self.outer.unscaled(direction)
        direction = direction / torch.linalg.vector_norm(direction)
        operator, _ = self.operator(HESSIAN, self.maml.curvature(True))
        rows = direction.expand(self.maml.tasks, -1)
        curvatures = torch.cat(self.ranks.gather((rows * operator(rows)).sum(-1).cpu()))
        operator.release()
        beyond = curvatures * self.alpha > self.maml.inner_limit
        return bool(beyond.any()) and bool(curvatures.mean() > 0)

    def _exact_limits(self, alpha_limit: Limit, exact_beta: MetaRateLimit) -> tuple[MetaRateLimit, float, float]:
        """``beta_c`` of the update as configured, at the safe inner rate, and that inner rate."""
        safe_alpha = self.safe_alpha(alpha_limit)
        if not safe_alpha < self.alpha:
            return exact_beta, exact_beta.beta_c, safe_alpha
        jacobian, limit = self._exact_at(safe_alpha / self.alpha)
        jacobian.release()
        return exact_beta, limit.beta_c, safe_alpha

    def _poster_limits(
        self, hessian: Operator, spectrum: Spectrum, alpha_limit: Limit
    ) -> tuple[MetaRateLimit, float, float]:
        """The same by the poster's conditions."""
        safe_alpha, rates = self.safe_alpha(alpha_limit), self.subject.rates
        beyond = alpha_limit.ratio > 1 + 1e-12
        limit = self._poster(hessian, spectrum, 0.0 if self.maml is None else self.alpha, rates, beyond)
        if not safe_alpha < self.alpha:
            return limit, limit.beta_c, safe_alpha
        lowered = None if rates is None else {n: r * (safe_alpha / self.alpha) for n, r in rates.items()}
        return limit, self._poster(hessian, spectrum, safe_alpha, lowered, False).beta_c, safe_alpha

    def _poster(
        self, hessian: Operator, spectrum: Spectrum, alpha: float, rates: Params | None, collapsed: bool
    ) -> MetaRateLimit:
        return self.over_blocks(
            lambda: poster_limit(
                hessian,
                spectrum,
                self.outer,
                self.like,
                alpha=alpha,
                rates=rates,
                inner_steps=self.subject.inner_steps,
                collapsed=collapsed,
                blocks=self.blocks,
                krylov=self.options.krylov,
            ),
            self.blocks,
            lambda found: min(found, key=lambda each: each.beta_c),
        )

    def _along(self, change: Tensor | None, exact_beta: MetaRateLimit) -> tuple[float, float]:
        """Predicted change of the coming step; mean-square limit from the tasks' curvatures along the top direction."""
        direction = exact_beta.direction
        if self.maml is None or direction is None or self.tasks < 2 or self.outer.decoupled:
            return math.nan if change is None else float(change), math.nan
        direction = self.outer.unscaled(direction)
        along = self.maml.curvature_by_task(Layout(self.subject.params).split(direction))
        self.charge(1, UPDATE, graphs=1)
        # One transfer to the host for all of it.
        single = [direction.new_tensor(math.nan) if change is None else change, self.outer.shift_along(direction)]
        predicted, shift, *own = torch.cat([torch.stack(single).double(), along.double()]).cpu().tolist()
        each = torch.tensor([value for part in self.ranks.gather(own) for value in part], dtype=torch.float64)
        if not bool(torch.isfinite(each).all()):
            return predicted, math.nan
        # The batch's curvature is the mean over its tasks, so its variance is a task's over their number.
        mean, variance = float(each.mean()) + shift, float(each.var()) / self.tasks
        return predicted, self.outer.responses[0].mean_square_rate(mean, variance)

    def failed(self, reason: str, began: float) -> StabilityReport:
        """Report a measurement that came to nothing.

        Args:
            reason: Why.
            began: When it began.

        Returns:
            The report: unresolved.
        """
        said = f"The curvature could not be measured: {reason}"
        self.notices = [*self.memory.finite.values(), said]
        return self._report(
            began,
            alpha_c=math.nan,
            beta_c=math.nan,
            sgd_beta_c=math.nan,
            exact_beta_c=math.nan,
            lambda_max=math.nan,
            lambda_min=math.nan,
            status="unresolved",
            reasons=(said,),
            alpha_status="unresolved",
            beta_status="unresolved",
            safe_alpha=self.alpha,
            safe_beta=self.beta,
            safe_beta_c=math.nan,
            lambda_max_interval=NAN_INTERVAL,
            alpha_c_interval=NAN_INTERVAL,
            beta_c_interval=NAN_INTERVAL,
            spectrum=Spectrum(),
        )

    def _report(self, began: float, **found: Any) -> StabilityReport:
        return StabilityReport(
            alpha=self.alpha,
            beta=self.beta,
            inner_steps=self.subject.inner_steps,
            hvps=self.hvps,
            cost=self.cost,
            seconds=time.perf_counter() - began,
            criterion=self.options.criterion,
            notices=tuple(self.notices),
            step=self.options.step,
            alpha_applied=self.alpha,
            beta_applied=self.beta,
            **found,
        )
