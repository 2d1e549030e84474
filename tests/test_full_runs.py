"""The examples at their full length: minutes each, ``pytest -m slow``."""

import pytest
import torch

from lightning_maml_guard.cli.main import main
from lightning_maml_guard.messages.advice import Cause

pytestmark = pytest.mark.slow
QUIET = ["--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
def test_sinusoid_reaches_its_error_and_the_guard_leaves_no_trace():
    guarded = main(["sinusoid", "--guard", *QUIET])
    assert float(guarded.trainer.callback_metrics["test/loss"]) <= 0.55
    plain = main(["sinusoid", *QUIET])
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), guarded.model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
def test_omniglot_learns_well_above_chance(data_folder, monkeypatch):
    monkeypatch.setenv("LMG_DATA", str(data_folder))
    cli = main(["omniglot", "--guard", "--guard.every_n_steps", "50", *QUIET])
    assert float(cli.trainer.callback_metrics["test/accuracy"]) > 0.6  # chance is 0.2
    tops = [report.lambda_max for report in cli.guard.history]
    assert len(set(tops)) == len(tops) == 6 and all(0 < top < float("inf") for top in tops)


@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
@pytest.mark.parametrize(("lr", "cause"), [("0.001", None), ("0.03", Cause.BETA)])
def test_omniglots_published_inner_rate_is_not_blamed(data_folder, monkeypatch, lr, cause):
    """It is far above its limit and harms at first, and lower ones memorise the tasks at hand sooner."""
    monkeypatch.setenv("LMG_DATA", str(data_folder))
    short = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--data.test_episodes", "2"]
    cli = main(["omniglot", "--guard", "log", "--model.optimizer.init_args.lr", lr, *short, *QUIET])
    assert cli.guard.history[0].alpha_ratio > 10
    advice = cli.guard.advice
    assert (None if advice is None else advice.cause) == cause
