"""StabilityReport: what one measurement found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_maml_guard.messages.advice import Advice
from lightning_maml_guard.messages.reasons import UNKNOWN_INTERVAL, Reason
from lightning_maml_guard.messages.sentences import sentences
from lightning_maml_guard.messages.spelling import two_digits
from lightning_maml_guard.stability.estimators import Spectrum
from lightning_maml_guard.theory.limits import EDGE, UNRESOLVED, Limit
from lightning_maml_guard.theory.multiplier import Interval
from lightning_maml_guard.theory.ritz import ritz_pairs


@dataclass(frozen=True, kw_only=True)
class StabilityReport:
    """What one measurement found. Numbers, strings and tuples of them: picklable.

    Attributes:
        alpha: Configured inner rate (the largest, if there are several); ``nan`` in plain training.
        alpha_c: Its critical value.
        beta: Configured outer rate (the largest over parameter groups); ``nan`` if none was given.
        beta_c: Its critical value for the optimizer as it runs; ``nan`` if no statement can be made.
        sgd_beta_c: The simplified criterion's ``beta_c`` for plain SGD, whatever the optimizer.
        exact_beta_c: The critical outer rate of the update as configured, from its Jacobian; ``nan`` where it was not
            measured, as under ``criterion="simplified"``.
        lambda_max: Largest eigenvalue of the Hessian.
        lambda_min: Smallest Ritz value seen.
        status: ``"safe"``, ``"unsafe"`` or ``"unresolved"``.
        findings: Why, and what to do, as data; :attr:`reasons` has them in words.
        alpha_status: The status of the inner rate alone.
        beta_status: The status of the outer rate alone.
        safe_alpha: Inner rate brought down to ``margin * alpha_c``.
        safe_beta: Outer rate brought down to ``margin * beta_c`` *at* ``safe_alpha``.
        safe_beta_c: That ``beta_c``; it equals ``beta_c`` while ``alpha`` is safe, and, a lower bound then, where
            ``beta`` is safe though ``alpha`` is not (``criterion="exact"``).
        lambda_max_interval: Where ``lambda_max`` lies.
        alpha_c_interval: Where ``alpha_c`` lies.
        beta_c_interval: Where ``beta_c`` lies.
        spectrum: What is known of the Hessian's spectrum.
        inner_steps: Number of inner steps that ``alpha`` stands for in the simplified criterion.
        hvps: Hessian-vector products used.
        seconds: Wall time.
        exact_beta_c_interval: Where ``exact_beta_c`` lies.
        beta_c_noise: Outer rate below which the mean square shrinks when the tasks are drawn anew at every step;
            ``nan`` for a single task and under ``criterion="simplified"``.
        mean_alpha_c: With ``tasks="worst"``, the ``alpha_c`` of the mean task loss; else ``nan``.
        predicted_change: Change of the meta loss that the coming step ``u`` predicts, ``-1/2 (g + g').u`` with the
            gradients before and after it; of MAML ``nan`` under ``criterion="simplified"``.
        criterion: Whose conditions the status is about: ``"simplified"`` or ``"exact"``.
        notes: What keeps a rate from being judged and will last, as data; :attr:`notices` has it in words.
        step: Training step, if the caller gave one.
        advice: What to set, if a rate is unsafe: half of its limit. None while there is nothing to say.
        cost: What the measurement is counted as, in training steps, where a guard's ``max_cost`` is to be kept: more
            than it takes for most networks.
    """

    alpha: float
    alpha_c: float
    beta: float
    beta_c: float
    sgd_beta_c: float
    exact_beta_c: float
    lambda_max: float
    lambda_min: float
    status: str
    findings: tuple[Reason, ...]
    alpha_status: str
    beta_status: str
    safe_alpha: float
    safe_beta: float
    safe_beta_c: float
    lambda_max_interval: Interval
    alpha_c_interval: Interval
    beta_c_interval: Interval
    spectrum: Spectrum
    inner_steps: int
    hvps: int
    seconds: float
    exact_beta_c_interval: Interval = UNKNOWN_INTERVAL
    beta_c_noise: float = math.nan
    mean_alpha_c: float = math.nan
    predicted_change: float = math.nan
    criterion: str = "simplified"
    notes: tuple[Reason, ...] = ()
    step: int | None = None
    cost: float = math.nan
    advice: Advice | None = None

    @classmethod
    def unmeasured(cls, reason: Reason, *, alpha: float, beta: float, **known: Any) -> StabilityReport:
        """Make the report of a measurement that failed: unresolved, for that reason.

        Args:
            reason: Why there are no critical values.
            alpha: Inner rate as configured.
            beta: Outer rate as configured.
            known: Other fields that are known.

        Returns:
            The report; what is not known is ``nan``.
        """
        unknown = ("alpha_c", "beta_c", "sgd_beta_c", "exact_beta_c", "lambda_max", "lambda_min", "safe_beta_c")
        values: dict[str, Any] = dict.fromkeys(unknown, math.nan)
        values |= dict.fromkeys(("lambda_max_interval", "alpha_c_interval", "beta_c_interval"), UNKNOWN_INTERVAL)
        values |= dict.fromkeys(("status", "alpha_status", "beta_status"), UNRESOLVED)
        values |= {"alpha": alpha, "beta": beta, "safe_alpha": alpha, "safe_beta": beta, "findings": (reason,)}
        values |= {"spectrum": Spectrum(), "inner_steps": 1, "hvps": 0, "seconds": 0.0, "cost": 0.0}
        return cls(**(values | known))

    def __str__(self) -> str:
        """Sum the report up in a few lines; ``repr`` has every field."""
        where = "" if self.step is None else f" at step {self.step}"
        lines = [f"{type(self).__name__}{where}: {self.status} (criterion={self.criterion!r})"]
        lines += [self._rate_line(name) for name in ("alpha", "beta") if not math.isnan(getattr(self, name))]
        lines.append(
            f"  lambda_max = {self.lambda_max:.3g}, lambda_min = {self.lambda_min:.3g}; {self.hvps} Hessian-vector "
            f"products, {two_digits(self.seconds)} s"
        )
        to_do = [] if self.advice is None else [f"  To do: {self.advice}"]
        return "\n".join([*lines, *(f"  {reason}" for reason in self.reasons), *to_do])

    def _rate_line(self, name: str) -> str:
        rate, critical, ratio = getattr(self, name), getattr(self, f"{name}_c"), getattr(self, f"{name}_ratio")
        if math.isnan(critical):
            return f"  {name} = {rate:.3g}, {name}_c not known"
        low, high = getattr(self, f"{name}_c_interval")
        return f"  {name} = {rate:.3g}, {two_digits(ratio)} of {name}_c = {critical:.3g} ({low:.3g} to {high:.3g})"

    @property
    def reasons(self) -> tuple[str, ...]:
        """The findings in words: why the status is what it is, and what to do unless ``advice`` says it."""
        return sentences(self.findings, advised=self.is_told_what_to_do)

    @property
    def is_told_what_to_do(self) -> bool:
        """Whether nothing is left to say of what to do: ``advice`` says it, or the run survives its next steps."""
        return self.advice is not None or self.status == EDGE

    @property
    def notices(self) -> tuple[str, ...]:
        """The notes in words."""
        return sentences(self.notes)

    @property
    def alpha_ratio(self) -> float:
        """``alpha / alpha_c``: above 1 is unsafe."""
        return Limit(self.alpha, self.alpha_c, self.alpha_c_interval).ratio

    @property
    def simplified_alpha_c(self) -> float:
        """``1/lambda_max`` (of ``K`` simplified steps a ``K``-th), whatever the criterion."""
        if math.isnan(self.alpha):
            return math.nan
        return 1 / (self.inner_steps * self.lambda_max) if self.lambda_max > 0 else math.inf

    @property
    def beta_ratio(self) -> float:
        """``beta / beta_c``: 1 and above is unsafe; ``nan`` where either is not known."""
        return Limit(self.beta, self.beta_c, self.beta_c_interval).ratio

    def ritz(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Read the Ritz values of the Hessian and their weights.

        Returns:
            The values in ascending order, and the share of the random start vector each stands for: an estimate, from
            one probe, of the share of the eigenvalues there. Weights sum to 1; over several runs they are averaged. An
            estimator that returns eigenvalues alone gives them equal weights.
        """
        spectrum = self.spectrum
        if spectrum.power is not None:
            pairs = [(value, 1.0) for value in {spectrum.power.lambda_min, spectrum.power.lambda_max}]
        elif spectrum.values:
            pairs = [(value, 1.0) for value in spectrum.values]
        else:
            runs = [ritz_pairs(*run) for run in spectrum.runs]
            pairs = [
                (float(v), float(w)) for values, vectors in runs for v, w in zip(values, vectors[0] ** 2, strict=True)
            ]
        pairs = sorted(pair for pair in pairs if math.isfinite(pair[0]))
        total = sum(weight for _, weight in pairs)
        return tuple(value for value, _ in pairs), tuple(weight / total for _, weight in pairs)
