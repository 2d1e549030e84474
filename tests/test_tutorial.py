"""The tutorial runs from a clean start, tells the story its text tells, and shows outputs that are not stale."""

import math
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.test_readme import ROOT

TUTORIAL = ROOT / "examples" / "tutorial.ipynb"
NUMBER = r"-?(?:\d+(?:\.\d*)?(?:e[+-]?\d+)?|inf|nan)\b"


def committed():
    return nbformat.read(TUTORIAL, as_version=4)


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def tables(cell):
    return [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]


def kinds(cell):
    """What a cell puts out: its streams, and the forms of each table and picture."""
    shown = [sorted(output.data) for output in cell.outputs if output.output_type != "stream"]
    return sorted({output.name for output in cell.outputs if output.output_type == "stream"}), shown


# What is logged on stderr by the kernel of itself (ipykernel 7.4: its transport is not encrypted) and by torch when it
# is imported (its CUDA build, where Triton is missing).
NOT_OURS = re.compile(r"^(?:\[IPKernelApp\]|[WI]\d{4} [\d:.]+ \d+ torch/) ?.*\n?", re.M)


def without_what_others_log(notebook):
    """Take out of the outputs what kernel and torch log of themselves; what a cell says stays."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.output_type == "stream" and output.name == "stderr":
                    output.text = NOT_OURS.sub("", output.text)
            cell.outputs = [each for each in cell.outputs if each.output_type != "stream" or each.text]
    return notebook


def words(text):
    return re.sub(NUMBER, "#", " ".join(text.split()))


def story(notebook):
    """Check what the tutorial says of its runs, and give the numbers that it rests on."""
    cells = {cell.id: cell for cell in notebook.cells}

    def read(cell, pattern):
        text = " ".join(printed(cells[cell]).split())
        found = re.search(pattern.replace("#", f"({NUMBER})"), text)
        assert found, f"{cell}: no {pattern!r} in\n{text}"
        return [float(number) for number in found.groups()]

    start, lost, lost_at = read("lost", "beta = 1: loss # at step 0, # at step #$")
    assert math.isfinite(start) and not math.isfinite(lost) and 0 < lost_at < 20

    first_line = r"^ConvergenceGuard: step 0: beta = 1 is too large\. Set the optimizer's lr to #\."
    advised, beta_c = read("which", rf"{first_line} Why: beta = 1 is [\d.]+x beta_c = #")
    assert 0.1 * beta_c < advised < beta_c < 0.5 and "alpha = 0.01 is" not in printed(cells["which"])

    alpha, beta = read(
        "before", r"alpha: configured 0.01, alpha_c .*?, suggested # .* at the suggested alpha.*, suggested #"
    )
    assert alpha in (0.01, 0.02) and beta < beta_c

    _, trained = read("lower", "suggested rates: loss # at step 0, # over the last 20 steps")
    assert trained < 0.6 * start
    _, followed = read("lower", "advised beta: loss # at step 0, # over the last 20 steps")
    assert followed < 0.7 * start  # at rates half a per cent apart it ends at 0.53 to 0.62
    (table,) = tables(cells["lower"])
    assert set(re.findall("safe|edge|unsafe|unresolved", table)) == {"safe"}

    (capped,) = read("rescale", r"Applied from now on: alpha = 0\.01, beta = #")
    _, rescaled = read("rescale", "rescaled: loss # at step 0, # over the last 20 steps")
    assert capped == pytest.approx(0.5 * beta_c, rel=0.02) and rescaled < 0.8 * start

    first_line = r"^ConvergenceGuard: step 0: alpha = 0\.2 is too large\. Set the inner rate \(inner_lr\) to #\."
    advised_alpha, alpha_c = read("inner", rf"{first_line} Why: alpha = 0\.2 is [\d.]+x alpha_c = #")
    assert 0.1 * alpha_c < advised_alpha < alpha_c
    high, inner_lost = read("inner", r"alpha = 0\.2: loss # at step 0, # over the last 20 steps")
    _, adapted = read("inner", "advised alpha: loss # at step 0, # over the last 20 steps")
    assert adapted < 0.6 * start
    before, after = read(
        "inner", r"alpha = 0\.2 makes the tasks worse: the query loss is # before adaptation and # after"
    )
    assert after == high > 3 * before
    assert high > 3 * start and inner_lost > start

    rows = re.findall(rf"\(({NUMBER}) of alpha_c\): beta_c = ({NUMBER}), .* is (\w+)", printed(cells["measure"]))
    ratios, limits = [float(row[0]) for row in rows], [float(row[1]) for row in rows]
    assert ratios[0] < 0.2 and ratios[-1] > 1 and limits[-1] < 0.05 * limits[0]
    assert limits[1:] == sorted(limits[1:], reverse=True)
    assert rows[0][2] == "safe" and rows[-1][2] == "unsafe"
    runs = [trained, followed, rescaled, adapted]
    return [start, beta_c, advised, alpha, beta, *runs, capped, alpha_c, advised_alpha, high, *limits]


def test_the_committed_outputs_tell_the_story():
    story(committed())


def test_a_fresh_run_tells_the_story_and_puts_out_what_is_committed(elsewhere, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own, which puts pictures into the notebook
    for folder in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(folder, str(elsewhere / folder))
    before, fresh = committed(), committed()
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(elsewhere)}}
    NotebookClient(fresh, kernel_name="python3", timeout=300, resources=resources).execute()
    without_what_others_log(fresh)

    assert story(fresh) == pytest.approx(story(before), rel=0.1)
    for old, new in zip(before.cells, fresh.cells, strict=True):
        if old.cell_type == "code":
            assert kinds(new) == kinds(old), old.id
            assert words(printed(new)) == words(printed(old)), old.id
            assert [table.split("\n")[0].split() for table in tables(new)] == [
                table.split("\n")[0].split() for table in tables(old)
            ], old.id


def test_what_others_log_is_told_from_what_a_cell_says():
    said = [
        ("stderr", "[IPKernelApp] WARNING | Kernel is running over TCP without encryption.\n"),
        ("stderr", "GuardWarning: no\n[IPKernelApp] WARNING | twice\n"),
        ("stderr", "W1128 07:44:26.604000 12163 torch/utils/flop_counter.py:113] triton not found\nWarning\n"),
        ("stdout", "[IPKernelApp] printed\n"),
    ]
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in said]
    kept = without_what_others_log(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=outputs)]))
    assert [each.text for each in kept.cells[0].outputs] == [
        "GuardWarning: no\n",
        "Warning\n",
        "[IPKernelApp] printed\n",
    ]


def test_the_prose_holds_no_number_that_code_or_outputs_do_not():
    cells = committed().cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    prose = re.sub(r"^## \d\.|section \d|et al\. \d{4}|\]\(.*?\)", "", prose, flags=re.M)
    code = [cell for cell in cells if cell.cell_type == "code"]
    shown = "\n".join([part for cell in code for part in (cell.source, printed(cell), *tables(cell))])
    known = set(re.findall(NUMBER, shown))
    numbers = re.findall(rf"(?<![\w.]){NUMBER}", prose)
    assert numbers and set(numbers) <= known


def test_the_file_is_small_and_holds_nothing_of_the_machine_that_ran_it():
    notebook, raw = committed(), TUTORIAL.read_text()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(not cell.metadata for cell in notebook.cells)
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(range(1, 9))
    assert len(raw) < 320_000
    texts = [part for cell in notebook.cells if cell.cell_type == "code" for part in (printed(cell), *tables(cell))]
    assert not re.search(r"(?<!\w)/\w+/|site-packages|\.py:\d", "\n".join(texts))
    for name in re.findall(r"`(\w+\.py)`", raw):
        assert Path(TUTORIAL.parent / name).exists(), name
