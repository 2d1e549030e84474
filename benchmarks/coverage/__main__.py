"""Run as ``python -m benchmarks.coverage``."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from functools import partial

import numpy as np
import torch

import benchmarks.coverage
from benchmarks.common.workers import each_done
from benchmarks.coverage.dense import QUANTITIES, Outcome, outcomes
from benchmarks.coverage.networks import Case
from benchmarks.coverage.problems import ORDERS, draw
from lightning_maml_guard import CurvatureOptions, StabilityReport


def _compared(seed: int, curvature: CurvatureOptions) -> tuple[int, Case, list[Outcome], StabilityReport]:
    case = draw(seed)
    return seed, case, *outcomes(case, curvature)


def main() -> None:
    """Run as a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=benchmarks.coverage.__doc__)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first problem")
    parser.add_argument("--max-iter", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    curvature = CurvatureOptions(max_iter=given.max_iter)
    counts: Counter[tuple[str, str, str]] = Counter()
    products: dict[str, list[int]] = {order: [] for order in ORDERS}
    jobs = [partial(_compared, seed, curvature) for seed in range(given.first, given.first + given.problems)]
    for seed, case, found, report in each_done(jobs, "5 minutes with 1000 problems"):
        order = case.problem.order
        products[order].append(report.hvps)
        for each in found:
            kind = "inside" if each.inside else "on a kink" if each.kink else "outside"
            counts[each.quantity, order, kind] += 1
            counts[each.quantity, order, "resolved"] += each.resolved
            counts[each.quantity, order, "not judged"] += math.isnan(each.value)
            if not each.inside:
                low, high = each.interval
                print(
                    f"{kind}: problem {seed}, {each.quantity} {each.value:.5g} ({low:.5g} to {high:.5g}), dense "
                    f"{each.truth:.5g}: {case.words}",
                    flush=True,
                )
    print("\n| quantity | order | problems | inside | outside | on a kink | resolved | not judged | products |")
    print("|---|---|---|---|---|---|---|---|---|")
    for quantity in QUANTITIES:
        for order in ORDERS:
            row = [
                str(counts[quantity, order, kind])
                for kind in ("inside", "outside", "on a kink", "resolved", "not judged")
            ]
            used = products[order]
            print(f"| {quantity} | {order} | {len(used)} | {' | '.join(row)} | {np.mean(used or [0]):.1f} |")


if __name__ == "__main__":
    main()
