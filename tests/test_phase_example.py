"""examples/phase_diagram.py and lightning-maml-guard phase-diagram at small size, each panel; the linear one and a launch over two processes are slow."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_maml_guard import PhaseDiagram
from lightning_maml_guard.poster.findings import plain
from lightning_maml_guard.poster.panels import SMALL
from lightning_maml_guard.tasks.episodes import episode_generator

EXAMPLE = Path(__file__).parents[1] / "examples" / "phase_diagram.py"


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


NOTHING = (
    "Nothing trained in 6 steps on a grid of 3 x 3 rates, so no limit can be compared with training: pass more --steps "
    "(the panel's own: 4000) or a finer --grid (its own: 16 x 16).\n"
)
COMPARED = ("Spearman of beta_c, at the start", "the poster says: above 0")


@pytest.mark.parametrize(
    ("name", "said", "unsaid"),
    [
        ("sinusoid", [NOTHING], ["Spearman", "Growth"]),
        pytest.param("omniglot", COMPARED, ["Nothing"], marks=pytest.mark.slow),
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


def test_what_json_cannot_hold_is_null():
    assert plain({"a": np.array([1.0, np.nan]), "b": [np.inf, np.int64(3)], "c": "x"}) == {
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
