"""Prints the results of a panel: the table, the correlations and the growth of the largest beta with alpha."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lightning_maml_guard.cli.paper_panels import FULL, SMALL
from lightning_maml_guard.cli.paper_results import PREDICTIONS, SHARES, growth_limits
from lightning_maml_guard.phase.result import FEWEST, PhaseDiagram


def print_results(name: str, found: dict[str, Any], diagram: PhaseDiagram) -> None:
    """Print what ``paper_results.results`` found for the panel."""
    print(f"\n{name}: {found['trained']} of {found['runs']} runs trained ({found['trained means']}),", end=" ")
    print(f"{found['diverged']} diverged; tasks {'drawn anew' if found['resampled'] else 'the same'} at every step")
    _print_table({key: value for key, value in found.items() if isinstance(value, np.ndarray)})
    limit = f"alpha_c at the start {_number(found['alpha_c at the start'], otherwise='not known')}"
    trained = len(diagram.trained_up_to(math.inf))
    print(f"{limit}, largest alpha that trained {found['largest alpha that trained']:.4g}" if trained else limit)
    if trained < FEWEST:
        print(_too_few_trained(name, found, trained))
        return
    for which, value in found["Spearman with largest beta"].items():
        text = _no_correlation(diagram, *PREDICTIONS[which]) if math.isnan(value) else f"{value:+.3f}"
        print(f"Spearman of {which} with the largest beta that trained: {text}")
    print("Growth of log10(largest beta) with alpha (Takagi et al.: above 0), by what counts as trained:")
    for which, growth in found["claim by what counts as trained"].items():
        print(f"  {which}: {_growth(diagram, SHARES[which], growth)}")


def print_bisection(found: dict[str, Any]) -> None:
    """Print how far the limits found by training are from those measured."""
    alphas = found["alpha"]
    print(f"alpha_c: found by training {found['alpha_c found by training']:.6g}", end=", ")
    print(f"measured {found['alpha_c measured']:.6g}", end=", ")
    print(f"difference {found['largest relative difference of alpha_c']:.1e}")
    print(f"beta_c(alpha): largest difference {found['largest relative difference of beta_c']:.1e}", end=" ")
    print(f"over {len(alphas)} inner rates from {alphas[0]:.3g} to {alphas[-1]:.3g}")


def _print_table(columns: dict[str, np.ndarray]) -> None:
    for number, key in enumerate(columns, start=1):
        print(f"  [{number}] {key}")
    print("".join(f"{f'[{number}]':>11s}" for number in range(1, len(columns) + 1)))
    for row in zip(*columns.values(), strict=True):
        print("".join(f"{_number(value):>11s}" for value in row))
    if any(np.isnan(values).any() for values in columns.values()):
        print("A dash: no outer rate trained at that inner rate, or the critical rate could not be measured.")


def _number(value: float, otherwise: str = "-") -> str:
    return otherwise if math.isnan(value) else f"{value:.4g}"


def _too_few_trained(name: str, found: dict[str, Any], trained: int) -> str:
    panel = (FULL if found["full"] else SMALL)[name]
    rates = len(found["alpha"])
    run = f"in {found['steps']} steps on a grid of {rates} x {found['runs'] // rates} rates"
    why = (
        f"Only {trained} of the inner rates trained {run}, and a comparison takes {FEWEST}"
        if trained
        else f"Nothing trained {run}"
    )
    return (
        f"{why}, so no limit can be compared with the grid's training: pass more --steps (the panel's own: "
        f"{panel.steps}) or a finer --grid (its own: {panel.alphas[-1]} x {panel.betas[-1]})."
    )


def _no_correlation(diagram: PhaseDiagram, name: str, along: bool) -> str:
    count = len(diagram.paired(name, along)[0])
    if count < FEWEST:
        return f"no number, as {count} of the inner rates have both and it takes {FEWEST}"
    return "no number, as one of the two is the same at all inner rates that have both"


def _growth(diagram: PhaseDiagram, share: float, growth: dict[str, float]) -> str:
    trained = len(diagram.trained_up_to(math.inf, share))
    if trained < FEWEST:
        return f"no number, as {trained} of the inner rates trained that far and it takes {FEWEST}"
    parts = []
    for where, limit in growth_limits(diagram, share).items():
        count = len(diagram.trained_up_to(limit, share))
        few = f"no number {where} ({count} of the inner rates up to it trained, it takes {FEWEST})"
        parts.append(few if math.isnan(growth[where]) else f"{growth[where]:+.3f} {where}")
    return ", ".join(parts)
