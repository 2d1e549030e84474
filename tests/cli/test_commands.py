"""Every command over every shipped configuration, at tiny sizes; YAML in and out; words that are wrong."""

import math
import os
import re
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from lightning_maml_guard import ConvergenceGuard, GuardWarning
from lightning_maml_guard.cli import commands as _cli_runs
from lightning_maml_guard.cli import parser
from lightning_maml_guard.cli.arguments import COMMANDS, CONFIGS, TASKS
from lightning_maml_guard.cli.main import console, main
from lightning_maml_guard.messages.spelling import multiple
from tests.helpers import full_disk, guard_warns, one_line

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
SMALL = ["--trainer.max_steps=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL += ["--trainer.accelerator=cpu", "--data.test_episodes=2", "--data.val_episodes=2"]
IMAGES = ["--model.network.filters=2", "--model.inner_steps=1", "--data.tasks.queries=1"]
PICTURES = ["--data.tasks.image_size=32", "--model.network.image_size=32"]


def words_of(task):
    small = [] if task in {"linear", "sinusoid"} else IMAGES
    return [task, *SMALL, *small, *(PICTURES if task.startswith("mini") else [])]


pytestmark = pytest.mark.usefixtures("elsewhere")
OFTEN = ("linear", "sinusoid", "omniglot", "miniimagenet")


@pytest.mark.parametrize("task", [t if t in OFTEN else pytest.param(t, marks=pytest.mark.slow) for t in TASKS])
def test_every_command_over_every_configuration(task, request, monkeypatch, capsys):
    words, drawn = [*words_of(task), "--data.meta_batch_size=1", "--model.eval_inner_steps=1"], []
    images = task not in {"linear", "sinusoid"}
    if images:
        monkeypatch.setenv("LMG_DATA", str(request.getfixturevalue("data_folder")))
        monkeypatch.setattr(_cli_runs, "_save_safe_region", lambda found, path: drawn.append(path))
    guard = (
        ["--guard=log", "--guard.lookahead.steps=0", "--guard.curvature.max_iter=2"]
        if images
        else ["--guard.lookahead.steps=2", "--guard.curvature.max_iter=4"]
    )
    trained = main(["fit", *words, *guard])
    assert trained.trainer.global_step == 1 and "test/loss" not in trained.trainer.callback_metrics
    assert trained.guard.action == ("log" if images else "warn") and len(trained.guard.history) == 1
    (checkpoint,) = Path("runs", task, "version_0").glob("checkpoints/*.ckpt")
    if images:  # most of a command's time goes into parsing: once is enough
        monkeypatch.setattr(parser, "GuardCLI", lambda *arguments, **named: trained)
        trained.config["ckpt_path"] = str(checkpoint)
    for command, key in (("validate", "val/loss"), ("test", "test/loss")):
        judged = main([command, *words, f"--ckpt_path={checkpoint}"])
        assert judged.trainer.callback_metrics[key] > 0 and (images or judged.guard is None)
        pairs = zip(judged.model.parameters(), trained.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    capsys.readouterr()
    trained.config["ckpt_path"] = None
    applied = ["--apply=out.yaml"] if task == "linear" else []  # of one sinusoid no rate trains within 5 steps
    found = main(["suggest", *words, "--batches=1", "--margin=0.4", "--steps=5", *guard, *applied]).suggestion
    assert len(found.reports) == 1 and found.ladder.steps == 5
    printed_out = capsys.readouterr().out
    assert f"suggested {found.alpha:.3g}" in printed_out
    assert images or Path("runs", "suggest", f"{task}.png").stat().st_size > 10_000
    if applied:
        written = yaml.safe_load(Path("out.yaml").read_text())["model"]["init_args"]
        assert (written["inner_lr"], written["optimizer"]["init_args"]["lr"]) == found.suggestion()


def test_phase_diagram_is_the_example(monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = main(["phase-diagram", "sinusoid", "--grid", "2", "--steps", "3", "--threads", "1", "--seeds", "2"])
    assert found["runs"] == 6 and "sinusoid: " in capsys.readouterr().out
    assert [each["seed"] for each in found["seeds"]] == [0, 1] and Path(
        "runs/phase_diagram/sinusoid_seed1.npz"
    ).exists()
    assert Path("runs/phase_diagram/sinusoid.png").stat().st_size > 10_000
    for words, said in (
        (
            ["circle"],
            "error: expected the panel to be one of linear, sinusoid, omniglot, miniimagenet, near-minimum but got "
            "'circle'.",
        ),
        (["--full", "--resampled"], "argument --resampled: not allowed with argument --full"),
        (
            ["linear", "--resampled"],
            "argument --resampled: the panel linear does not have it: leave it out, or take sinusoid, omniglot, miniimagenet.",
        ),
        (["near-minimum", "--full"], "argument --full: the panel near-minimum does not have it: leave it out"),
        (["--seeds", "0"], "argument --seeds: Expected argument `seeds` to be an integer of at least 1 but got 0"),
        (["linear", "sinusoid"], "error: unrecognized arguments: sinusoid\n"),
        (["--grid", "1"], "argument --grid: Expected argument `grid` to be an integer of at least 2 but got 1"),
        (["--steps", "0"], "argument --steps: Expected argument `steps` to be an integer of at least 1 but got 0"),
        (["--seed", "many"], "argument --seed: invalid int value: 'many'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["phase-diagram", *words])
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    said = " ".join(printed(capsys, ["phase-diagram", "--help"]).split())
    assert "16 inner rates and 4000 steps, whatever --grid and --steps say" in said


def printed(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["", "fit", "suggest"])
def test_yaml_goes_out_and_in(command, capsys, elsewhere):
    start = [command] if command else []
    words = [*start, *words_of("linear"), "--guard=rescale", "--guard.every_n_steps=7", "--model.inner_lr=0.02"]
    text = printed(capsys, [*words, "--print_config"])
    (elsewhere / "own.yaml").write_text(text)
    assert printed(capsys, [*start, "--config", "own.yaml", "--print_config"]) == text
    settings = yaml.safe_load(text)
    assert settings["guard"]["init_args"]["every_n_steps"] == 7 and settings["model"]["init_args"]["inner_lr"] == 0.02


def test_one_yaml_serves_the_other_commands(capsys, elsewhere):
    (elsewhere / "own.yaml").write_text(printed(capsys, ["fit", *words_of("linear"), "--guard", "--print_config"]))
    # A fit with it logs under the file's name, and keeps its checkpoints there.
    with guard_warns(
        r"test judges the initial parameters, .* --ckpt_path runs/own/version_N/checkpoints/NAME\.ckpt to"
    ):
        assert float(main(["test", "--config=own.yaml"]).trainer.callback_metrics["test/loss"]) > 0
    assert main(["suggest", "--config=own.yaml", "--batches=1", "--steps=8"]).suggestion.beta > 0
    main(["fit", "--config=own.yaml", "--trainer.max_steps=1"])
    assert sorted(path.name for path in Path("runs").iterdir()) == ["own", "suggest", "tensorboard"]
    (checkpoint,) = Path("runs/own").glob("version_*/checkpoints/*.ckpt")
    tested = main(["test", f"--config={checkpoint.parents[1]}/config.yaml", "--ckpt_path=last"])
    assert tested.trainer.ckpt_path == str(checkpoint)


def test_who_judges_untrained_parameters_is_told_of_the_newest_checkpoint():
    for age, kept in enumerate(("linear/version_1", "linear/version_0", "sinusoid/version_2")):
        path = Path("runs", kept, "checkpoints", "epoch=0-step=1.ckpt")
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (100 - age, 100 - age))
    for command, *dry in (["validate"], ["test"], ["test", "--trainer.fast_dev_run=true"]):
        with pytest.warns(GuardWarning) as caught:
            main([command, *words_of("linear"), *dry])
        (said,) = [one_line(each.message) for each in caught if each.category is GuardWarning]
        assert said == (
            f"{command} judges the initial parameters, as no --ckpt_path was passed. Pass --ckpt_path "
            "runs/linear/version_1/checkpoints/epoch=0-step=1.ckpt (the newest in runs/linear) to judge the trained ones."
        )


@pytest.mark.parametrize(
    ("options", "folder", "below"),
    [
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=own"], "own/lightning_logs", "version_N/checkpoints/"),
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=own", "--trainer.logger.name=mine"], "own/mine", "version_N/checkpoints/"),
        (["--trainer.logger=false", "--trainer.default_root_dir=rooted"], "rooted", "checkpoints/"),
        (["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=kept"], "kept", ""),
        (["--trainer.default_root_dir=rooted"], "runs/linear", "version_N/checkpoints/"),
    ],
)  # fmt: skip
def test_the_newest_checkpoint_is_looked_for_where_training_puts_it(options, folder, below):
    def told(*more):
        with guard_warns("judges the initial parameters") as caught:
            main(["test", *words_of("linear"), *options, *more])
        (said,) = [one_line(each.message) for each in caught if each.category is GuardWarning]
        where = re.search(r"Pass --ckpt_path (.*) to judge the trained ones\.$", said)[1]
        return where.replace(f"{Path.cwd()}/", "")

    assert told() == f"{folder}/{below}NAME.ckpt"
    main(["fit", *words_of("linear"), *options])
    (kept,) = Path(folder).glob("**/*.ckpt")
    assert told() == f"{kept} (the newest in {folder})"


def test_a_rate_that_was_not_judged_is_said_to_be(caplog):
    with caplog.at_level("INFO"):
        main(["fit", *words_of("sinusoid"), "--guard=log"])
    assert any(
        "At the last check, step 0: " in record.message and "(not judged)." in record.message
        for record in caplog.records
    )


def test_the_last_line_of_a_run_says_which_rates_were_applied_in_place_of_the_configured(caplog):
    rates = ["--model.inner_lr=1", "--model.optimizer.lr=5", "--trainer.max_steps=2", "--guard.every_n_steps=1"]
    with caplog.at_level("INFO"), guard_warns("alpha = 1 and beta = 5 are too large"):
        last = main(["fit", *words_of("linear"), *rates, "--guard=rescale"]).guard.history[-1]
    assert last.alpha_applied < 1 and last.beta_applied < 5
    (verdict,) = [one_line(record.message) for record in caplog.records if "At the last check" in record.message]
    assert f"alpha = 1 is {multiple(last.alpha_ratio)} alpha_c = {last.alpha_c:.3g}, applied as" in verdict
    assert last.beta_c == 0 and f"beta = 5 exceeds beta_c = 0, applied as {last.beta_applied:.3g}." in verdict


def test_suggest_follows_the_trainer(monkeypatch):
    asked = []
    original = _cli_runs.suggest_rates
    monkeypatch.setattr(
        _cli_runs, "suggest_rates", lambda *args, **options: asked.append(options) or original(*args, **options)
    )
    command = ["suggest", *words_of("linear"), "--batches=1", "--steps=8"]
    single = main(command).suggestion
    double = main([*command, "--trainer.precision=64-true", "--trainer.gradient_clip_val=0.5"]).suggestion
    assert double.alpha_c == pytest.approx(single.alpha_c, rel=1e-4) and double.alpha_c != single.alpha_c
    assert [options["gradient_clip_val"] for options in asked] == [None, 0.5]


def test_the_linear_task_learns_its_one_task_and_no_other():
    """As its help says: the test loss rises where training's falls, and not where the tasks are drawn anew."""
    words = ["linear", *SMALL, "--data.val_episodes=0", "--trainer.max_steps=200", "--data.test_episodes=100"]
    with guard_warns("initial parameters"):
        before = main(["test", *words]).trainer
    fixed, drawn = (
        main([*words, *more]).trainer for more in ([], ["--data.resample=true", "--data.meta_batch_size=9"])
    )
    tested = [float(trainer.callback_metrics["test/loss"]) for trainer in (before, fixed, drawn)]
    assert tested[1] > 1.5 * tested[0] > 1.4 * tested[2]
    learned = pd.read_csv(Path(fixed.log_dir, "metrics.csv"))["train/loss"].dropna()
    assert learned.iloc[-1] < 0.1**2  # the variance of the noise


def test_what_fit_suggests_is_what_fit_takes():
    words = words_of("linear")
    found = main(["suggest", *words, "--batches=1", "--steps=8", "--apply=out.yaml"]).suggestion
    guard = main(["fit", "--config=out.yaml", "--guard=log", "--trainer.max_steps=1"]).guard
    assert (guard.history[0].alpha, guard.history[0].beta) == pytest.approx(found.suggestion())
    assert guard.history[0].status in {"safe", "edge"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["fitt"],
            "expected the task to be one of linear, .* but got 'fitt'. Before it may stand one of fit, validate",
        ),
        (["fit", "cifar"], "but got 'cifar'"),
        (
            ["validate", "linear", "--guard"],
            "error: validate trains nothing, so --guard has nothing to watch. Leave it",
        ),
        (["test", "linear", "--guard.margin=1"], "error: test trains nothing, so --guard has nothing to watch"),
        (["suggest", "linear", "--ckpt_path=x.ckpt"], "suggest measures the network as initialised, so it takes no"),
    ],
)
def test_wrong_words_are_explained(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_help_tells_what_each_command_does(capsys):
    text = printed(capsys, ["--help"])
    assert text.startswith("usage: lightning-maml-guard [linear|sinusoid|")
    for command in COMMANDS:
        assert re.search(rf"^  {command} +[A-Z]", text, re.M), command
    assert all(len(line) <= 120 for line in text[: text.index("omniglot trains 300 steps")].splitlines()[3:])
    assert "linear trains on one fixed task, as Takagi et al. assume: its test loss, on other tasks, rises" in text
    said = " ".join(printed(capsys, ["suggest", "--help"]).split())
    assert "usage: lightning-maml-guard suggest " in said
    assert "up to --margin M (default 0.25) of the largest outer rate that trains" in said and "--guard" in said
    assert "--guard" not in printed(capsys, ["test", "--help"])


def test_the_installed_command_returns_nothing_for_its_exit_status():
    entry = re.findall(r"^lightning-maml-guard = (.*)$", PYPROJECT.read_text(), re.M)
    assert entry == ['"lightning_maml_guard.cli.main:console"']


def test_console_runs_main(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-maml-guard", "fit", *words_of("linear")])
    assert console() is None
    assert list(Path("runs", "linear").glob("version_0/checkpoints/*.ckpt"))


def test_a_run_says_what_concerns_its_user_and_no_more(capsys, caplog, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    words = [
        "linear",
        *SMALL,
        "--data.val_episodes=0",
        "--data.steps_per_epoch=2",
        "--trainer.enable_progress_bar=true",
    ]

    def said(*more):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ran = main([*more[:1], *words, *more[1:]])
        return ran, " ".join(str(each.message) for each in caught), capsys.readouterr().out

    with caplog.at_level("INFO"):
        trained, warned, shown = said("fit", "--guard=log", "--guard.every_n_steps=3", "--trainer.max_steps=4")
    assert trained.trainer.global_step == 4 and "Epoch 1 " in shown and "/-" not in shown
    last = trained.guard.history[-1]
    (verdict,) = [one_line(record.message) for record in caplog.records if "At the last check" in record.message]
    assert verdict == one_line(trained.guard.summary()) and f"2 checks: 2 {last.status}; " in verdict
    (checkpoint,) = Path("runs/linear/version_0/checkpoints").glob("*.ckpt")
    told = warned + said("test", f"--ckpt_path={checkpoint}")[1]
    for pointless in (
        "LeafSpec",
        "Total length",
        "Skipping val loop",
        "callbacks used to create",
        "dirpath",
        "workers",
    ):
        assert pointless not in told
    bounded, _, shown = said("fit", "--trainer.max_steps=9", "--trainer.max_epochs=2")
    assert bounded.trainer.global_step == 4 and "Epoch 1/1" in shown
    # Whoever trains on without the guard is told that it is missing.
    told = said("fit", "--trainer.max_steps=5", f"--ckpt_path={checkpoint}", "--data.num_workers=1")[1]
    assert "callbacks used to create" in told and "ConvergenceGuard{" in told and "not have many workers" in told


def test_a_training_that_diverged_says_so_before_its_test(elsewhere, caplog):
    (elsewhere / "mine.yaml").write_text((CONFIGS / "linear.yaml").read_text())
    words = ["--config=mine.yaml", *SMALL, "--model.optimizer.lr=3e38"]
    with caplog.at_level("INFO"):
        tested = main(words)
        with guard_warns("Set the optimizer's lr to"):
            guard = main(["fit", *words, "--trainer.max_steps=3", "--guard"]).guard
    assert math.isnan(tested.trainer.callback_metrics["test/loss"])
    assert Path("runs/mine/version_1/safe_region.png").exists() and not Path("runs/sinusoid").exists()
    first, second = (one_line(record.message) for record in caplog.records if "raining diverged" in record.message)
    assert first == (
        "The training diverged: its parameters are not finite. Run it again with --guard, which tells the rate to "
        "lower; --guard rescale lowers it."
    )
    assert second == f"The training diverged: its last loss is nan. The guard's advice: {guard.advice}"
    assert 0 < guard.advice.beta < guard.history[0].beta_c and guard.advice.cause == "beta"
    silent = _cli_runs._what_to_do(ConvergenceGuard(action="log"))
    assert silent.startswith("--guard log warns of nothing: --guard tells the rate to lower")
    unseen = _cli_runs._what_to_do(ConvergenceGuard())
    assert unseen == "No check of the guard saw it coming: --guard.every_n_steps 5 looks more often."


@pytest.mark.parametrize("blocked", [False, True])
def test_a_picture_that_cannot_be_written_costs_a_warning_and_leaves_the_older_one(tmp_path, blocked):
    class Drawable:
        def plot(self):
            figure = Figure()
            figure.subplots().plot([1, 2])
            return figure, None

    folder = tmp_path / "runs"
    path = folder / "safe_region.png"
    folder.mkdir()
    path.write_bytes(b"older")
    if blocked:  # as a read-only folder is: no file can be made in it
        path = path / "more" / "safe_region.png"
    with guard_warns(r"the picture of the safe region could not be written to .*Error: ") as caught, full_disk(100):
        _cli_runs._save_safe_region(Drawable(), path)
    assert (folder / "safe_region.png").read_bytes() == b"older" and len(list(folder.iterdir())) == 1
    assert len(caught) == 1
    if not blocked:
        _cli_runs._save_safe_region(Drawable(), path)
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_mode & 0o777 == 0o644
