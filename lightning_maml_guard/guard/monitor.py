"""Measure the stability of a meta-update: where curvature and theory meet. No Lightning here."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_maml_guard._checks import check_count
from lightning_maml_guard._vectorize import TaskMap, as_float32
from lightning_maml_guard.curvature.backward import double_backward
from lightning_maml_guard.curvature.lanczos import NonFiniteProductError
from lightning_maml_guard.curvature.operators import Hessian, Params, scaled, task_hessian
from lightning_maml_guard.guard.estimate import (
    Estimator,
    Spectrum,
    check_estimator,
    hessian_spectrum,
    top_eigenvalue,
)
from lightning_maml_guard.guard.governor import scheduled_rate
from lightning_maml_guard.guard.isolation import preserved_randomness
from lightning_maml_guard.guard.meta_rate import MetaRateLimit, meta_rate_limit, outer_step
from lightning_maml_guard.guard.report import StabilityReport
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.theory.multiplier import check_rate
from lightning_maml_guard.theory.verdict import Limit, Verdict, check_margin, judge

# The poster's theorem is about simplified MAML; users of the other orders must know what its alarm means for them.
_ORDER_NOTES = {
    "exact": "(This is the poster's condition; exact MAML, which this run trains, is a different update and its inner "
    "loop diverges only beyond twice alpha_c.)",
    "first": "(This is the poster's condition; it holds for first-order MAML with one inner step.)",
}
_NAN_INTERVAL = (math.nan, math.nan)


def measure(
    problem: MetaProblem,
    *,
    beta: float | None = None,
    optimizer: Optimizer | None = None,
    criterion: str = "simplified",
    estimator: Estimator = "lanczos",
    max_iter: int = 20,
    tol: float = 1e-2,
    tasks: str = "mean",
    data: str = "support",
    margin: float = 1.0,
    step: int | None = None,
    task_map: TaskMap | None = None,
) -> StabilityReport:
    """Measure whether a problem's learning rates lie in the safe region.

    Estimates the spectrum of the task loss's Hessian and compares ``alpha`` with
    ``alpha_c = 1/lambda_max`` and ``beta`` with ``beta_c = min_i 2/(lambda_i - alpha*lambda_i^2)``, or with
    its counterpart for the optimizer as it runs (``c`` in place of 2, its preconditioner, its weight decay).
    Parameters, gradients and random states are left as they were.

    Args:
        problem: The problem.
        beta: Meta rate of plain SGD. Give this or an optimizer, or neither for the critical values alone.
        optimizer: The live optimizer, which holds ``problem.params``.
        criterion: ``"simplified"``: the poster's conditions.
        estimator: ``"lanczos"``, ``"pyhessian"`` or ``(matvec, start vector) -> eigenvalues``.
        max_iter: Lanczos (or power) steps at most.
        tol: Relative residual at which to stop.
        tasks: ``"mean"``: curvature of the mean task loss. ``"worst"``: of the sharpest task.
        data: The loss whose Hessian is measured: ``"support"``, ``"query"`` or ``"both"`` (their mean).
        margin: Fraction of the critical values that counts as the threshold.
        step: Training step, for the messages.
        task_map: How to run over the tasks; by default vmapped, ``problem.task_chunk_size`` at once.

    Returns:
        The report. Curvature that can't be measured gives ``"unresolved"`` with the reason.

    Raises:
        TypeError: If ``problem`` is not a MetaProblem.
        ValueError: If another argument is not allowed.
    """
    if not isinstance(problem, MetaProblem):
        raise TypeError(f"Expected argument `problem` to be a MetaProblem but got {type(problem).__name__}.")
    check_options(criterion=criterion, estimator=estimator, max_iter=max_iter, tol=tol, tasks=tasks, data=data)
    check_margin(margin)
    if beta is not None:
        check_rate(beta, "beta")
        if optimizer is not None:
            raise ValueError("Expected `beta` or `optimizer` but got both: the optimizer holds its own rate.")
    began = time.perf_counter()
    with preserved_randomness(), double_backward():
        measurement = _Measurement(
            problem, optimizer, beta, estimator, max_iter, tol, tasks, data, margin, step, task_map
        )
        try:
            return measurement.report(began)
        except NonFiniteProductError as error:
            return measurement.failed(str(error), began)


def check_options(*, criterion: str, estimator: Any, max_iter: int, tol: float, tasks: str, data: str) -> None:
    """Refuse measuring options that are not allowed.

    Args:
        criterion: See :func:`measure`.
        estimator: See :func:`measure`.
        max_iter: See :func:`measure`.
        tol: See :func:`measure`.
        tasks: See :func:`measure`.
        data: See :func:`measure`.

    Raises:
        ValueError: If one is not allowed, or if two do not go together.
    """
    for name, value, allowed in (
        ("criterion", criterion, ("simplified",)),
        ("tasks", tasks, ("mean", "worst")),
        ("data", data, ("support", "query", "both")),
    ):
        if value not in allowed:
            raise ValueError(f"Expected argument `{name}` to be one of {allowed} but got {value!r}.")
    check_estimator(estimator)
    if tasks == "worst" and estimator != "lanczos":
        raise ValueError(
            f"tasks='worst' needs estimator='lanczos' but got {estimator!r}: the others treat one Hessian at a time."
        )
    check_count("max_iter", max_iter)
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
        raise ValueError(f"Expected argument `tol` to be a number between 0 and 1 but got {tol!r}.")


class _Measurement:
    """One measurement in progress."""

    def __init__(
        self,
        problem: MetaProblem,
        optimizer: Optimizer | None,
        beta: float | None,
        estimator: Estimator,
        max_iter: int,
        tol: float,
        tasks: str,
        data: str,
        margin: float,
        step: int | None,
        task_map: TaskMap | None,
    ) -> None:
        self.problem, self.estimator, self.margin, self.step = problem, estimator, margin, step
        self.max_iter, self.tol = max_iter, tol
        self.alpha = problem.alpha
        # The poster's condition is about one step; K simplified steps act as K*alpha (theory.rates).
        self.inner_steps = problem.inner_steps if problem.order == "simplified" else 1
        self.outer = outer_step(optimizer, problem.params)
        self.beta = scheduled_rate(optimizer) if optimizer is not None else math.nan if beta is None else float(beta)
        self.plain_sgd = optimizer is None or (self.outer.limit == 2.0 and self.outer.scale is None)
        self.params: Params = as_float32({name: value.detach() for name, value in problem.params.items()})
        self.like = next(iter(self.params.values())).new_empty(())
        self.blocks = problem.tasks if tasks == "worst" else None
        self.data = as_float32(
            {"support": (problem.support,), "query": (problem.query,)}.get(data, (problem.support, problem.query))
        )
        self.task_map = task_map or TaskMap(problem.task_chunk_size)
        self.alpha_note = ""
        self.hvps = 0

    def _task_loss(self, params: Params, sets: tuple[Any, ...]) -> Tensor:
        return sum(self.problem.task_loss(params, each) for each in sets) / len(sets)  # type: ignore[return-value]

    def _mean_loss(self, params: Params) -> Tensor:
        return self.task_map(self._task_loss, params, self.data, in_dims=(None, 0)).mean()

    def report(self, began: float) -> StabilityReport:
        hessian = task_hessian(
            self._task_loss,
            self.params,
            self.data,
            per_task=self.blocks is not None,
            tasks=self.task_map,
            count=self.problem.tasks,
        )
        if not bool(torch.isfinite(hessian.value)):
            raise NonFiniteProductError(f"The task loss is {float(hessian.value)} at these parameters and this batch.")
        spectrum = hessian_spectrum(
            hessian,
            self._mean_loss,
            self.params,
            estimator=self.estimator,
            blocks=self.blocks,
            alpha=self.alpha * self.inner_steps,
            max_iter=self.max_iter,
            tol=self.tol,
        )
        self.hvps = spectrum.matvecs
        rates = None if self.problem.uniform else self.problem.rates()
        known = spectrum.rates(self.alpha, self.inner_steps)
        alpha_limit = Limit(self.alpha, known.alpha_c, known.alpha_c_interval)
        if rates is not None:
            alpha_limit = self._alpha_limit_by_parameter(hessian, rates)
        beta_limit = self._beta_limit(hessian, spectrum, self.alpha, rates, alpha_limit.ratio > 1 + 1e-12)
        capped = self.margin * alpha_limit.critical
        safe_alpha = capped if capped < self.alpha else self.alpha
        at_safe = beta_limit
        if safe_alpha < self.alpha:
            lowered = None if rates is None else {n: r * (safe_alpha / self.alpha) for n, r in rates.items()}
            at_safe = self._beta_limit(hessian, spectrum, safe_alpha, lowered, False)
        flat = known.lambda_max == 0 and known.lambda_min == 0
        verdict = self._judge(alpha_limit, beta_limit, flat)
        return self._report(
            began,
            alpha_c=alpha_limit.critical,
            beta_c=beta_limit.beta_c,
            sgd_beta_c=known.beta_c if rates is None else math.nan,
            lambda_max=known.lambda_max,
            lambda_min=known.lambda_min,
            status=verdict.status,
            reasons=verdict.reasons,
            alpha_status=verdict.alpha_status,
            beta_status=verdict.beta_status,
            safe_alpha=safe_alpha,
            safe_beta=self.beta if math.isnan(at_safe.beta_c) else min(self.beta, self.margin * at_safe.beta_c),
            safe_beta_c=at_safe.beta_c,
            lambda_max_interval=known.lambda_max_interval,
            alpha_c_interval=alpha_limit.interval,
            beta_c_interval=beta_limit.interval,
            spectrum=spectrum,
            notices=verdict.reasons if flat else (self.outer.note,) if self.outer.lasting else (),
        )

    def _alpha_limit_by_parameter(self, hessian: Hessian, rates: Params) -> Limit:
        """Rates ``A`` by parameter: the condition is ``lambda_max(A^(1/2) H A^(1/2)) <= 1`` (``1/K`` simplified)."""
        if any(bool((rate < 0).any()) for rate in rates.values()):
            self.alpha_note = "a learned inner rate is negative, and the condition is about rates of at least 0."
            return Limit(self.alpha, math.nan, _NAN_INTERVAL)
        before = hessian.matvecs
        weights = hessian.layout.flatten(as_float32(rates)).to(self.like) * self.inner_steps
        top, (low, high), _ = top_eigenvalue(
            scaled(hessian, weights), hessian.layout.size, self.like, self.blocks, max_iter=self.max_iter, tol=self.tol
        )
        self.hvps += hessian.matvecs - before
        ends = [self.alpha / end if end > 0 else math.inf for end in (high, top, low)]
        return Limit(self.alpha, ends[1], (ends[0], ends[2]))

    def _beta_limit(
        self, hessian: Hessian, spectrum: Spectrum, alpha: float, rates: Params | None, collapsed: bool
    ) -> MetaRateLimit:
        limit = meta_rate_limit(
            hessian,
            spectrum,
            self.outer,
            self.like,
            alpha=alpha,
            rates=rates,
            inner_steps=self.inner_steps,
            collapsed=collapsed,
            blocks=self.blocks,
            max_iter=self.max_iter,
            tol=self.tol,
        )
        self.hvps += limit.hvps
        return limit

    def _judge(self, alpha: Limit, beta: MetaRateLimit, flat: bool) -> Verdict:
        cost = f"{self.hvps} Hessian-vector products" + ("" if self.step is None else f", step {self.step}")
        if flat:
            reason = (
                f"The loss has no curvature at these parameters and this batch ({cost}), so no limit follows; that is "
                "not the same as safe. ReLU networks with dead units and losses that are linear look like this."
            )
            return Verdict("unresolved", "unresolved", "unresolved", (reason,))
        growth = abs(1 - 2 * self.beta / beta.beta_c) if self.plain_sgd and beta.beta_c > 0 else None
        return judge(
            alpha,
            None if math.isnan(self.beta) else Limit(self.beta, beta.beta_c, beta.interval),
            margin=self.margin,
            growth=growth,
            cost=cost,
            beta_note=self.outer.note,
            alpha_note=self.alpha_note or _ORDER_NOTES.get(self.problem.order, ""),
        )

    def failed(self, reason: str, began: float) -> StabilityReport:
        said = f"The curvature could not be measured: {reason}"
        return self._report(
            began,
            alpha_c=math.nan,
            beta_c=math.nan,
            sgd_beta_c=math.nan,
            lambda_max=math.nan,
            lambda_min=math.nan,
            status="unresolved",
            reasons=(said,),
            notices=(said,),
            alpha_status="unresolved",
            beta_status="unresolved",
            safe_alpha=self.alpha,
            safe_beta=self.beta,
            safe_beta_c=math.nan,
            lambda_max_interval=_NAN_INTERVAL,
            alpha_c_interval=_NAN_INTERVAL,
            beta_c_interval=_NAN_INTERVAL,
            spectrum=Spectrum(),
        )

    def _report(self, began: float, **found: Any) -> StabilityReport:
        return StabilityReport(
            alpha=self.alpha,
            beta=self.beta,
            exact_beta_c=math.nan,
            inner_steps=self.inner_steps,
            hvps=self.hvps,
            seconds=time.perf_counter() - began,
            step=self.step,
            alpha_applied=self.alpha,
            beta_applied=self.beta,
            **found,
        )
