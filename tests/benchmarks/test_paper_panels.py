"""The rows of docs/paper.md."""

import math

import numpy as np

from benchmarks.paper_panels import FULL, HEADER, PANELS, row
from lightning_maml_guard.cli.paper_panels import FULL as FULL_PANELS


def test_a_row_holds_the_seeds_and_both_ends():
    gain = {"peak_gain": 1.25, "peak_alpha": 0.5, "gain_at_largest_alpha": 0.25, "largest_alpha": 4.0}
    curve = {
        "alpha": np.array([0.0, 1.0, 2.0]),
        "best beta": np.array([9.0, 2.0, math.nan]),
        "alpha * lambda_max at the start": np.array([0.0, 8.0, 16.0]),
        "alpha * lambda_max at the end": np.array([0.0, 2.0, math.nan]),
        "exact beta_c at the start": np.array([1.0, 0.5, 1.0]),
        "exact beta_c at the end": np.array([1.0, 1.0, math.nan]),
    }
    found = {"seeds": [gain, {**gain, "peak_gain": math.nan}], "curve": curve, "minutes": 2.4}
    found |= {"data": "tasks", "steps": 7, "inner_steps": 2}
    expected = "| `omniglot` | tasks, 7 steps, K = 2 | +1.25, - | 0.5, 0.5 | +0.25, +0.25 at 4, 4 | 8, 2 | 4, 2 | 2 |"
    assert row("omniglot", found) == expected
    assert all(line.count("|") == expected.count("|") for line in HEADER.splitlines())


def test_every_published_panel_is_run_at_full_size():
    assert [words.split()[0] for words in FULL] == list(FULL_PANELS)
    assert all("--full" in words for words in FULL) and not any("--full" in words for words in PANELS)
