"""RateSuggestion: what was found before training, in words and as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_maml_guard import plots
from lightning_maml_guard.messages.reasons import Reason
from lightning_maml_guard.messages.sentences import sentences
from lightning_maml_guard.messages.spelling import block
from lightning_maml_guard.phase.ladder import RateLadder
from lightning_maml_guard.plots.style import LIMIT_COLOUR, MARKER_COLOUR, MARKER_EDGE, axes_side_by_side
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import EDGE, UNRESOLVED


@dataclass(frozen=True)
class RateSuggestion:
    """A pair of rates that trains, and the critical rates at initialisation.

    Attributes:
        alpha: Suggested inner rate; ``nan`` in plain training.
        beta: Suggested outer rate, where the loss is lowest up to ``margin`` times the largest that trains at that
            inner rate; under a schedule its peak. ``nan`` where no rates could be tried or none trains: ``notices``
            say why.
        alpha_c: Smallest critical inner rate over the batches, as configured.
        beta_c: Smallest critical outer rate over the batches, at the suggested ``alpha``; ``nan`` where it is not known
            (Adam and its kin before their first step, curvature that could not be measured).
        beta_c_noise: Smallest outer rate over the batches below which the mean square shrinks when every step draws new
            tasks, at the suggested ``alpha``; ``nan`` where every step has the same, or one.
        configured_alpha: The module's inner rate; ``nan`` in plain training.
        configured_beta: The optimizer's rate, before a scheduler warms it up.
        status: Of the configured rates, by the batch nearest to its limits and a lookahead as a guard makes it:
            ``"safe"``, ``"edge"``, ``"unsafe"`` or ``"unresolved"``.
        findings: Why, and what to do, as data; ``reasons`` has them in words.
        margin: Share of the largest outer rate that trains above which none is suggested.
        notes: What the reader of the suggestion should know, as data; ``notices`` has it in words.
        reports: The measurement of each batch with the rates as configured; ``step`` is the batch's number.
        suggested_reports: The measurement of each batch at the suggested ``alpha``.
        ladder: The rates that were tried; None where none were.
        losses: Loss before training and after ``ladder.race_steps`` steps at the suggested pair; ``nan`` without one.
        setting: The argument that ``beta`` is for: ``"lr"``, or a cyclic schedule's ``"max_lr"``.
        seconds: Wall time of it all.
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
    ladder: RateLadder | None
    losses: tuple[float, float]
    setting: str = "lr"
    seconds: float = math.nan

    @property
    def reasons(self) -> tuple[str, ...]:
        """The findings in words; what to do is what is suggested."""
        return sentences(self.findings, advised=not math.isnan(self.beta))

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

    def apply(self, module: Any, alpha: str | None = None, beta: str | None = None) -> None:
        """Set the pair in a module, before ``trainer.fit``; also in its ``hparams``, where those hold the rates.

        Of a ``MetaLearningModule`` the inner rates (learned ones and those of each step keep their proportions) and
        the rate of the optimizer that it makes, whose groups keep theirs. Of another module the attributes, its own or
        of its ``hparams``, that ``configure_optimizers`` and the training step read.

        Args:
            module: The module.
            alpha: Name of the inner rate (default: ``inner_lr``, else ``alpha``).
            beta: Name of the learning rate (default: ``lr``, else ``learning_rate``).

        Raises:
            ValueError: If there is no such attribute, or nothing is suggested.
        """
        from lightning_maml_guard.tuner.applied import apply_rates  # which needs Lightning

        apply_rates(self, module, alpha, beta)

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the loss over ``beta`` for each ``alpha`` that was tried, with the suggestion marked.

        Beside it, where ``ax`` is not given, the safe region of every batch, with the configured and the suggested
        rates. The filled region is that of the batch with the smallest limits. Where no limit of the optimizer is known
        yet, the region is that of the simplified criterion for plain SGD.

        Args:
            ax: Axes for the ladder (default: a new figure).

        Returns:
            ``(fig, ax)`` of the ladder; the safe region's axes are ``fig.axes[1]``.

        Raises:
            ValueError: If no rates were tried.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        if self.ladder is None:
            raise ValueError("There is no ladder to draw: no rates were tried. Print the suggestion, which says why.")
        beside = None
        if ax is None:
            regions = not math.isnan(self.configured_alpha) and any(map(_has_limits, self.suggested_reports))
            ax, beside = axes_side_by_side(2 if regions else 1)
        figure, axes = plots.rate_ladder(self.ladder, self.suggestion(), ax)
        if beside is not None:
            self._draw_region(beside)
        return figure, axes

    def _draw_region(self, ax: Any) -> None:
        # Without their outer rate: what is marked are the configured and the suggested pair, not the mixture measured.
        measured = [replace(report, beta=math.nan) for report in self.suggested_reports]
        measured.sort(key=lambda report: -_reach(report))
        rates = [self.beta, self.configured_beta]
        figure, axes = plots.safe_region(measured, ax, rates=rates, which="smallest", others="other batches")
        if len(measured) > 1:
            figure.axes[-1].set(ylabel="batch", yticks=range(len(measured)))
        marks = {"edgecolors": MARKER_EDGE, "linewidths": 0.6, "zorder": 7}
        axes.scatter(self.configured_alpha, self.configured_beta, color=MARKER_COLOUR, s=36, **marks)
        if not math.isnan(self.beta):
            star = {"marker": "*", "s": 180, "color": LIMIT_COLOUR, "label": "suggested rates"}
            axes.scatter(self.alpha, self.beta, **star, **marks)
        axes.set_title("Critical values before training")
        axes.legend(loc="best", frameon=True, framealpha=0.9)

    def __str__(self) -> str:
        over = _counted(len(self.reports), "batch", "batches")
        tried = "no rates were tried"
        if self.ladder is not None:
            pairs = int(np.isfinite(self.ladder.alphas).sum() or 1) * len(self.ladder.betas)
            tried = f"{self.ladder.taken} steps at up to {pairs} pairs of rates on copies, {self.seconds:.1f} s"
        lines = [f"Rates before training ({tried}; critical values over {over}):"]
        if not math.isnan(self.configured_alpha):
            lines.append(
                f"  inner rate alpha: configured {self.configured_alpha:.3g}, alpha_c {self.alpha_c:.3g}, "
                f"suggested {self.alpha:.3g}"
            )
        where = "" if math.isnan(self.configured_alpha) else " at the suggested alpha"
        beta_c = f"beta_c {self.beta_c:.3g}{where}" if not math.isnan(self.beta_c) else "beta_c not known"
        if not math.isnan(self.beta_c_noise):
            beta_c += f" ({self.beta_c_noise:.3g} while every step draws new tasks)"
        said = "none suggested"
        if self.ladder is not None and self.ladder.best is not None:
            said = f"largest that trains {self.ladder.largest[self.ladder.best]:.3g}, suggested {self.beta:.3g}"
        kind = "learning rate beta" if math.isnan(self.configured_alpha) else "outer rate beta"
        lines.append(f"  {kind}: configured {self.configured_beta:.3g}, {beta_c}, {said}")
        if self.ladder is not None and not math.isnan(self.losses[0]):
            on = "the batches trained on" if self.ladder.repeated else "batches not trained on"
            lines.append(
                f"  at the suggested {'rate' if math.isnan(self.alpha) else 'pair'} the loss of {on} goes from "
                f"{self.losses[0]:.3g} to {self.losses[1]:.3g} in {self.ladder.race_steps} steps"
            )
        words = {EDGE: "are at the edge", UNRESOLVED: "could not be judged in full"}
        state = words.get(self.status, f"are {self.status}")
        ending = [" ".join([f"The configured rates {state}.", *self.reasons]), *self.notices]
        return "\n".join([*lines, *map(block, ending)])


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _has_limits(report: StabilityReport) -> bool:
    return report.lambda_max > 0


def _reach(report: StabilityReport) -> float:
    limits = [limit for limit in (report.alpha_c, report.safe_beta_c) if math.isfinite(limit)]
    return math.prod(limits) if limits else math.inf
