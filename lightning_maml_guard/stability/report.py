"""StabilityReport: what one measurement found, and how a checkpoint keeps it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_maml_guard.linalg.lanczos import Tridiagonal
from lightning_maml_guard.linalg.pyhessian import PowerIteration
from lightning_maml_guard.stability.estimators import Spectrum
from lightning_maml_guard.theory.limits import Limit
from lightning_maml_guard.theory.multiplier import Interval
from lightning_maml_guard.theory.ritz import ritz_pairs


@dataclass(frozen=True)
class StabilityReport:
    """What one measurement found. Floats, strings and tuples of them: picklable.

    Attributes:
        alpha: Configured inner rate (the largest, if there are several); ``nan`` in plain training.
        alpha_c: Its critical value.
        beta: Configured meta rate (the largest over parameter groups); ``nan`` if none was given.
        beta_c: Its critical value for the optimizer as it runs; ``nan`` if no statement can be made.
        sgd_beta_c: The poster's ``beta_c``: for plain SGD, whatever the optimizer.
        exact_beta_c: The critical meta rate of the update as configured, from its Jacobian; ``nan`` where it was not
            measured.
        lambda_max: Largest eigenvalue of the Hessian.
        lambda_min: Smallest Ritz value seen.
        status: ``"safe"``, ``"unsafe"`` or ``"unresolved"``; from a guard that tries the coming steps also ``"edge"``:
            a rate exceeds its critical value and the coming steps do not lead away (the edge of stability).
        reasons: Why, and what to do.
        alpha_status: The status of the inner rate alone.
        beta_status: The status of the meta rate alone.
        safe_alpha: Inner rate brought down to ``margin * alpha_c``.
        safe_beta: Meta rate brought down to ``margin * beta_c`` *at* ``safe_alpha``.
        safe_beta_c: That ``beta_c``; it equals ``beta_c`` while ``alpha`` is safe.
        lambda_max_interval: Where ``lambda_max`` lies.
        alpha_c_interval: Where ``alpha_c`` lies.
        beta_c_interval: Where ``beta_c`` lies.
        spectrum: What is known of the Hessian's spectrum.
        inner_steps: Number of inner steps the poster's ``alpha`` stands for.
        hvps: Hessian-vector products used.
        seconds: Wall time.
        exact_beta_c_interval: Where ``exact_beta_c`` lies.
        beta_c_noise: Meta rate below which the mean square shrinks when the tasks are drawn anew at every step;
            ``nan`` for a single task.
        mean_alpha_c: With ``tasks="worst"``, the ``alpha_c`` of the mean task loss; else ``nan``.
        predicted_change: Change of the meta loss the coming step predicts, ``-g.u + 1/2 u.J.u``.
        criterion: Whose conditions the status is about: ``"simplified"`` or ``"exact"``.
        notices: What keeps a rate from being judged and will not pass by itself; worth saying once.
        step: Training step, if the caller gave one.
        alpha_applied: Inner rate applied after this measurement; ``alpha`` unless a guard capped it.
        beta_applied: Meta rate applied after this measurement.
        severity: Where the guard tried the coming steps, ``log(loss after them / loss training started from)``.
        growth: Factor a step by which the loss grew in that trial.
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
    reasons: tuple[str, ...]
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
    exact_beta_c_interval: Interval = (math.nan, math.nan)
    beta_c_noise: float = math.nan
    mean_alpha_c: float = math.nan
    predicted_change: float = math.nan
    criterion: str = "simplified"
    notices: tuple[str, ...] = ()
    step: int | None = None
    alpha_applied: float = math.nan
    beta_applied: float = math.nan
    severity: float = math.nan
    growth: float = math.nan
    cost: float = math.nan

    def __str__(self) -> str:
        """Sum the report up in a few lines; ``repr`` has every field."""
        where = "" if self.step is None else f" at step {self.step}"
        lines = [f"StabilityReport{where}: {self.status} (criterion={self.criterion!r})"]
        for name in ("alpha", "beta"):
            rate, critical = getattr(self, name), getattr(self, f"{name}_c")
            if math.isnan(rate):
                continue
            capped = f"; {applied}" if (applied := applied_instead(self, name)) else ""
            if math.isnan(critical):
                lines.append(f"  {name} = {rate:.3g}, {name}_c not known{capped}")
            else:
                low, high = getattr(self, f"{name}_c_interval")
                ratio = getattr(self, f"{name}_ratio")
                lines.append(
                    f"  {name} = {rate:.3g}, {ratio:.2g} of {name}_c = {critical:.3g} ({low:.3g} to {high:.3g}){capped}"
                )
        lines.append(
            f"  lambda_max = {self.lambda_max:.3g}, lambda_min = {self.lambda_min:.3g}; {self.hvps} Hessian-vector "
            f"products, {self.seconds:.2g} s"
        )
        return "\n".join([*lines, *(f"  {reason}" for reason in self.reasons)])

    @property
    def alpha_ratio(self) -> float:
        """``alpha / alpha_c``: above 1 is unsafe."""
        return Limit(self.alpha, self.alpha_c, self.alpha_c_interval).ratio

    @property
    def poster_alpha_c(self) -> float:
        """The poster's ``alpha_c = 1/lambda_max`` (of ``K`` simplified steps a ``K``-th), whatever the criterion."""
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


def applied_instead(report: StabilityReport, name: str) -> str:
    """Say which rate is applied in place of the configured one.

    Args:
        report: The report.
        name: ``"alpha"`` or ``"beta"``.

    Returns:
        ``"applied 0.1"``, say; empty where the rate is applied as configured.
    """
    applied = getattr(report, f"{name}_applied")
    return f"applied {applied:.3g}" if applied < getattr(report, name) else ""


def to_plain(report: StabilityReport) -> dict[str, Any]:
    """Convert a report to dicts, lists and numbers.

    Args:
        report: The report.

    Returns:
        Its fields.
    """
    plain = asdict(report)
    spectrum = report.spectrum
    plain["spectrum"] = {
        "runs": [[list(part) for part in run] for run in spectrum.runs],
        "power": None if spectrum.power is None else list(spectrum.power),
        "values": list(spectrum.values),
        "rounding": spectrum.rounding,
        "matvecs": spectrum.matvecs,
        "resolution": spectrum.resolution,
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def from_plain(plain: dict[str, Any]) -> StabilityReport:
    """Restore a report; fields of a newer or older version that are not known here are left out.

    Args:
        plain: What :func:`to_plain` made.

    Returns:
        The report.
    """
    known = {field.name for field in fields(StabilityReport)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in plain.items() if name in known
    }
    spectrum = dict(plain["spectrum"])
    power = spectrum.get("power")
    values["spectrum"] = Spectrum(
        runs=tuple(Tridiagonal(tuple(main), tuple(off)) for main, off in spectrum.get("runs", [])),
        power=None if power is None else PowerIteration(*power),
        values=tuple(spectrum.get("values", ())),
        rounding=spectrum.get("rounding", 0.0),
        matvecs=spectrum.get("matvecs", 0),
        resolution=spectrum.get("resolution", 0.0),
    )
    return StabilityReport(**values)
