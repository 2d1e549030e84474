"""What a user reads in the terminal: the bar and the warnings."""

import dataclasses
import io
from types import SimpleNamespace

import pytest
from lightning_maml_guard.guard.console import Gauges, styles
from lightning_maml_guard.guard.messages import block
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import RichProgressBarTheme

from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, GuardWarning, measure
from tests.helpers import fit, linear_module, quadratic_batch

BATCH = quadratic_batch([0.3, 1.0, 2.0, 4.0], target=1.0)


def module(beta=0.9):
    return linear_module(4, beta, inner_lr=0.05, order="simplified")


def report(**changes):
    return dataclasses.replace(
        measure(module().meta_problem(BATCH), beta=0.1, curvature=CurvatureOptions(criterion="simplified")), **changes
    )


def test_a_ratio_within_its_limit_is_green_and_the_one_to_lower_has_the_colour_of_the_state():
    def of(status, alpha, beta):
        found = styles(report(status=status, alpha_status=alpha, beta_status=beta))
        return found.get("guard/alpha_ratio"), found.get("guard/beta_ratio")

    assert of("safe", "safe", "safe") == ("green", "green")
    assert of("edge", "safe", "unsafe") == ("green", "yellow")
    assert of("unsafe", "safe", "unsafe") == ("green", "bold red")
    assert of("unsafe", "safe", "safe") == ("bold red", "bold red")  # the trial alone says so
    assert of("unresolved", "safe", "unresolved") == ("green", None)


class Mine(RichProgressBar):
    """A user's own bar: its metrics, its theme, a column of its own."""

    def get_metrics(self, trainer, pl_module):
        return {**super().get_metrics(trainer, pl_module), "mine": 7.0}


def test_the_users_own_rich_bar_shows_both_ratios_in_colour():
    out = io.StringIO()
    theme = RichProgressBarTheme(metrics="italic", metrics_text_delimiter=" | ", metrics_format=".2f")
    options = {"file": out, "force_terminal": True, "width": 180, "color_system": "standard"}
    bar = Mine(leave=True, theme=theme, console_kwargs=options)
    guard = ConvergenceGuard(every_n_steps=100, action="log")
    fit(module(), BATCH, 6, [bar, guard], enable_progress_bar=True, max_epochs=2, max_steps=-1)
    assert type(bar.progress.columns[-1]).__name__ == "Coloured" and len(guard.history) == 1
    drawn = out.getvalue()
    ratios = guard.history[-1]
    assert f"\x1b[3;32malpha_ratio: {ratios.alpha_ratio:.2f}\x1b[0m" in drawn
    assert f"\x1b[1;3;31mbeta_ratio: {ratios.beta_ratio:.2f}\x1b[0m" in drawn
    assert "mine: 7.00" in drawn
    # The bar of the second epoch is a new one, and no check came in between.
    assert "\x1b[1;3;31mbeta_ratio" in drawn[drawn.index("Epoch 1") :]


def test_in_a_narrow_terminal_rich_cuts_no_name():
    out = io.StringIO()
    # What 80 columns leave to the metrics of some hundred steps, 78 leave to those of six.
    bar = RichProgressBar(leave=True, console_kwargs={"file": out, "force_terminal": True, "width": 78})
    guard = ConvergenceGuard(every_n_steps=2, action="log")
    trainer = fit(module(), BATCH, 6, [bar, guard], enable_progress_bar=True)
    last = out.getvalue()[out.getvalue().rindex("Epoch 0") :]
    assert "alpha_ratio:" in last and "beta_ratio:" in last and "\N{HORIZONTAL ELLIPSIS}" not in last
    assert "guard/alpha_ratio" in trainer.progress_bar_metrics  # the name it is logged by


def test_a_wrapped_column_is_wrapped_once_and_other_columns_are_left_alone():
    from lightning_maml_guard.guard.rich_column import coloured

    bar = RichProgressBar()
    bar._init_progress(SimpleNamespace())
    bar._stop_progress()
    once = coloured(bar.progress.columns, {"a": "red"})
    twice = coloured(once, {"a": "green"})
    assert once == twice and once[:-1] == tuple(bar.progress.columns[:-1]) and twice[-1].styles == {"a": "green"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("file", "chosen", "expected"),
    [(Terminal, None, "yellow"), (Terminal, "#00ff00", "#00ff00"), (io.StringIO, None, None)],
)
def test_tqdms_bar_is_coloured_in_a_terminal_unless_the_user_chose(file, chosen, expected):
    bar = SimpleNamespace(
        init_train_tqdm=None, train_progress_bar=SimpleNamespace(disable=False, colour=chosen, fp=file())
    )
    trainer = SimpleNamespace(progress_bar_callback=bar)
    gauges = Gauges()
    gauges.show(trainer, report(status="edge"))
    assert bar.train_progress_bar.colour == expected
    gauges.show(trainer, report(status="safe"))
    assert bar.train_progress_bar.colour == chosen


@pytest.mark.parametrize("arguments", [{"callbacks": (TQDMProgressBar(),), "enable_progress_bar": True}, {}])
def test_tqdm_shows_the_ratios_and_no_bar_is_no_trouble(arguments, capsys):
    guard = ConvergenceGuard(every_n_steps=2, action="log")
    callbacks = [*arguments.get("callbacks", ()), guard]
    fit(module(), BATCH, 4, callbacks, **{k: v for k, v in arguments.items() if k != "callbacks"})
    assert len(guard.history) == 2 and not guard._run.course.events
    shown = capsys.readouterr().out
    assert ("guard/beta_ratio=1.440" in shown and "guard/alpha_ratio=0.200" in shown) == bool(arguments)


def test_a_warning_is_one_readable_block():
    with pytest.warns(GuardWarning) as caught:
        fit(module(beta=1.5), BATCH, 2, [ConvergenceGuard(action="rescale")])
    (said,) = [str(each.message) for each in caught if each.category is GuardWarning]
    lines = said.splitlines()
    assert lines[0] == "ConvergenceGuard: the learning rates left the safe region at step 0."
    assert all(line.startswith("  ") and len(line) <= 100 for line in lines[1:])
    heads = [line.split(":")[0].strip() for line in lines[1:] if not line.startswith("    ")]
    assert heads == ["Why", "Why", "To do", "Applied from now on"]


def test_a_block_breaks_lines_but_no_words():
    path = "/a/very-long/" + "x" * 120
    laid = block(
        f"ConvergenceGuard: something happened to a file that has a name which is long.\nCause: {path} is gone"
    )
    assert path in laid and laid.splitlines()[0].startswith("ConvergenceGuard: something")
    assert block("short") == "short"
