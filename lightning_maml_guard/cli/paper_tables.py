"""Prints the results of a panel: the table, the growth of the largest beta with alpha, the start and the end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lightning_maml_guard.cli.paper_panels import DATA, Panel
from lightning_maml_guard.cli.paper_results import PREDICTIONS
from lightning_maml_guard.phase.result import FEWEST, PhaseDiagram


def print_results(name: str, found: dict[str, Any], panel: Panel, diagram: PhaseDiagram) -> None:
    """Print what ``paper_results.results`` found for the panel."""
    print(f"\n{name}: {found['trained']} of {found['runs']} runs trained ({found['trained means']}),", end=" ")
    print(f"{found['diverged']} diverged; {DATA[panel.data]}")
    _print_table(found["curve"])
    print(f"alpha_c at the start {_number(found['alpha_c at the start'], otherwise='not known')}")
    without = found["beta at alpha = 0"]
    if not math.isnan(without):
        print(f"At alpha = 0 training diverges above beta = {without:.4g}")
    usable = int((np.isfinite(diagram.largest_beta) & (diagram.alphas > 0)).sum())
    if usable < FEWEST:
        print(_too_few_trained(found, panel, diagram, usable))
        return
    print(f"The largest beta that trained {growth(found)}")
    for which, gain in found["gain by what counts as trained"].items():
        few = f"no number, as fewer than {FEWEST} of the inner rates trained that far"
        print(f"  error at most {which}: {few if math.isnan(gain['peak_gain']) else growth(gain)}")
    if len(found.get("seeds", ())) > 1:
        _print_seeds(found["seeds"])
    for which, value in found["Spearman with largest beta"].items():
        text = _no_correlation(diagram, PREDICTIONS[which]) if math.isnan(value) else f"{value:+.3f}"
        print(f"Spearman of {which} with the largest beta that trained: {text}")
    _print_start_and_end(found["curve"])


def print_bisection(found: dict[str, Any]) -> None:
    """Print how far the limits found by training are from those measured."""
    alphas = found["alpha"]
    print(f"alpha_c: found by training {found['alpha_c found by training']:.6g}", end=", ")
    print(f"measured {found['alpha_c measured']:.6g}", end=", ")
    print(f"difference {found['largest relative difference of alpha_c']:.1e}")
    print(f"beta_c(alpha): largest difference {found['largest relative difference of beta_c']:.1e}", end=" ")
    print(f"over {len(alphas)} inner rates from {alphas[0]:.3g} to {alphas[-1]:.3g}")


def print_near_minimum(found: dict[str, Any]) -> None:
    """Print what training from near a minimum found beside theory."""
    for each in found["seeds"]:
        for dataset, by_order in each.items():
            if dataset == "seed":
                continue
            for order, compared in by_order.items():
                if order == "eigenvalues":
                    continue
                print(f"\nnear-minimum, {dataset}, {order} MAML, seed {each['seed']}: at most", end=" ")
                print(f"{compared['largest difference in grid steps']:.2f} grid steps", end=" ")
                print(f"({compared['grid step in decades']:.3f} decades each) from theory")
                _print_table(compared["curve"])


def growth(gain: dict[str, float]) -> str:
    """Say how the largest beta grows with ``alpha``, and whether it falls again."""
    peak, end, largest = gain["peak_gain"], gain["gain_at_largest_alpha"], gain["largest_alpha"]
    start = gain["smallest_alpha"]
    if peak == 0:
        return (
            f"does not grow from alpha = {start:.3g} on: {end:+.2f} decades at {largest:.3g}, the largest that trained"
        )
    grows = f"grows by {peak:+.2f} decades from alpha = {start:.3g} to {gain['peak_alpha']:.3g}"
    if gain["peak_alpha"] == largest:
        return f"{grows}, the largest that trained"
    if end == peak:
        return f"{grows}, and is as large at {largest:.3g}, the largest that trained"
    return f"{grows}, then falls to {end:+.2f} at {largest:.3g}, the largest that trained: an inverted U"


def _print_seeds(seeds: list[dict[str, Any]]) -> None:
    for each in seeds:
        print(f"  seed {each['seed']}: {growth(each)}")
    gains = [each["peak_gain"] for each in seeds]
    print(f"Peak gain over {len(seeds)} seeds: {min(gains):+.2f} to {max(gains):+.2f} decades", end=", ")
    print(f"mean {np.mean(gains):+.2f}")


def _print_start_and_end(curve: dict[str, np.ndarray]) -> None:
    """Print where training takes ``alpha * lambda_max``, and the best beta beside the limits at both ends."""
    moved = [curve[f"alpha * lambda_max at the {when}"] for when in ("start", "end")]
    known = np.isfinite(moved[0]) & np.isfinite(moved[1]) & (curve["alpha"] > 0)
    if known.any():
        start, end = (_range(each[known]) for each in moved)
        print(f"alpha * lambda_max over {known.sum()} inner rates' best runs: {start} at the start, {end} at the end")
    for beta, when in (("largest beta that trained", "start"), ("best beta", "start"), ("best beta", "end")):
        ratios = curve[beta] / curve[f"exact beta_c at the {when}"]
        ratios = ratios[np.isfinite(ratios) & (curve["alpha"] > 0)]
        if len(ratios):
            print(f"{beta} over exact beta_c at the {when}: {_range(ratios)}")


def _range(values: np.ndarray) -> str:
    return f"{values.min():.3g} to {values.max():.3g} (median {np.median(values):.3g})"


def _print_table(columns: dict[str, np.ndarray]) -> None:
    for number, key in enumerate(columns, start=1):
        print(f"  [{number}] {key}")
    print("".join(f"{f'[{number}]':>10s}" for number in range(1, len(columns) + 1)))
    for row in zip(*columns.values(), strict=True):
        print("".join(f"{_number(value):>10s}" for value in row))
    if any(np.isnan(values).any() for values in columns.values()):
        print("A dash: no outer rate trained at that inner rate, or the critical rate could not be measured.")


def _number(value: float, otherwise: str = "-") -> str:
    return otherwise if math.isnan(value) else f"{value:.4g}"


def _too_few_trained(found: dict[str, Any], panel: Panel, diagram: PhaseDiagram, usable: int) -> str:
    run = f"in {found['steps']} steps on a grid of {len(diagram.alphas)} x {len(diagram.betas)} rates"
    why = (
        f"Only {usable} of the inner rates above 0 trained {run}, and a comparison takes {FEWEST}"
        if usable
        else f"Nothing trained {run}"
    )
    return (
        f"{why}, so no limit can be compared with the grid's training: pass more --steps (the panel's own: "
        f"{panel.steps}) or a finer --grid (its own: {len(panel.alphas)} x {len(panel.betas)})."
    )


def _no_correlation(diagram: PhaseDiagram, name: str) -> str:
    count = len(diagram.paired(name)[0])
    if count < FEWEST:
        return f"no number, as {count} of the inner rates have both and it takes {FEWEST}"
    return "no number, as one of the two is the same at all inner rates that have both"
