"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import matplotlib
import pytest
import torch

from lightning_maml_guard import GuardWarning

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_quick_start_runs_and_warns_in_the_words_quoted(tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    assert len(code.strip().splitlines()) < 15
    code = code.replace("max_steps=500", "max_steps=20, accelerator='cpu', enable_progress_bar=False")
    with pytest.warns(GuardWarning, match=r"left the safe region at step 0\.\n  Why: beta = 1 exceeds 0\.5 \* beta_c"):
        exec(code, {})
    assert (tmp_path / "safe_region.png").exists()


def test_rates_are_suggested_in_the_words_quoted(capsys):
    (code,) = [each for each in re.findall(r"```python\n(.*?)```", README, re.S) if "suggest_rates" in each]
    torch.manual_seed(0)
    exec(code, {})
    quoted = re.findall(r"```text\n(Rates before training.*?)```", README, re.S)[0].splitlines()
    printed = capsys.readouterr().out.splitlines()
    numbers = r"\d+(\.\d+)?"  # their last digits are the machine's
    assert [re.sub(numbers, "#", line) for line in printed[:4]] == [re.sub(numbers, "#", line) for line in quoted[:4]]
    assert printed[4].startswith(quoted[4].removesuffix(" ..."))


def test_ci_finds_the_test_command():
    (command,) = re.findall(r"<!-- test command -->\n```sh\n(.*?)\n```", README, re.S)
    assert command.endswith("&& .venv/bin/python -m pytest") and "tests/constraints.txt" in command
    assert "awk" in (ROOT / ".ci" / "run").read_text()


def test_paths_named_in_the_readme_exist():
    for path in re.findall(r"(?:examples|tests)/[\w./]+\.\w+", README):
        assert (ROOT / path).exists(), path


def test_the_changelog_is_kept():
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
