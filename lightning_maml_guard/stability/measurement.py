"""One measurement: from the objective's curvature to a report, readable from top to bottom."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning_maml_guard.linalg.lanczos import NonFiniteProductError, check_finite
from lightning_maml_guard.linalg.layout import Params
from lightning_maml_guard.linalg.operators import Operator
from lightning_maml_guard.messages.reasons import Kind, Reason, of_error
from lightning_maml_guard.optim.linearized_step import linearized_step
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.optim.shadow import predicted_change
from lightning_maml_guard.optim.stability_limits import Optimizers
from lightning_maml_guard.stability.alpha_c import InnerRateLimit
from lightning_maml_guard.stability.beta_c import (
    UNKNOWN,
    MetaRateLimit,
    MetaRateLimits,
    exact_limit,
    is_inner_rate_at_fault,
    mean_square_limit,
    simplified_limit,
)
from lightning_maml_guard.stability.estimators import (
    HessianRequest,
    Spectrum,
    counts_itself,
    estimate_spectrum,
    merged,
)
from lightning_maml_guard.stability.hvp import HESSIAN, META_UPDATE, UPDATE_PRICE, MeasurementCache, Operators
from lightning_maml_guard.stability.objective import MamlObjective, Objective
from lightning_maml_guard.stability.options import CurvatureOptions
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.stability.verdict import Verdict, VerdictContext, from_limits, judge, no_curvature
from lightning_maml_guard.theory.limits import SAFE, Limit

_QUERY_LOSS = "The query loss after adaptation"


class Measurement:
    """Measures one objective for one optimizer, or for plain SGD at the rate ``beta``."""

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizers | None,
        beta: float | None,
        options: CurvatureOptions,
        cache: MeasurementCache,
        *,
        margin: float,
        step: int | None,
        tasks_share: float = 1.0,
        notes: tuple[Reason, ...] = (),
    ) -> None:
        self._began = time.perf_counter()
        self._objective, self._optimizer, self._options = objective, optimizer, options
        # A training step goes over all tasks of the batch; a measurement may take the first ones.
        self._margin, self._at_step, self._tasks_share = margin, step, tasks_share
        self._maml = objective if isinstance(objective, MamlObjective) else None
        self._exact = options.criterion == "exact" and self._maml is not None
        self._update = linearized_step(optimizer, objective.live)
        self._beta = scheduled_rate(optimizer) if optimizer is not None else math.nan if beta is None else float(beta)
        self._like = next(iter(objective.params.values())).new_empty(())
        per_task = options.tasks == "worst" and self._maml is not None
        self._operators = Operators(objective, cache, per_task=per_task)
        self._tasks = sum(cache.ranks.gather(objective.tasks))
        # Whether the tasks' own curvatures are wanted, and known to matter: not under a decay beside the gradient.
        self._by_task = self._tasks > 1 and not self._update.decoupled
        self._simplified_alpha = 0.0 if self._maml is None else objective.alpha
        self._given_notes = notes
        self._notes: list[Reason] = list(notes)
        self._beta_note = ""  # why the outer rate's limit is not known here

    def report(self) -> StabilityReport:
        """Measure. Raises a NonFiniteProductError if the loss or a product is not finite."""
        alpha_c = InnerRateLimit(self._operators, self._maml, self._exact, self._options.krylov)
        hessian, spectrum = self._hessian_spectrum(alpha_c)
        known = spectrum.rates(self._simplified_alpha, self._objective.inner_steps)
        alpha_limit, alpha_note = alpha_c.of(hessian, known)
        # One graph at a time: each is often several times the parameters' size.
        simplified = None if self._exact else self._simplified_limits(hessian, spectrum, alpha_limit)
        if self._maml is not None:
            hessian.release()
        # In plain training the Hessian is the update's Jacobian. The simplified criterion does without the Jacobian of
        # MAML's update, whose products are most of a check.
        jacobian, exact_beta = hessian if self._maml is None else None, UNKNOWN
        if self._exact:
            jacobian, exact_beta = self._exact_limit_if_finite(1.0)
        predicted, noise_limit = self._predicted_change(jacobian, exact_beta)
        if self._exact and exact_beta.beta_c == 0 and not alpha_limit.ratio > 1:
            alpha_limit = alpha_c.sharpest(alpha_limit)
        beta = simplified or self._exact_limits(alpha_limit, exact_beta)
        verdict = self._verdict(alpha_limit, alpha_note, beta, flat=known.lambda_max == 0 and known.lambda_min == 0)
        mean_alpha_c, lowered = alpha_c.of_mean(), self._at_lower_alpha(beta, known.lambda_max)
        where: dict[str, Any] = {"margin": self._margin, "step": self._at_step}
        at_safe = self._margin * beta.at_safe_alpha
        return StabilityReport(
            **self._common_fields(),
            alpha_c=alpha_limit.critical,
            beta_c=beta.configured.beta_c,
            sgd_beta_c=known.beta_c if self._maml is not None and self._maml.uniform_steps else math.nan,
            exact_beta_c=exact_beta.beta_c,
            exact_beta_c_interval=exact_beta.interval,
            beta_c_noise=noise_limit,
            mean_alpha_c=mean_alpha_c,
            predicted_change=predicted,
            lambda_max=known.lambda_max,
            lambda_min=known.lambda_min,
            status=verdict.status,
            findings=verdict.findings,
            alpha_status=verdict.alpha_status,
            beta_status=verdict.beta_status,
            safe_alpha=beta.safe_alpha,
            safe_beta=self._beta if math.isnan(at_safe) else min(self._beta, at_safe),
            safe_beta_c=beta.at_safe_alpha,
            lambda_max_interval=known.lambda_max_interval,
            alpha_c_interval=alpha_limit.interval,
            beta_c_interval=beta.configured.interval,
            spectrum=spectrum,
            advice=from_limits(verdict, alpha=alpha_limit, beta=self._beta, safe_beta_c=lowered, **where),
        )

    def _hessian_spectrum(self, alpha_c: InnerRateLimit) -> tuple[Operator, Spectrum]:
        objective, operators, blocks = self._objective, self._operators, self._operators.blocks
        hessian, noise = operators.build(HESSIAN, objective.curvature(blocks is not None))
        # Over blocks the value is this rank's own, and what ends a measurement must end it on every rank.
        value = hessian.value if blocks is None else operators.ranks.mean(hessian.value)
        request = HessianRequest(
            hessian,
            objective.mean_loss,
            objective.params,
            blocks,
            alpha=0.0 if self._exact else self._simplified_alpha * objective.inner_steps,
            krylov=self._options.krylov,
            noise=noise,
            value=("The task loss", value),
            rate_to_judge=alpha_c.rate_to_judge(self._margin, noise),
        )
        spectrum = operators.over_blocks(lambda: estimate_spectrum(self._options.estimator, request), blocks, merged)
        if counts_itself(self._options.estimator):
            operators.charge(spectrum.matvecs, operators.hessian_price)
        return hessian, spectrum

    def _predicted_change(self, jacobian: Operator | None, exact_beta: MetaRateLimit) -> tuple[float, float]:
        """The change of the loss that the coming step predicts, and the limit for tasks drawn anew at every step."""
        change = predicted_change(jacobian, self._optimizer, self._beta, self._objective.live)
        self._operators.charge(0, UPDATE_PRICE, graphs=int(change is not None))
        if jacobian is not None:
            jacobian.release()
        if exact_beta.direction is None or not self._by_task:
            return math.nan if change is None else float(change), math.nan
        direction = self._update.unscaled(exact_beta.direction)
        by_task = self._operators.by_task(direction) if exact_beta.by_task is None else exact_beta.by_task
        return mean_square_limit(by_task, self._operators, self._update, direction, self._tasks, change)

    def _verdict(self, alpha_limit: Limit, alpha_note: str, beta: MetaRateLimits, *, flat: bool) -> Verdict:
        """Judge the rates, and note what will keep a rate from being judged at later checks, too."""
        objective, update = self._objective, self._update
        context = VerdictContext(
            margin=self._margin,
            step=self._at_step,
            order=objective.order,
            exact=self._exact,
            plain_sgd=update.plain_sgd,
            plain_steps=objective.plain_steps,
            alpha_note=alpha_note,
            beta_note=self._beta_note or update.note,
        )
        inner = None if self._maml is None else alpha_limit
        outer = Limit(self._beta, beta.configured.beta_c, beta.configured.interval)
        verdict = no_curvature(context) if flat else judge(inner, None if math.isnan(self._beta) else outer, context)
        self._notes += self._operators.cache.facts.finite.values()
        if flat:
            self._notes += verdict.findings
        elif update.lasting:
            self._notes.append(Reason(Kind.NOT_JUDGED, rate="beta", detail=update.note, step=self._at_step))
        if objective.alpha_note and alpha_note and not flat:
            self._notes.append(Reason(Kind.NOT_JUDGED, rate="alpha", detail=alpha_note, step=self._at_step))
        return verdict

    def _at_lower_alpha(self, beta: MetaRateLimits, lambda_max: float) -> float:
        """The outer rate's limit at the lowered inner rate if that is to be lowered: ``beta_c`` moves with it.

        Adaptation that converges makes no direction sharper, so the limit is at least that of ``lambda_max``.
        """
        update = self._update
        lowered = beta.safe_alpha < self._objective.alpha and lambda_max > 0 and not update.note
        if lowered and update.scale is None and isinstance(update.coupled, float):
            return min(beta.at_safe_alpha, update.rates(lambda_max + update.coupled)[0])
        return beta.at_safe_alpha

    def failed(self, error: ArithmeticError, *, padded: bool = False) -> StabilityReport:
        """Report a measurement that failed: unresolved. ``padded``: the data holds nan."""
        reason = of_error(Kind.NAN_IN_DATA if padded else Kind.NOT_MEASURED, error, step=self._at_step)
        self._notes = [*self._given_notes, *self._operators.cache.facts.finite.values(), reason]
        return StabilityReport.unmeasured(reason, **self._common_fields())

    def _common_fields(self) -> dict[str, Any]:
        return {
            "alpha": self._objective.alpha,
            "beta": self._beta,
            "inner_steps": self._objective.inner_steps,
            "hvps": self._operators.hvps,
            "cost": self._operators.cost * self._tasks_share,
            "seconds": time.perf_counter() - self._began,
            "criterion": self._options.criterion,
            "notes": tuple(self._notes),
            "step": self._at_step,
        }

    def _exact_limit_if_finite(self, factor: float) -> tuple[Operator | None, MetaRateLimit]:
        """See `_exact_limit`; unknown if the query loss is not finite, as beyond the inner rate's own limit."""
        try:
            return self._exact_limit(factor)
        except NonFiniteProductError as error:
            if self._maml is None or any(self._operators.ranks.gather(self._maml.has_nan)):
                raise
            self._beta_note = self._beta_note or str(error)
            return None, UNKNOWN

    def _exact_limit(self, factor: float) -> tuple[Operator, MetaRateLimit]:
        """The update's Jacobian at scaled inner rates, and its ``beta_c``."""
        assert self._maml is not None
        target = self._maml.update(factor)
        if self._update.note:  # as of Adam before its first step: no product is needed
            gradient = self._operators.gradient(target)
            check_finite((_QUERY_LOSS, gradient.value))
            return gradient, UNKNOWN
        jacobian, noise = self._operators.build(META_UPDATE, target)
        limit = exact_limit(
            jacobian,
            self._maml.symmetric,
            self._update,
            self._like,
            krylov=self._options.krylov,
            noise=noise,
            value=(_QUERY_LOSS, jacobian.value),
            rate=self._beta / self._margin,
            by_task=self._by_task,
        )
        lowest = limit.lowest_direction
        if lowest is not None and is_inner_rate_at_fault(self._maml, self._operators, self._update, lowest):
            limit = MetaRateLimit(0.0, (0.0, 0.0), limit.direction, by_task=limit.by_task)
        return jacobian, limit

    def _exact_limits(self, alpha_limit: Limit, exact_beta: MetaRateLimit) -> MetaRateLimits:
        """The limits of the update as configured."""
        safe_alpha = self._safe_alpha(alpha_limit)
        known = Limit(self._beta, exact_beta.beta_c, exact_beta.interval)
        # Adaptation that diverges makes the sharpest direction sharper, adaptation that converges does not: an outer
        # rate that is safe beyond the inner rate's limit is safe at a lower inner rate.
        if not safe_alpha < self._objective.alpha or known.status(self._margin, strict=True) == SAFE:
            return MetaRateLimits(exact_beta, exact_beta.beta_c, safe_alpha)
        jacobian, limit = self._exact_limit_if_finite(safe_alpha / self._objective.alpha)
        if jacobian is not None:
            jacobian.release()
        return MetaRateLimits(exact_beta, limit.beta_c, safe_alpha)

    def _simplified_limits(self, hessian: Operator, spectrum: Spectrum, alpha_limit: Limit) -> MetaRateLimits:
        """The limits by the simplified criterion."""
        safe_alpha, alpha, rates = self._safe_alpha(alpha_limit), self._objective.alpha, self._objective.rates
        beyond = alpha_limit.ratio > 1 + 1e-12
        limit = self._simplified(hessian, spectrum, self._simplified_alpha, rates, beyond)
        if not safe_alpha < alpha:
            return MetaRateLimits(limit, limit.beta_c, safe_alpha)
        lowered = None if rates is None else {n: r * (safe_alpha / alpha) for n, r in rates.items()}
        at_safe = self._simplified(hessian, spectrum, safe_alpha, lowered, False)
        return MetaRateLimits(limit, at_safe.beta_c, safe_alpha)

    def _simplified(
        self, hessian: Operator, spectrum: Spectrum, alpha: float, rates: Params | None, collapsed: bool
    ) -> MetaRateLimit:
        blocks = self._operators.blocks
        return self._operators.over_blocks(
            lambda: simplified_limit(
                hessian,
                spectrum,
                self._update,
                self._like,
                alpha=alpha,
                rates=rates,
                inner_steps=self._objective.inner_steps,
                collapsed=collapsed,
                blocks=blocks,
                krylov=self._options.krylov,
            ),
            blocks,
            lambda found: min(found, key=lambda each: each.beta_c),
        )

    def _safe_alpha(self, alpha_limit: Limit) -> float:
        """The inner rate, brought down to ``margin`` times its limit if it is above."""
        capped = self._margin * alpha_limit.critical
        return capped if capped < self._objective.alpha else self._objective.alpha
