"""RateSuggestion: what was found before training, in words and as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from lightning_maml_guard import plots
from lightning_maml_guard.messages.reasons import Reason
from lightning_maml_guard.messages.sentences import sentences
from lightning_maml_guard.messages.spelling import block
from lightning_maml_guard.plots.style import LIMIT_COLOUR, MARKER_COLOUR, MARKER_EDGE
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import EDGE, UNRESOLVED


@dataclass(frozen=True)
class RateSuggestion:
    """The critical rates at initialisation, and a pair of rates inside them.

    Attributes:
        alpha: Suggested inner rate, ``margin * alpha_c``; ``nan`` in plain training.
        beta: Suggested meta rate, ``margin`` times the smaller of ``beta_c`` and ``beta_c_noise``, halved until a
            lookahead survives; ``nan`` where theory gives none (Adam and its kin before their first step, curvature
            that could not be measured): ``notices`` say why.
        alpha_c: Smallest critical inner rate over the batches, as configured.
        beta_c: Smallest critical meta rate over the batches, at the suggested ``alpha``.
        beta_c_noise: Smallest meta rate over the batches below which the mean square shrinks when every step draws new
            tasks, at the suggested ``alpha``; ``nan`` where every step has the same, or one.
        configured_alpha: The module's inner rate; ``nan`` in plain training.
        configured_beta: The optimizer's rate, before a scheduler warms it up.
        status: Of the configured rates, by the batch nearest to its limits and a lookahead as a guard makes it:
            ``"safe"``, ``"edge"``, ``"unsafe"`` or ``"unresolved"``.
        findings: Why, and what to do, as data; ``reasons`` has them in words.
        margin: Fraction of the critical values that is suggested.
        notes: What the reader of the suggestion should know, as data; ``notices`` has it in words.
        reports: The measurement of each batch with the rates as configured; ``step`` is the batch's number.
        suggested_reports: The measurement of each batch at the suggested ``alpha``.
        lookahead: Loss before and after the next steps, tried on copies at the suggested rates (the configured meta
            rate where none is suggested); ``nan`` without a lookahead.
        lookahead_steps: Number of those steps.
    """

    alpha: float
    beta: float
    alpha_c: float
    beta_c: float
    beta_c_noise: float
    configured_alpha: float
    configured_beta: float
    status: str
    findings: tuple[Reason, ...]
    margin: float
    notes: tuple[Reason, ...]
    reports: tuple[StabilityReport, ...]
    suggested_reports: tuple[StabilityReport, ...]
    lookahead: tuple[float, float]
    lookahead_steps: int

    @property
    def reasons(self) -> tuple[str, ...]:
        """The findings in words."""
        return sentences(self.findings)

    @property
    def notices(self) -> tuple[str, ...]:
        """The notes in words."""
        return sentences(self.notes)

    def suggestion(self) -> tuple[float, float]:
        """Give the suggested pair, as Lightning's learning-rate finder gives its rate.

        Returns:
            ``(alpha, beta)``; ``nan`` for one that is not suggested.
        """
        return self.alpha, self.beta

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the safe region of every batch, with the configured and the suggested rates.

        The filled region is that of the batch with the smallest limits. Where no limit of the optimizer is known yet,
        the region is that of the simplified criterion for plain SGD.

        Args:
            ax: Axes to draw on (default: a new figure).

        Returns:
            ``(fig, ax)``.

        Raises:
            ValueError: In plain training, or if no batch had a finite limit.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        if math.isnan(self.configured_alpha):
            raise ValueError(
                f"Plain training has no inner rate, so there is no region to draw but got plot() of one: beta_c = "
                f"{self.beta_c:.3g} is its only limit. Print the suggestion instead."
            )
        # Without their meta rate: what is marked are the configured and the suggested pair, not the mixture measured.
        measured = [replace(report, beta=math.nan) for report in self.suggested_reports]
        measured.sort(key=lambda report: -_reach(report))
        figure, axes = plots.safe_region(measured, ax, rates=[self.beta, self.configured_beta], which="smallest")
        if len(measured) > 1:
            figure.axes[-1].set(ylabel="batch", yticks=range(len(measured)))
        beta, name = self.beta, "suggested rates"
        if math.isnan(beta):
            beta, name = self.configured_beta, "suggested alpha, configured beta"
        marks = {"edgecolors": MARKER_EDGE, "linewidths": 0.6, "zorder": 7}
        axes.scatter(self.configured_alpha, self.configured_beta, color=MARKER_COLOUR, s=36, **marks)
        axes.scatter(self.alpha, beta, marker="*", s=180, color=LIMIT_COLOUR, label=name, **marks)
        axes.set_title("Safe region before training")
        axes.legend(loc="best", frameon=True, framealpha=0.9)
        return figure, axes

    def __str__(self) -> str:
        over = _counted(len(self.reports), "batch", "batches")
        lines = [f"Rates before training, over {over} (the smallest limits count; margin {self.margin:g}):"]
        if not math.isnan(self.configured_alpha):
            lines.append(
                f"  inner rate alpha: configured {self.configured_alpha:.3g}, alpha_c {self.alpha_c:.3g}, "
                f"suggested {self.alpha:.3g}"
            )
        beta_c = f"beta_c {self.beta_c:.3g}" if not math.isnan(self.beta_c) else "beta_c not known"
        if not math.isnan(self.beta_c_noise):
            beta_c += f" ({self.beta_c_noise:.3g} while every step draws new tasks)"
        where = "" if math.isnan(self.configured_alpha) else " at the suggested alpha"
        said = f"suggested {self.beta:.3g}" if not math.isnan(self.beta) else "none suggested"
        kind = "learning rate beta" if math.isnan(self.configured_alpha) else "meta rate beta"
        lines.append(f"  {kind}: configured {self.configured_beta:.3g}, {beta_c}{where}, {said}")
        if not math.isnan(self.lookahead[0]):
            beta = self.configured_beta if math.isnan(self.beta) else self.beta
            pair = f"beta = {beta:.3g}" if math.isnan(self.alpha) else f"alpha = {self.alpha:.3g} and beta = {beta:.3g}"
            lines.append(
                f"  {_counted(self.lookahead_steps, 'step', 'steps')} tried on copies at {pair}: the loss goes from "
                f"{self.lookahead[0]:.3g} to {self.lookahead[1]:.3g}"
            )
        words = {EDGE: "are at the edge", UNRESOLVED: "could not be judged in full"}
        state = words.get(self.status, f"are {self.status}")
        # What keeps a rate from being judged also keeps it from being suggested: said once.
        told = {note.because.key for note in self.notes if note.because is not None}
        verdict = sentences([each for each in self.findings if each.key not in told])
        ending = [" ".join([f"The configured rates {state}.", *verdict]), *self.notices]
        return "\n".join([*lines, *map(block, ending)])


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _reach(report: StabilityReport) -> float:
    limits = [limit for limit in (report.alpha_c, report.safe_beta_c) if math.isfinite(limit)]
    return math.prod(limits) if limits else math.inf
