"""The report of a run: one page, complete, escaped, and drawn by a browser."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from matplotlib.text import Text
from PIL import Image

from lightning_maml_guard import ConvergenceGuard
from lightning_maml_guard.guard.report import record_of
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.messages.spelling import IN_PYTHON
from lightning_maml_guard.pages.events import happened
from lightning_maml_guard.plots import ritz_values, run_history, safe_region, style
from lightning_maml_guard.stability.estimators import Spectrum
from tests.helpers import fit, full_disk, guard_warns, linear_module, quadratic_batch

BATCH = quadratic_batch([0.3, 1.0, 2.0, 4.0], target=1.0)
VOID = {"meta", "br", "hr", "wbr", "img", "link"}


class Checked(HTMLParser):
    """Tags that close as they opened, with what they hold."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text, self.links = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in {"src", "href", "xlink:href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in {"src", "href", "xlink:href"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(html):
    parser = Checked()
    parser.feed(html)
    assert not parser.open
    assert all(link.startswith(("#", "data:")) for link in parser.links), parser.links
    assert not re.search(r"@import|url\((?!#)|<script|<link", html)
    parser.words = " ".join(" ".join(parser.text).split())
    return parser


@pytest.fixture(scope="module")
def rescued():
    guard = ConvergenceGuard(every_n_steps=2, action="rescale", margin=0.9)
    with guard_warns("is too large"):
        fit(linear_module(4, 1.5, inner_lr=0.05, order="simplified"), BATCH, 10, [guard])
    return guard


@pytest.fixture(scope="module")
def written(rescued, tmp_path_factory):
    return rescued.report(tmp_path_factory.mktemp("page") / "run.html")


def test_the_page_holds_the_run(rescued, written):
    page = checked(written.read_text(encoding="utf-8"))
    assert page.seen.count("svg") == 2 * 3  # for a wide page and a phone; one spectrum: the last is the sharpest
    for title in ("The run", "Safe region", "Spectrum", "What happened", "Configuration", "Versions"):
        assert title in page.words
    assert "5 checks, steps 0 to 8" in page.words
    last = rescued._run.state.losses.final
    assert f"Trained 10 steps; the loss went from 4.15 to {last:.3g}" in page.words
    assert f"To do: {rescued.advice}" in page.words
    assert re.search(r"0 unsafe first check beta = 1.5 is 2.4x beta_c = 0.625", page.words)
    assert f"capped beta 1.5 → {rescued.history[0].beta_applied:.3g}" in page.words
    assert "Lower the optimizer's lr" not in page.words  # the advice says what to do
    assert "margin 0.9" in page.words and "pytorch-lightning 2." in page.words


def test_a_resumed_run_has_the_same_page(rescued, written, tmp_path):
    resumed = ConvergenceGuard(every_n_steps=2, action="rescale", margin=0.9)
    resumed.load_state_dict(rescued.state_dict())
    assert checked(resumed.report(tmp_path / "a.html").read_text()).words == checked(written.read_text()).words


def test_no_check_one_check_and_nothing_measured_have_their_page(rescued, tmp_path):
    assert "No check was made yet." in checked(ConvergenceGuard().report(tmp_path / "c.html").read_text()).words
    one = ConvergenceGuard()
    one._run.state.history = rescued.history[:1]
    assert "1 check, step 0" in checked(one.report(str(tmp_path / "d.html")).read_text()).words
    blind, nothing = ConvergenceGuard(), dict.fromkeys(("alpha_c", "beta_c", "safe_beta_c", "lambda_max"), math.nan)
    blind._run.state.history = [
        dataclasses.replace(rescued.history[0], status="unresolved", spectrum=Spectrum(), severity=math.nan, **nothing)
    ]
    page = checked(blind.report(tmp_path / "e.html").read_text())
    assert "unresolved" in page.words and page.seen.count("svg") == 2


def test_what_comes_from_the_user_is_escaped(rescued, tmp_path):
    def problem(module, batch):
        raise ValueError("<script>alert('x')</script>")

    problem.__qualname__ = "<img src=x onerror=alert(1)>"
    guard = ConvergenceGuard(problem=problem)
    with guard_warns("ValueError: <script>"):
        fit(linear_module(4, 0.1), BATCH, 2, [guard])
    html = guard.report(tmp_path / "run.html").read_text()
    assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)" in html and "&lt;img src=x onerror" in html


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got '.*gone/run.html': there is no folder '.*gone'. Make it first"):
        ConvergenceGuard().report(tmp_path / "gone" / "run.html")


def test_on_a_full_disk_an_older_report_stays_and_there_is_a_warning(tmp_path):
    guard, path = ConvergenceGuard(), tmp_path / "run.html"
    path.write_text("older")
    said = r"the report could not be written to .*run.html; .*OSError: .*To do: Make room"
    with guard_warns(said) as caught, full_disk():
        assert guard.report(path) == path
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path] and len(caught) == 1
    assert "ConvergenceGuard: report of a run" in guard.report(path).read_text()
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that not even root can write to")
def test_in_a_folder_that_cannot_be_written_to_there_is_a_warning():
    with guard_warns(r"the report could not be written to /proc/run.html; .*Cause: \w+Error: .*To do: Make room"):
        ConvergenceGuard().report("/proc/run.html")


