"""From runs to figures: detection, false alarms, rescue and harm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy.stats import mannwhitneyu

from benchmarks.common.detectors import early_stopping, finite, spike_detection, spike_ratios, up_to
from benchmarks.guard_bench.columns import STEPS, Column
from benchmarks.guard_bench.guarded import WARN, WARN_DEFAULT, Guarded
from benchmarks.guard_bench.remedies import UNGUARDED, Trace

LEADS = (1, 3, 5, 10)
FALSE_ALARMS = 0.02


@dataclass(frozen=True)
class Run:
    """One run with every remedy and under every guard.

    Attributes:
        column: Its column.
        beta: Its outer learning rate.
        remedies: Traces of the vmapped remedies.
        guarded: Runs under the guard, by arm.
    """

    column: Column
    beta: float
    remedies: dict[str, Trace]
    guarded: dict[str, Guarded]

    @property
    def plain(self) -> Trace:
        """The run without a remedy: under the guard that only warns."""
        return self.guarded[WARN].trace

    @property
    def name(self) -> str:
        """A name to find the run by."""
        c = self.column
        return (
            f"seed {c.seed} {c.family} {c.order} K={c.inner_steps} {c.optimizer} "
            f"{'resampled' if c.resample else 'fixed'} alpha={c.alpha:.3g} beta={self.beta:.3g}"
        )

    def trace(self, arm: str) -> Trace:
        """The trace under a remedy or an arm of the guard."""
        return self.guarded[arm].trace if arm in self.guarded else self.remedies[arm]


DETECTORS = {
    "guard, every 5 steps": lambda run: run.guarded[WARN].severities,
    "guard, defaults": lambda run: run.guarded[WARN_DEFAULT].severities,
    "beta/beta_c or alpha/alpha_c": lambda run: [
        (s, max(finite(b) if not math.isnan(b) else 0.0, finite(a) if not math.isnan(a) else 0.0))
        for s, b, a in run.guarded[WARN].ratios
    ],
    "loss-spike ratio": lambda run: spike_ratios(run.plain.losses),
    "gradient-norm spike": lambda run: spike_ratios(run.plain.norms),
    "EarlyStopping rule": lambda run: early_stopping(run.plain.losses, run.plain.start),
    "SpikeDetection rule": lambda run: spike_detection(run.plain.losses),
    "beta * lambda_max / 2 at the start": lambda run: [(0, run.beta / run.guarded[WARN].init_rate)],
}


def detection(runs: list[Run]) -> dict[str, dict[int, tuple[float, float, int]]]:
    """AUROC and recall at 2 % false alarms, by detector and lead.

    Args:
        runs: The runs.

    Returns:
        ``{detector: {lead: (auroc, recall, diverging runs)}}``. Runs that diverge earlier than the lead are left out.
    """
    healthy = [run for run in runs if run.plain.outcome == "healthy"]
    table: dict[str, dict[int, tuple[float, float, int]]] = {}
    for name, detector in DETECTORS.items():
        # A healthy run is scored over the reported steps; the later ones only show that it stays healthy.
        negatives = [up_to(detector(run), STEPS - 1) for run in healthy]
        table[name] = {}
        for lead in LEADS:
            diverging = [r for r in runs if r.plain.outcome == "diverged" and (r.plain.departure or 0) >= lead]
            positives = [up_to(detector(run), run.plain.departure - lead) for run in diverging]
            if not positives or not negatives:
                continue
            auroc = float(mannwhitneyu(positives, negatives).statistic) / (len(positives) * len(negatives))
            allowed = int(FALSE_ALARMS * len(negatives))
            bar = sorted(negatives, reverse=True)[allowed]
            table[name][lead] = (auroc, float(np.mean([value > bar for value in positives])), len(positives))
    return table


def false_alarms(runs: list[Run], arm: str) -> tuple[int, int, list[str]]:
    """Alarms within the reported steps of healthy runs.

    Args:
        runs: The runs.
        arm: An arm that warns.

    Returns:
        Alarms, healthy steps, and the runs with alarms.
    """
    healthy = [run for run in runs if run.plain.outcome == "healthy"]
    each = {run.name: [s for s in run.guarded[arm].alarms if s < STEPS] for run in healthy}
    return (
        sum(map(len, each.values())),
        STEPS * len(healthy),
        [f"{name}: alarm at {steps}" for name, steps in each.items() if steps],
    )


def rescue(runs: list[Run], arm: str) -> dict[str, object]:
    """Outcomes of the runs that diverge without a guard.

    Args:
        runs: The runs.
        arm: A remedy, or an arm of the guard.

    Returns:
        Shares, the median ratio of the final loss to that of the best healthy run of the column, and the failing runs.
    """
    best: dict[Column, float] = {}
    for run in runs:
        if run.plain.outcome == "healthy":
            best[run.column] = min(best.get(run.column, math.inf), run.plain.final)
    diverging = [run for run in runs if run.plain.outcome == "diverged"]
    finals = {run.name: run.trace(arm).final for run in diverging}
    ratios = [finite(run.trace(arm).final / best[run.column]) for run in diverging if run.column in best]
    return {
        "diverging": len(diverging),
        "finite": float(np.mean([math.isfinite(value) for value in finals.values()])),
        "healthy": float(np.mean([run.trace(arm).outcome == "healthy" for run in diverging])),
        "median ratio": median(ratios) if ratios else math.nan,
        "compared": len(ratios),
        "not finite": [run.name for run in diverging if not math.isfinite(run.trace(arm).final)],
        "not healthy": [
            f"{run.name}: {run.trace(arm).start:.3g} -> {run.trace(arm).final:.3g}"
            for run in diverging
            if run.trace(arm).outcome != "healthy"
        ],
    }


def harm(runs: list[Run], arm: str) -> dict[str, object]:
    """Effect on the runs that are healthy without a guard.

    Args:
        runs: The runs.
        arm: A remedy, or an arm of the guard.

    Returns:
        Median, 90th percentile and largest ratio of the final losses, and the runs made to diverge.
    """
    healthy = [run for run in runs if run.plain.outcome == "healthy"]
    # A remedy of the vmapped engine is compared with the vmapped engine's own unguarded run.
    plain = {id(run): run.plain if arm in run.guarded else run.remedies[UNGUARDED] for run in healthy}
    ratios = [finite(run.trace(arm).final / plain[id(run)].final) for run in healthy]
    return {
        "healthy": len(healthy),
        "median": median(ratios),
        "p90": float(np.quantile(ratios, 0.9)),
        "largest": max(ratios),
        "made to diverge": [run.name for run in healthy if run.trace(arm).outcome == "diverged"],
    }
