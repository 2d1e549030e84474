"""What a user reads in the terminal: the bar and the warnings."""

import contextlib
import fcntl
import io
import logging
import os
import re
import struct
import subprocess
import sys
import termios

import pytest
from lightning_utilities.core import rank_zero
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.console import Console
from rich.live import Live

from lightning_maml_guard import ConvergenceGuard, GuardWarning
from lightning_maml_guard.messages.spelling import block
from lightning_maml_guard.messages.terminal import inform
from tests.helpers import fit, linear_module, quadratic_batch

BATCH = quadratic_batch([0.3, 1.0, 2.0, 4.0], target=1.0)


def module(beta=0.9):
    return linear_module(4, beta, inner_lr=0.05, order="simplified")


class Mine(RichProgressBar):
    """A user's own bar: its metrics, its theme."""

    def get_metrics(self, trainer, pl_module):
        return {**super().get_metrics(trainer, pl_module), "mine": 7.0}


def test_the_users_own_rich_bar_shows_both_ratios():
    out = io.StringIO()
    theme = RichProgressBarTheme(metrics_text_delimiter=" | ", metrics_format=".2f")
    options = {"file": out, "force_terminal": True, "width": 180, "color_system": None}
    bar = Mine(leave=True, theme=theme, console_kwargs=options)
    guard = ConvergenceGuard(every_n_steps=100, action="log")
    trainer = fit(module(), BATCH, 6, [bar, guard], enable_progress_bar=True, max_epochs=2, max_steps=-1)
    assert len(guard.history) == 1
    drawn, ratios = out.getvalue(), guard.history[-1]
    assert f"a/ac: {ratios.alpha_ratio:.2f}" in drawn
    assert "mine: 7.00" in drawn
    # The bar of the second epoch is a new one, and no check came in between.
    assert f"b/bc: {ratios.beta_ratio:.2f}" in drawn[drawn.index("Epoch 1") :]
    assert list(trainer.progress_bar_metrics) == ["train/loss", "a/ac", "b/bc"]


@pytest.mark.parametrize("arguments", [{"callbacks": (TQDMProgressBar(),), "enable_progress_bar": True}, {}])
def test_tqdm_shows_the_ratios_and_no_bar_is_no_trouble(arguments, capsys):
    guard = ConvergenceGuard(every_n_steps=2, action="log")
    callbacks = [*arguments.get("callbacks", ()), guard]
    fit(module(), BATCH, 4, callbacks, **{k: v for k, v in arguments.items() if k != "callbacks"})
    assert len(guard.history) == 2 and not guard.events
    shown = capsys.readouterr().out
    # tqdm 4.57 cuts the rest where there is no terminal.
    assert ("a/ac=0.200, b/b" in shown) == bool(arguments)


def test_in_80_columns_the_users_loss_is_seen_and_a_message_stands_on_lines_of_its_own(tmp_path):
    """In a process of its own, on a terminal of its own."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    shown = in_terminal([sys.executable, str(program)], columns=80)
    assert not re.search(r"loggers\.py|terminal\.py|GuardWarning", shown)
    screen = screen_of(shown)
    ours = [i for i, line in enumerate(screen) if "ConvergenceGuard:" in line]
    assert len(ours) == 3 and all(screen[i].startswith("ConvergenceGuard:") for i in ours)
    told = [screen[ours[0]]]
    for line in screen[ours[0] + 1 :]:
        if not line.startswith("  "):
            break
        told.append(line)
    assert all(len(line) <= 80 for line in told) and len(told) > 5
    words = " ".join(" ".join(told).split())
    said = re.match(
        r"ConvergenceGuard: step 0: beta = 1\.5 is too large\. Set the optimizer's lr to (0\.\d+)\. Why: ", words
    )
    assert said is not None and 0.03 < float(said[1]) < 0.3
    assert "each step multiplies the error by 3.8" in words and words.endswith("(action='rescale').")
    bars = [part for part in re.split(r"[\r\n]", shown) if part.startswith("Epoch 0:  75%")]
    assert len(bars[-1]) <= 80 and "train/loss=" in bars[-1] and "a/ac=0.2" in bars[-1]


PROGRAM = """
from pytorch_lightning.callbacks import TQDMProgressBar
from lightning_maml_guard import ConvergenceGuard
from tests.helpers import fit, linear_module, quadratic_batch

batch = quadratic_batch([0.3, 1.0, 2.0, 4.0], target=1.0)
module = linear_module(4, 1.5, inner_lr=0.05, order="simplified")
guard = ConvergenceGuard(every_n_steps=2, action="rescale")
fit(module, batch, 4, [TQDMProgressBar(refresh_rate=1), guard], enable_progress_bar=True)
"""


def test_what_is_logged_stands_above_a_rich_bar(monkeypatch):
    plain, drawn = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stderr", plain)
    handler = logging.StreamHandler()
    monkeypatch.setattr(rank_zero.log, "handlers", [handler])
    with Live("a bar", console=Console(file=drawn, force_terminal=True)):
        inform("said above it")
        assert handler.stream is plain
    inform("said after it")
    assert "said above it" in drawn.getvalue() and plain.getvalue() == "said after it\n"


def in_terminal(command, columns):
    """Run a command on a terminal so wide, and return what it wrote there."""
    inside, outside = os.openpty()
    fcntl.ioctl(outside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    options = {"stdin": outside, "stdout": outside, "stderr": outside, "close_fds": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **options) as process:
        os.close(outside)
        written = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while piece := os.read(inside, 65536):
                written += piece
    os.close(inside)
    assert process.returncode == 0, written.decode()
    return written.decode().replace("\r\n", "\n")


def screen_of(written):
    """What stands on a terminal after this was written: a carriage return goes back to the line's start."""
    lines = []
    for line in written.replace("\x1b[A", "").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_a_warning_is_one_readable_block():
    with pytest.warns(GuardWarning) as caught:
        fit(module(beta=1.5), BATCH, 2, [ConvergenceGuard(action="rescale")])
    (said,) = [str(each.message) for each in caught if each.category is GuardWarning]
    lines = said.splitlines()
    first = r"ConvergenceGuard: step 0: beta = 1\.5 is too large\. Set the optimizer's lr to 0\.\d+\. Why: "
    assert re.match(first, " ".join(said.split()))
    assert all(line.startswith("  ") and len(line) <= 100 for line in lines[1:])
    heads = [line.split(":")[0].strip() for line in lines[1:] if ":" in line and not line.startswith("    ")]
    assert heads == ["Why", "Why", "Why", "Applied from now on"]


def test_a_block_breaks_lines_but_no_words():
    path = "/a/very-long/" + "x" * 120
    laid = block(
        f"ConvergenceGuard: something happened to a file that has a name which is long.\nCause: {path} is gone"
    )
    assert path in laid and laid.splitlines()[0].startswith("ConvergenceGuard: something")
    assert block("short") == "short"
