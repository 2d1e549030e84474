"""``make house`` runs, and the package keeps to its limits."""

import subprocess
import sys

import pytest

from benchmarks.house import ROOT, Checkout

CHECKOUT = Checkout(ROOT)
MOST_FILES, MOST_LINES = 15, 300
# A quarter of it is the class's docstring, which LightningCLI shows as help.
LONGER = {"guard/convergence_guard.py": 345}


def test_the_command_prints_every_room_beside_another_checkout():
    command = [sys.executable, "-m", "benchmarks.house", "--static", "--against", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    for room in CHECKOUT.rooms:
        assert done.stdout.count(f"\n{room} ") == 2
    assert "imports that go up                        none" in done.stdout and "docstring lines" in done.stdout


def test_every_room_has_its_place():
    assert set(CHECKOUT.rooms) == set(CHECKOUT.order)


@pytest.mark.parametrize("room", CHECKOUT.rooms)
def test_no_room_holds_too_many_files(room):
    assert CHECKOUT.files(room) <= MOST_FILES


@pytest.mark.parametrize("path", CHECKOUT.lengths, ids=lambda path: str(path.relative_to(CHECKOUT.package)))
def test_no_file_is_too_long(path):
    name = path.relative_to(CHECKOUT.package).as_posix()
    assert CHECKOUT.lengths[path] <= LONGER.get(name, MOST_LINES)


def test_imports_and_docstrings_are_counted(tmp_path):
    package = tmp_path / "lightning_maml_guard"
    for name, text in {
        "__init__.py": '"""Top."""\n__all__ = ["Seen"]\n',
        "low/__init__.py": "",
        "low/one.py": 'class Seen:\n    """One.\n\n    Three lines.\n    """\n\n    def _hidden(self):\n        """One line."""\n',
        "high/two.py": "def run():\n    from lightning_maml_guard.low.one import Seen  # lazy\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    found = Checkout(tmp_path)
    assert dict(found.imports["high"]) == {"low": 1} and not found.imports["low"]
    assert found.files("low") == 1 and found.upward() == []
    assert found.docstrings() == (5, 1) and found.comments() == 1
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_layout.py").write_text('ROOMS = ("high", "low")\n')
    assert Checkout(tmp_path).upward() == ["high -> low"]
