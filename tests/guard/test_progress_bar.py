"""What a user reads in the terminal: the bar and the warnings."""

import io
import re

import pytest
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import RichProgressBarTheme

from lightning_maml_guard import ConvergenceGuard, GuardWarning
from lightning_maml_guard.messages.spelling import block
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
    assert f"guard/alpha_ratio: {ratios.alpha_ratio:.2f}" in drawn
    assert "mine: 7.00" in drawn
    # The bar of the second epoch is a new one, and no check came in between.
    assert f"guard/beta_ratio: {ratios.beta_ratio:.2f}" in drawn[drawn.index("Epoch 1") :]
    assert {"guard/alpha_ratio", "guard/beta_ratio"} <= set(trainer.progress_bar_metrics)


@pytest.mark.parametrize("arguments", [{"callbacks": (TQDMProgressBar(),), "enable_progress_bar": True}, {}])
def test_tqdm_shows_the_ratios_and_no_bar_is_no_trouble(arguments, capsys):
    guard = ConvergenceGuard(every_n_steps=2, action="log")
    callbacks = [*arguments.get("callbacks", ()), guard]
    fit(module(), BATCH, 4, callbacks, **{k: v for k, v in arguments.items() if k != "callbacks"})
    assert len(guard.history) == 2 and not guard.events
    shown = capsys.readouterr().out
    assert ("guard/beta_ratio=1.440" in shown and "guard/alpha_ratio=0.200" in shown) == bool(arguments)


def test_a_warning_is_one_readable_block():
    with pytest.warns(GuardWarning) as caught:
        fit(module(beta=1.5), BATCH, 2, [ConvergenceGuard(action="rescale")])
    (said,) = [str(each.message) for each in caught if each.category is GuardWarning]
    lines = said.splitlines()
    assert re.fullmatch(
        r"ConvergenceGuard: step 0: beta = 1\.5 is too large\. Set the optimizer's lr to 0\.\d+\.", lines[0]
    )
    assert all(line.startswith("  ") and len(line) <= 100 for line in lines[1:])
    heads = [line.split(":")[0].strip() for line in lines[1:] if not line.startswith("    ")]
    assert heads == ["Why", "Why", "Why", "Applied from now on"]


def test_a_block_breaks_lines_but_no_words():
    path = "/a/very-long/" + "x" * 120
    laid = block(
        f"ConvergenceGuard: something happened to a file that has a name which is long.\nCause: {path} is gone"
    )
    assert path in laid and laid.splitlines()[0].startswith("ConvergenceGuard: something")
    assert block("short") == "short"
