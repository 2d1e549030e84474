"""examples/phase_diagram.py and lightning-maml-guard phase-diagram at small size, each panel; the linear one and a launch over two processes are slow."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_maml_guard import EpisodeBatch, PhaseDiagram
from lightning_maml_guard.cli import paper_near_minimum
from lightning_maml_guard.cli.paper_panels import FULL, SMALL, problems
from lightning_maml_guard.cli.paper_results import json_ready, over_seeds, results
from lightning_maml_guard.cli.paper_tables import print_results
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.episodes import TaskFamily, episode_generator
from tests.helpers import dense_hessian

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
NOTHING = "Nothing trained in 6 steps on a grid of 4 x 3 rates, " + UNCOMPARED.format(500, "26 x 15")
FEW = "Only {} of the inner rates above 0 trained in {} steps on a grid of 4 x 3 rates, and a comparison takes 3, "
COMPARED = (
    "Spearman of beta_c at the start",
    "The largest beta that trained ",
    "best beta over exact beta_c at the end",
)


@pytest.mark.parametrize(
    ("name", "said", "unsaid"),
    [
        ("sinusoid", [NOTHING], ["Spearman", "grows"]),
        pytest.param(
            "omniglot",
            [FEW.format(1, 6) + UNCOMPARED.format(120, "15 x 12")],
            ["Nothing", "Spearman", "grows"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_panel_is_drawn_printed_and_written(example, name, said, unsaid, tmp_path, capsys, data_folder, monkeypatch):
    monkeypatch.setenv("LMG_DATA", str(data_folder))
    found = run(example, name, tmp_path / "out", "--steps", "6", "--grid", "3")
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    for picture in (f"{name}.png", f"{name}_ends.png", f"{name}_spectrum.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    diagram = PhaseDiagram.load(tmp_path / "out" / f"{name}.npz")
    assert written["diagram"]["start"] == diagram.start.tolist() and diagram.losses.shape == (6, 4, 3)
    assert written["runs"] == 12 and written["trained"] == int(diagram.trained.sum())
    assert found["curve"]["alpha"].tolist() == written["curve"]["alpha"] == diagram.alphas.tolist()
    assert {"peak_gain", "peak_alpha", "gain_at_largest_alpha"} < set(written)
    assert diagram.measured_steps.tolist() == [0, 6] and diagram.alphas[0] == 0
    assert f"alpha_c at the start {written['alpha_c at the start']:.4g}" in printed
    assert all(words in printed for words in ["trained (final error at most 0.9", *said])
    assert not any(words in printed for words in unsaid)


def test_a_panel_that_trained_compares_the_limits_with_it(example, tmp_path, capsys):
    found = run(example, "sinusoid", tmp_path, "--steps", "60", "--grid", "5")
    printed = capsys.readouterr().out
    assert 0 < found["trained"] < 30 and "Nothing trained" not in printed
    assert all(words in printed for words in COMPARED)


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


def printed_of(diagram, capsys, **more):
    print_results("sinusoid", {**results(diagram), "steps": 9, **more}, SMALL["sinusoid"], diagram)
    return capsys.readouterr().out


def test_a_comparison_without_a_number_says_why(capsys):
    found = diagram_by_hand([[0.6, 2, 2], [0.6, 0.6, 2], [0.6, 2, 0.2], [0.6, 2, 2]], [1, np.nan, np.nan, 4])
    assert printed_of(found, capsys).endswith(
        "A dash: no outer rate trained at that inner rate, or the critical rate could not be measured.\n"
        "alpha_c at the start 2\n"
        "The largest beta that trained grows by +2.00 decades from alpha = 1 to 3, then falls to +0.00 at 4, the largest "
        "that trained: an inverted U\n"
        "  error at most 0.9 of the error before training: grows by +2.00 decades from alpha = 1 to 3, then falls to +0.00 "
        "at 4, the largest that trained: an inverted U\n"
        "  error at most 0.5 of the error before training: no number, as fewer than 3 of the inner rates trained that far\n"
        "  error at most 0.25 of the error before training: no number, as fewer than 3 of the inner rates trained that far\n"
        "Spearman of beta_c at the start with the largest beta that trained: no number, as 2 of the inner rates have "
        "both and it takes 3\n"
        "Spearman of exact beta_c at the start with the largest beta that trained: no number, as one of the two is the "
        "same at all inner rates that have both\n"
        "alpha * lambda_max over 2 inner rates' best runs: 0.5 to 2 (median 1.25) at the start, 0.5 to 2 (median 1.25) at "
        "the end\n"
        "largest beta that trained over exact beta_c at the start: 1 to 100 (median 5.5)\n"
        "best beta over exact beta_c at the start: 1 to 100 (median 1)\n"
        "best beta over exact beta_c at the end: 1 to 100 (median 1)\n"
    )
    unmeasured = diagram_by_hand([[0.6, 2, 2]] * 3, [np.nan] * 3)
    printed = printed_of(unmeasured, capsys)
    assert "alpha_c at the start not known\n" in printed and not re.search(r"\bnan\b", printed)
    assert "does not grow from alpha = 1 on: +0.00 decades at 3, the largest that trained" in printed


def test_too_few_trained_columns_to_compare_are_said(capsys):
    printed = printed_of(diagram_by_hand([[0.6, 2, 2], [2, 2, 2], [2, 2, 0.6], [2, 2, 2]], [1] * 4), capsys)
    assert FEW.format(2, 9) + UNCOMPARED.format(500, "26 x 15") in printed
    assert "Spearman" not in printed and "grows" not in printed
    assert "A dash: " in printed and not re.search(r"\bnan\b", printed)


def test_seeds_are_printed_with_their_spread(capsys):
    rising = diagram_by_hand([[0.6, 2, 2], [0.6, 0.6, 2], [0.6, 0.6, 0.2]], [1, 1, 1])
    flat = diagram_by_hand([[0.6, 0.6, 2], [2, 0.6, 2], [0.6, 0.6, 2]], [1, 1, 1])
    printed = printed_of(rising, capsys, seeds=over_seeds((4, 5), (rising, flat)))
    assert "seed 4: grows by +2.00 decades from alpha = 1 to 3, the largest that trained\n" in printed
    assert "seed 5: does not grow" in printed
    assert "Peak gain over 2 seeds: +0.00 to +2.00 decades, mean +1.00\n" in printed


def test_the_full_panels_have_the_published_sizes():
    linear, sinusoid, omniglot, mini = (FULL[name] for name in ("linear", "sinusoid", "omniglot", "miniimagenet"))
    ends = [
        (p.alphas[1], p.alphas[-1], p.betas[0], p.betas[-1], p.steps, p.batch, p.inner_steps) for p in FULL.values()
    ]
    assert ends == [
        (1e-5, 9e-2, 5e-3, 9, 500, 1, 1),
        (1e-4, 9, 1e-2, 9, 500, 10, 1),
        (1e-3, 9, 1e-1, 90, 100, 32, 2),
        (1e-4, 9, 1e-2, 9, 120, 4, 2),
    ]
    assert linear.betas[:5].tolist() == [5e-3, 7e-3, 9e-3, 1e-2, 3e-2] and sinusoid.judged == 100
    assert [p.alphas[0] for p in FULL.values()] == [0] * 4 and {omniglot.data, mini.data} == {"tasks"}
    assert sum(each.numel() for each in omniglot.network().parameters()) > 100_000


def test_labels_are_drawn_anew_on_the_same_images(data_folder, monkeypatch):
    monkeypatch.setenv("LMG_DATA", str(data_folder))
    family, judged = problems(SMALL["omniglot"], torch.device("cpu"), 0)
    steps = [family(step) for step in (0, 1, 0)]
    assert all(torch.equal(each.support[0], judged.support[0]) for each in steps)
    first, second, again = (torch.cat([each.support[1], each.query[1]], 1) for each in steps)
    assert torch.equal(first, again) and not torch.equal(first, second)
    for labels in (first, second):  # a permutation of the classes, the same for support and query
        assert all(sorted(task.tolist()) == list(range(5)) for task in labels[:, :5])
        assert torch.equal(labels[:, :5], labels[:, 5:])


def test_batches_pass_through_the_whole_set_in_a_new_order_each_time():
    family, judged = problems(SMALL["sinusoid"], torch.device("cpu"), 0)
    passes = [torch.cat([family(10 * k + step).query[1] for step in range(10)]) for k in (0, 1)]
    assert not torch.equal(*passes)
    expected = judged.query[1].flatten(1).sum(1).sort().values
    for each in passes:
        assert torch.allclose(each.flatten(1).sum(1).sort().values, expected)


class FiveVectors(TaskFamily):
    """Tasks of five vectors, one of each class."""

    def sample(self, n_tasks, generator, split="train"):
        x = torch.randn(n_tasks, 5, 3, generator=generator)
        pair = x, torch.arange(5).expand(n_tasks, 5)
        return EpisodeBatch(pair, pair)


def test_near_a_minimum_training_meets_theory(example, tmp_path, capsys, monkeypatch):
    tiny = lambda: mlp(3, (12,), 5, activation="tanh"), FiveVectors
    monkeypatch.setattr(paper_near_minimum, "SETS", {"tiny": tiny})
    found = run(example, "near-minimum", tmp_path, "--grid", "9")
    problem, eigenvalues = paper_near_minimum.minimum("tiny", 0, torch.device("cpu"))
    top = np.linalg.eigvalsh(
        dense_hessian(lambda p: problem.task_loss(p, (problem.support[0][0], problem.support[1][0])), problem.params)
    )[-1]
    assert eigenvalues.max() == pytest.approx(top, rel=1e-5)
    written = json.loads((tmp_path / "near-minimum.json").read_text())["seeds"][0]["tiny"]
    for order in ("simplified", "exact"):
        assert written[order]["largest difference in grid steps"] < 1
        assert f"near-minimum, tiny, {order} MAML, seed 0: at most 0." in capsys.readouterr().out or order == "exact"
    trained = found["seeds"][0]["tiny"]["simplified"]["curve"]["beta * lambda_max / 2, largest up to which all trained"]
    assert np.isfinite(trained[:5]).all() and np.isnan(trained[5:]).all()  # alpha_c is the fifth
    assert (tmp_path / "near-minimum.png").stat().st_size > 10_000


def test_a_difference_from_theory_that_is_no_number_is_infinite():
    found = diagram_by_hand([[0.6, 2, 2], [2, 0.6, 2], [0.6, 2, 2]], [1, 1, 1])
    for alphas, expected in (([0.0, 0.5, 1.0], math.inf), ([0.0, 3.0, 4.0], math.inf)):
        each = replace(found, alphas=np.array(alphas), order="simplified")
        assert paper_near_minimum.compared(each, np.array([0.5, 1.0]))["largest difference in grid steps"] == expected


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
            env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (PhaseDiagram.load(tmp_path / folder / "sinusoid.npz") for folder in ("one", "two"))
    assert np.allclose(one.final, two.final, rtol=1e-5) and np.allclose(
        one.losses, two.losses, rtol=1e-5, equal_nan=True
    )
