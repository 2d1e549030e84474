"""examples/phase_diagram.py and lightning-maml-guard phase-diagram at small size, each panel; the linear one and a launch over two processes are slow."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_maml_guard import PhaseDiagram
from lightning_maml_guard.cli.paper_panels import SMALL
from lightning_maml_guard.cli.paper_results import json_ready, results
from lightning_maml_guard.cli.paper_tables import print_results
from lightning_maml_guard.tasks.episodes import episode_generator

EXAMPLE = Path(__file__).parents[2] / "examples" / "phase_diagram.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(example, name, folder, *words):
    return example["main"]([name, "--out", str(folder), "--threads", "1", *words])


UNCOMPARED = (
    "so no limit can be compared with the grid's training: pass more --steps (the panel's own: {}) or a finer --grid (its "
    "own: {}).\n"
)
NOTHING = "Nothing trained in 6 steps on a grid of 3 x 3 rates, " + UNCOMPARED.format(4000, "16 x 16")
FEW = "Only {} of the inner rates trained in {} steps on a grid of 3 x 3 rates, and a comparison takes 3, "
COMPARED = ("Spearman of beta_c, at the start", "Takagi et al.: above 0")


@pytest.mark.parametrize(
    ("name", "said", "unsaid"),
    [
        ("sinusoid", [NOTHING], ["Spearman", "Growth"]),
        pytest.param(
            "omniglot",
            [FEW.format(2, 6) + UNCOMPARED.format(300, "12 x 10")],
            ["Nothing", "Spearman", "Growth"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_panel_is_drawn_printed_and_written(example, name, said, unsaid, tmp_path, capsys, data_folder, monkeypatch):
    monkeypatch.setenv("LMG_DATA", str(data_folder))
    found = run(example, name, tmp_path / "out", "--steps", "6", "--grid", "3")
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    for picture in (f"{name}.png", f"{name}_spectrum.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    diagram = PhaseDiagram.load(tmp_path / "out" / f"{name}.npz")
    assert written["diagram"]["start"] == diagram.start.tolist() and diagram.losses.shape == (6, 3, 3)
    assert written["runs"] == 9 and written["trained"] == int(diagram.trained.sum())
    assert found["alpha"].tolist() == written["alpha"] == diagram.alphas.tolist()
    assert diagram.measured_steps.tolist() == [0, 2, 4, 6]
    assert f"alpha_c at the start {written['alpha_c at the start']:.4g}" in printed
    assert all(words in printed for words in ["trained (final error at most 0.9", *said])
    assert not any(words in printed for words in unsaid)


def test_a_panel_that_trained_compares_the_limits_with_it(example, tmp_path, capsys):
    found = run(example, "sinusoid", tmp_path, "--steps", "150", "--grid", "4")
    printed = capsys.readouterr().out
    assert 0 < found["trained"] < 16 and "Nothing trained" not in printed
    assert all(words in printed for words in COMPARED)


def test_a_panel_with_too_few_trained_columns_to_compare_says_so(example, tmp_path, capsys):
    run(example, "sinusoid", tmp_path, "--steps", "20", "--grid", "3")
    printed = capsys.readouterr().out
    assert FEW.format(1, 20) + UNCOMPARED.format(4000, "16 x 16") in printed
    assert "Spearman" not in printed and "Growth" not in printed
    assert "A dash: " in printed and not re.search(r"\bnan\b", printed)


def diagram_by_hand(final, beta_c):
    """Inner rates 1, 2, ...; meta rates 1, 10, 100; ``alpha_c`` is 2; runs that end below 0.9 trained."""
    final = np.array(final)
    rates = np.array(beta_c)[None, :, None] * np.ones((1, *final.shape))
    return PhaseDiagram(
        alphas=np.arange(1.0, len(final) + 1), betas=np.array([1.0, 10.0, 100.0]), losses=np.zeros((0, *final.shape)),
        start=np.ones(final.shape), unadapted=np.ones(final.shape), final=final,
        divergence_step=np.full(final.shape, -1), measured_steps=np.array([0]), alpha_c=np.where(rates > 0, 2.0, np.nan),
        beta_c=rates, exact_beta_c=np.ones_like(rates), order="exact", inner_steps=1, optimizer="SGD()",
    )  # fmt: skip


def test_a_comparison_without_a_number_says_why(capsys):
    found = diagram_by_hand([[0.6, 2, 2], [0.6, 0.6, 2], [0.6, 2, 0.2], [0.6, 2, 2]], [1, np.nan, np.nan, 4])
    print_results("sinusoid", {**results(found), "resampled": True, "full": False, "steps": 9}, found)
    assert capsys.readouterr().out.endswith(
        "A dash: no outer rate trained at that inner rate, or the critical rate could not be measured.\n"
        "alpha_c at the start 2, largest alpha that trained 4\n"
        "Spearman of beta_c, at the start with the largest beta that trained: no number, as 2 of the inner rates have "
        "both and it takes 3\n"
        "Spearman of beta_c, smallest along healthy runs with the largest beta that trained: no number, as 2 of the inner "
        "rates have both and it takes 3\n"
        "Spearman of exact_beta_c, at the start with the largest beta that trained: no number, as one of the two is the "
        "same at all inner rates that have both\n"
        "Spearman of exact_beta_c, smallest along healthy runs with the largest beta that trained: no number, as one of "
        "the two is the same at all inner rates that have both\n"
        "Growth of log10(largest beta) with alpha (Takagi et al.: above 0), by what counts as trained:\n"
        "  0.9 of the error before training: no number towards alpha_c (2 of the inner rates up to it trained, it takes "
        "3), +0.000 towards the largest alpha that trained\n"
        "  0.5 of the error before training: no number, as 1 of the inner rates trained that far and it takes 3\n"
        "  0.25 of the error before training: no number, as 1 of the inner rates trained that far and it takes 3\n"
    )
    unmeasured = diagram_by_hand([[0.6, 2, 2]] * 3, [np.nan] * 3)
    print_results("sinusoid", {**results(unmeasured), "resampled": True, "full": False, "steps": 9}, unmeasured)
    printed = capsys.readouterr().out
    assert "alpha_c at the start not known, largest alpha that trained 3\n" in printed
    assert not re.search(r"\bnan\b", printed)


def test_what_json_cannot_hold_is_null():
    assert json_ready({"a": np.array([1.0, np.nan]), "b": [np.inf, np.int64(3)], "c": "x"}) == {
        "a": [1.0, None],
        "b": [None, 3],
        "c": "x",
    }


@pytest.mark.slow
def test_the_linear_panel_meets_the_theory(example, tmp_path):
    found = run(example, "linear", tmp_path)["theory"]
    assert found["largest relative difference of alpha_c"] < 1e-3
    assert found["largest relative difference of beta_c"] < 1e-3
    assert len(found["alpha"]) == 16 and found["alpha"][-1] > 0.97 * found["alpha_c measured"]
    # And the measured curve is that of the data's own matrix, in closed form.
    family = SMALL["linear"].tasks()
    x = family.sample(1, episode_generator(0, "train", 0)).support[0][0].numpy()
    x = np.concatenate([x, np.ones((len(x), 1))], 1)  # the bias
    values = np.linalg.eigvalsh(2 * x.T @ x / len(x))
    assert found["alpha_c measured"] == pytest.approx(1 / values[-1], rel=1e-9)
    expected = [2 / max(values - alpha * values**2) for alpha in found["alpha"]]
    assert found["beta_c measured"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    words = [str(EXAMPLE), "sinusoid", "--steps", "6", "--grid", "4", "--threads", "1", "--out"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for folder, start in (("one", []), ("two", launch)):
        done = subprocess.run(
            [sys.executable, *start, *words, str(tmp_path / folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parents[1])},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (PhaseDiagram.load(tmp_path / folder / "sinusoid.npz") for folder in ("one", "two"))
    assert np.allclose(one.final, two.final, rtol=1e-5) and np.allclose(
        one.losses, two.losses, rtol=1e-5, equal_nan=True
    )