def test_rollbacks_and_stops_are_told_and_survive_a_checkpoint(tmp_path):
    stopped = ConvergenceGuard(action="stop")
    with guard_warns("Training stops"):
        fit(linear_module(4, 1.5, inner_lr=0.05, order="simplified"), BATCH, 5, [stopped])
    again = ConvergenceGuard(action="stop")
    assert again.settings()["every_n_steps"] is None  # as given, not as counted
    again.load_state_dict(stopped.state_dict())
    told = happened(again.history, again.events, IN_PYTHON)
    assert [event.kind for event in told] == ["unsafe", "stopped"] and "beta = 1.5 is 2.4x" in told[1].why
    assert told[0].why.endswith(f"To do: {stopped.advice}") and "Lower the optimizer's lr" not in told[0].why
    again._run.state.history = []
    words = checked(again.report(tmp_path / "run.html").read_text()).words
    assert "Stopped at step 0." in words
    rolled = ConvergenceGuard(every_n_steps=5, action="rescale", rollback=True)
    back = Reason(Kind.ROLLED_BACK, losses=(9.0, math.nan, math.nan), step=7, steps=5, counts=(1, 10), beta=0.1)
    rolled._run.state.add_event("rolled back", back, step=7)
    assert "7 rolled back The loss was 9 at step 7" in checked(rolled.report(tmp_path / "r.html").read_text()).words


def test_caps_are_told_as_they_move(rescued):
    moves = [event for event in happened(rescued.history, [], IN_PYTHON) if event.kind in {"capped", "released"}]
    applied = [report.beta_applied for report in rescued.history]
    assert len(moves) == sum(a != b for a, b in zip([math.inf, *applied], applied, strict=False))
    assert moves[0].kind == "capped" and all(move.kind == "released" for move in moves[1:])


def roll_back(guard, at, to, loss=9.0):
    reason = Reason(Kind.ROLLED_BACK, losses=(loss, math.nan, math.nan), step=at, steps=to, counts=(1, 10), beta=0.1)
    guard._run.state.add_event("rolled back", reason, step=at)


def test_no_spectrum_of_rolled_back_parameters_is_shown_without_saying_so(rescued, tmp_path):
    guard = ConvergenceGuard()
    guard._run.state.history = [dataclasses.replace(each) for each in rescued.history]
    roll_back(guard, at=9, to=5)
    words = checked(guard.report(tmp_path / "a.html").read_text()).words
    said = "These parameters were rolled back at step 9: training did not go on with them."
    assert words.count(said) == 2  # below the spectrum, and above the last check's numbers
    guard._run.state.events = []
    roll_back(guard, at=8, to=2)
    roll_back(guard, at=8, to=2)
    words = checked(guard.report(tmp_path / "b.html").read_text()).words
    assert "Measured at step 8, after the rollback to step 2" in words
    assert "Diverged at step 8; rolled back to 2 (rollback 2)" in words


def sizes(figure):
    """Font sizes in CSS pixels of all text that a figure shows."""
    return [each.get_fontsize() * 96 / 72 for each in figure.findobj(Text) if each.get_text() and each.get_visible()]


def test_on_a_phone_pictures_fit_the_screen_and_no_text_is_below_11_px(rescued):
    record = record_of(rescued, rescued._run.state, rescued._run.clock)
    figures = [
        run_history(record.history, severities=record.severities, losses=record.losses, width=style.NARROW)[0],
        style.new_figure(style.NARROW, 3.1),
        style.new_figure(style.NARROW, 3.1),
    ]
    safe_region(record.history, figures[1].subplots())
    ritz_values(record.history[-1], figures[2].subplots())
    for figure in figures:
        assert figure.get_figwidth() * 96 <= 390 - 2 * 16
        assert min(sizes(figure)) > 11
        figure.canvas.draw()
        inside, ends = figure.bbox, figure.get_tightbbox()
        assert ends.x0 * figure.dpi > inside.x0 - 1 and ends.x1 * figure.dpi < inside.x1 + 1  # nothing is cut off


CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


def browsed(url, picture, width, scheme):
    """What a browser draws; it must have nothing to complain about."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},1500",
        f"--user-data-dir={picture.with_suffix('')}", f"--blink-settings=preferredColorScheme={scheme}",
        "--allow-file-access-from-files", "--enable-logging=stderr", f"--screenshot={picture}", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.exists(), done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    return Image.open(picture).convert("L")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
def test_a_browser_draws_it_without_a_word_of_complaint_in_light_and_dark(written, tmp_path):
    means = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        pixels = list(browsed(written.as_uri(), tmp_path / f"{scheme}.png", 1000, number).resize((100, 150)).tobytes())
        means[scheme] = sum(pixels) / len(pixels)
    assert means["dark"] < 70 < 200 < means["light"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
def test_at_390_px_nothing_has_to_be_scrolled_sideways(written, tmp_path):
    frame, probe = tmp_path / "frame.html", "document.getElementById('f').contentDocument.documentElement"
    # No window of Chromium is as narrow as a phone: a frame is. The script asks it, and writes the answer.
    frame.write_text(
        f"<body><iframe id=f src={written.as_uri()} style='width:390px;height:9000px;border:0'></iframe><p id=a></p>"
        f"<script>onload = () => {{ const d = {probe}; const shown = [...d.querySelectorAll('svg')].filter(e => "
        "e.getBoundingClientRect().width > 0); document.getElementById('a').textContent = JSON.stringify([d.scrollWidth, "
        "shown.length, ...shown.map(e => e.getBoundingClientRect().width)]); }}</script>".replace("}}", "}")
    )
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
        f"--user-data-dir={tmp_path / 'chromium'}", "--virtual-time-budget=5000", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (answer,) = re.findall(r'<p id="a">(.*?)</p>', done.stdout)
    wide, count, *widths = json.loads(answer)
    assert wide <= 390 and count == 3
    # As wide as they are drawn, so that their text is as large as it is drawn.
    assert all(style.NARROW * 96 * 0.98 <= width <= 390 for width in widths)
