"""What the README and the documentation show runs as it stands there, and what they point to exists."""

import re
from pathlib import Path

import matplotlib
import pytest
import torch

import lightning_maml_guard
from benchmarks.house import Checkout
from lightning_maml_guard import GuardWarning

ROOT = Path(__file__).parents[1]
README, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "docs/guide.md"))
# Where links in the README, which PyPI shows too, find the files of this checkout.
REPOSITORY = re.compile(r"https://(?:github|raw\.githubusercontent)\.com(?:/lightning-maml-guard){2}/(?:blob/)?main/")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
BLOCKS = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in PAGES.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.S))
    if (name, number) != ("README.md", 0) and "suggest_rates" not in code  # those have tests of their own
]


def test_the_quick_start_runs_and_warns_in_the_words_quoted(tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    assert len(code.strip().splitlines()) < 15
    code = code.replace("max_steps=500", "max_steps=20, accelerator='cpu', enable_progress_bar=False")
    with pytest.warns(GuardWarning, match=r"step 0: beta = 1 is too large\. Set the optimizer's lr to"):
        exec(code, {})
    assert (tmp_path / "safe_region.png").exists()


def test_rates_are_suggested_in_the_words_quoted(capsys):
    (code,) = [each for each in re.findall(r"```python\n(.*?)```", GUIDE, re.S) if "suggest_rates" in each]
    torch.manual_seed(0)
    exec(code, {})
    quoted = re.findall(r"```text\n(Rates before training.*?)```", GUIDE, re.S)[0].splitlines()
    printed = capsys.readouterr().out.splitlines()
    numbers = r"\d+(\.\d+)?"  # their last digits are the machine's
    assert [re.sub(numbers, "#", line) for line in printed[:4]] == [re.sub(numbers, "#", line) for line in quoted[:4]]
    assert printed[4].startswith(quoted[4].removesuffix(" ..."))


@pytest.mark.parametrize("code", BLOCKS)
def test_a_code_block_runs_when_pasted(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_the_readme_can_be_shown_by_pypi():
    relative = [each for each in re.findall(r"\]\(([^)\s]+)\)", README) if not each.startswith("https://")]
    assert relative == [] and len(README.splitlines()) <= 120


def test_the_api_page_has_every_public_name():
    assert [
        name for name in lightning_maml_guard.__all__ if f"lightning_maml_guard.{name}\n" not in PAGES["docs/api.md"]
    ] == []


def test_no_code_block_is_left_out():
    assert sum(text.count("```python") for text in PAGES.values()) == len(BLOCKS) + 2 == 10


def test_ci_finds_the_test_command():
    (command,) = re.findall(r"<!-- test command -->\n```sh\n(.*?)\n```", README, re.S)
    assert command.endswith("&& .venv/bin/python -m pytest") and "tests/constraints.txt" in command
    assert "awk" in (ROOT / ".ci" / "run").read_text()
    setup = command.removesuffix(" && .venv/bin/python -m pytest").split(" && ")
    assert "\n".join(f"\t{line}" for line in setup) in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        path, _, anchor = target.partition("#")
        here = REPOSITORY.sub("", path)
        if here != path or not target.startswith("http"):
            file = ROOT / here if here != path else (ROOT / name).parent / path if path else ROOT / name
            assert file.is_file(), target
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}, target


@pytest.mark.parametrize("name", PAGES)
def test_paths_and_commands_that_are_named_exist(name):
    text = PAGES[name]
    for path in re.findall(r"(?:examples|tests|docs|lightning_maml_guard)/[\w./]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`(\w+/\w+\.py)`", text):
        assert (ROOT / path).exists() or (ROOT / "lightning_maml_guard" / path).exists(), path
    for target in re.findall(r"`?make (\w+)", text) if name == "CONTRIBUTING.md" else ():
        assert f"\n{target}: " in (ROOT / "Makefile").read_text(), target


def test_every_benchmark_that_is_named_exists():
    sources = [*(ROOT / "lightning_maml_guard").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    for text in (*PAGES.values(), *(path.read_text() for path in sources)):
        for module in re.findall(r"python -m (benchmarks(?:\.[a-z0-9_]+)+)", text):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").exists(), module


def test_contributing_names_every_folder_from_the_top_down():
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", PAGES["CONTRIBUTING.md"], re.M)
    order = Checkout(ROOT).order
    assert set(order) <= set(rows)
    assert [row for row in rows if row in order] == order[::-1]


def test_the_changelog_is_kept():
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
