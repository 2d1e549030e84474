import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from lightning_maml_guard import MetaLearningModule, __version__
from lightning_maml_guard.cli.arguments import CONFIGS, TASKS, _position, run_name, translate
from lightning_maml_guard.cli.main import main
from lightning_maml_guard.cli.parser import OptionSpelling, StepBar
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.utils.lightning_compat import Trainer
from tests.helpers import guard_warns

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = [
    "--trainer.max_steps",
    "4",
    "--trainer.enable_progress_bar",
    "false",
    "--data.test_episodes",
    "10",
    "--data.val_episodes",
    "0",
]


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["--config", "sinusoid.yaml"]),
        (["linear"], ["--config", "linear.yaml"]),
        (["--guard"], ["--config", "sinusoid.yaml", "GUARD", "--guard.action=warn"]),
        (
            ["omniglot", "--guard", "stop", "--x", "1"],
            ["--config", "omniglot.yaml", "GUARD", "--guard.action=stop", "--x", "1"],
        ),
        (["--guard=log"], ["--config", "sinusoid.yaml", "GUARD", "--guard.action=log"]),
        (
            ["--guard", "--guard.margin", "0.9"],
            ["--config", "sinusoid.yaml", "GUARD", "--guard.action=warn", "--guard.margin", "0.9"],
        ),
        (["--config", "own.yaml"], ["--config", "own.yaml"]),
        (["linear", "--config", "own.yaml"], ["--config", "linear.yaml", "--config", "own.yaml"]),
    ],
)
def test_words_become_options(words, expected):
    expected = [str(CONFIGS / w) if w.endswith(".yaml") and (CONFIGS / w).exists() else w for w in expected]
    expected = ["--guard=lightning_maml_guard.ConvergenceGuard" if w == "GUARD" else w for w in expected]
    assert translate(words) == expected


def test_tasks_are_the_files_of_configs_from_simple_to_hard():
    assert sorted(TASKS) == sorted(path.stem for path in CONFIGS.iterdir())
    assert sorted(["cifar", *TASKS, "omniglot_30way"], key=_position) == [*TASKS[:5], "omniglot_30way", *TASKS[5:], "cifar"]  # fmt: skip


def test_a_run_has_the_name_of_its_task_or_of_its_own_configuration():
    for words, name in (
        ("", "sinusoid"),
        ("--guard log", "sinusoid"),
        ("omniglot --guard", "omniglot"),
        ("--config somewhere/own.yaml", "own"),
        ("--guard -c own.yaml --config=other.v2.yaml --x 1", "other.v2"),
        ("linear --config own.yaml", "linear"),
        ("--config runs/mine/version_3/config.yaml", "mine"),
        ("--config version_3/other.yaml", "other"),
    ):
        assert run_name(words.split()) == name


def test_unknown_words_are_named(capsys):
    for words, said in (
        (["cifar"], "expected the task to be one of linear, sinusoid, omniglot, .*miniimagenet_5shot but got 'cifar'"),
        (["--guard", "maybe"], "expected --guard to be one of log, warn, rescale, stop but got 'maybe'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            translate(words)
        assert stopped.value.code == 2 and re.search(said, capsys.readouterr().err)


def test_a_guarded_run_leaves_logs_a_picture_and_a_checkpoint_that_loads(elsewhere):
    cli = main(["sinusoid", "--guard", "rescale", "--guard.every_n_steps", "2", "--model.inner_lr", "0.02", *SHORT])
    folder = elsewhere / "runs" / "sinusoid" / "version_0"
    assert cli.guard.action == "rescale" and len(cli.guard.history) == 2 and cli.model.inner_lr == 0.02
    assert (folder / "safe_region.png").stat().st_size > 10_000
    logged = set(pd.read_csv(folder / "metrics.csv").columns)
    assert "guard/alpha_ratio" in logged and all("/" in name for name in logged - {"epoch", "step"})
    assert list((elsewhere / "runs" / "tensorboard" / "sinusoid" / "version_0").glob("events*"))
    (checkpoint,) = folder.glob("checkpoints/*.ckpt")
    loaded = MetaLearningModule.load_from_checkpoint(checkpoint)
    assert loaded.inner_lr == 0.02
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), cli.model.parameters(), strict=True))
    assert (folder / "config.yaml").exists()


@pytest.mark.parametrize(("said", "size", "looped"), [("3", 3, False), ("loop", None, True), ("all", None, False)])
def test_vectorize_takes_a_number_or_a_word(said, size, looped):
    tasks = main(["linear", "--model.vectorize", said, *SHORT]).model.task_map
    assert (tasks.chunk_size, tasks.looped) == (size, looped)


def test_a_guard_and_one_callback_go_together():
    words = ["fit", "linear", "--guard", "log", *SHORT, "--trainer.callbacks=ModelCheckpoint"]
    assert main([*words, "--trainer.callbacks.dirpath=kept"]).guard.history and list(Path("kept").glob("*.ckpt"))


def test_without_guard_there_is_none_and_weights_are_bitwise_those_with_guard_log():
    plain = main(["linear", *SHORT])
    logged = main(["linear", "--guard", "log", "--guard.every_n_steps", "1", *SHORT])
    assert plain.guard is None and len(logged.guard.history) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), logged.model.parameters(), strict=True))


def test_omniglot_on_real_images(data_folder, monkeypatch):
    monkeypatch.setenv("LMG_DATA", str(data_folder))
    words = ["omniglot", "--guard", "log", *SHORT, "--trainer.max_steps", "2", "--data.meta_batch_size", "2"]
    cli = main([*words, "--model.network.filters", "4"])
    assert cli.guard.history[0].lambda_max > 0
    assert 0 < float(cli.trainer.callback_metrics["test/accuracy"]) <= 1


PUBLISHED = {
    # alpha, K in training and evaluation, meta-batch, ways, shots, queries, filters, strided (Finn et al. 2017, appendix A.1)
    "omniglot_5way": (0.4, 1, 3, 32, 5, 1, 1, 64, True),
    "omniglot_20way": (0.1, 5, 5, 16, 20, 1, 1, 64, True),
    "miniimagenet": (0.01, 5, 10, 4, 5, 1, 15, 32, False),
    "miniimagenet_5shot": (0.01, 5, 10, 2, 5, 5, 15, 32, False),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_published_settings_are_those_of_the_paper(task, data_folder, monkeypatch):
    """Built from the shipped file, at full size but for one step and one test episode: what it built is compared."""
    monkeypatch.setenv("LMG_DATA", str(data_folder))
    with open(CONFIGS / f"{task}.yaml") as stream:
        trainer = yaml.safe_load(stream)["trainer"]
    assert trainer["max_steps"] == 60_000
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, datamodule: seen.append((model, datamodule)))
    monkeypatch.setattr(Trainer, "test", lambda *arguments, **named: None)
    main([task])
    ((module, data),) = seen
    alpha, steps, eval_steps, batch, ways, shots, queries, filters, strided = PUBLISHED[task]
    assert (module.inner_lr, module.inner_steps, module.eval_inner_steps, module.order) == (
        alpha,
        steps,
        eval_steps,
        "exact",
    )
    assert data.meta_batch_size == batch and data.test_episodes == 600
    assert (data.tasks.n_way, data.tasks.k_shot, data.tasks.queries) == (ways, shots, queries)
    convolutions = [part for part in module.network.modules() if isinstance(part, torch.nn.Conv2d)]
    assert [part.out_channels for part in convolutions] == [filters] * 4
    assert all((part.stride == (2, 2)) == strided for part in convolutions)
    assert any(isinstance(part, torch.nn.MaxPool2d) for part in module.network.modules()) != strided
    optimizer = module.configure_optimizers()
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 1e-3
    (x, y), (xq, yq) = data.tasks.sample(1, episode_generator(0, "train", 0))
    assert x.shape[1] == ways * shots and xq.shape[1] == ways * queries
    assert module.predict(module.theta(), x[0]).shape == (ways * shots, ways)


def test_miniimagenet_on_real_images_with_intervals(data_folder, monkeypatch):
    monkeypatch.setenv("LMG_DATA", str(data_folder))
    words = ["miniimagenet", "--guard", "log", *SHORT, "--trainer.max_steps", "1", "--data.meta_batch_size", "2"]
    words += ["--guard.lookahead.steps", "0", "--guard.curvature.max_iter", "5", "--model.inner_steps", "1"]
    small = ["--model.network.filters", "4", "--data.tasks.queries", "2", "--data.tasks.image_size", "32"]
    cli = main([*words, *small, "--model.network.image_size", "32", "--data.test_episodes", "4"])
    assert cli.guard.history[0].lambda_max > 0
    found = cli.trainer.callback_metrics
    assert 0 <= float(found["test/accuracy"]) <= 1 and 0 <= float(found["test/accuracy_ci95"]) < 1
    assert cli.model.eval_inner_steps == 10


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("warn", r"Or let the guard do it: --guard rescale\.$"),
        ("stop", r"Training stops after this step \(--guard stop\)\. It is taken at beta = 0\.$"),
        ("rescale", r"Applied from now on: alpha = 0\.05, beta = 0\.\d+ \(--guard rescale\)\.$"),
    ],
)
def test_a_run_outside_the_safe_region_warns_and_names_options(action, said):
    beta_c = r"beta = 5 is 7\.6x beta_c = 0\.655"
    with guard_warns(
        rf"^ConvergenceGuard: step 0: beta = 5 is too large\. Set the optimizer's lr to \S+\. .*{beta_c}.*{said}"
    ):
        guard = main(["fit", "linear", "--guard", action, *SHORT, "--model.optimizer.lr", "5"]).guard
    assert guard.advice.cause == "beta" and guard.advice.alpha is None and 0 < guard.advice.beta < 0.655


def test_a_run_that_is_found_diverged_is_told_what_to_set_and_the_options_that_help():
    words = ["linear", *SHORT, "--model.optimizer.lr", "3e38", "--guard.every_n_steps", "1", "--guard.patience", "3"]
    effect = r"The loss is nan at these parameters\..*Or let the guard do it: --guard rescale\.$"
    with guard_warns(rf"step 2: beta = 3e\+38 is too large\. Set the optimizer's lr to 0\.\d+\. .*{effect}"):
        main(["fit", *words])
    rescued = OptionSpelling().guard(action="rescale", rollback=True, margin=0.5)
    assert rescued == "--guard rescale --guard.rollback true --guard.margin 0.5"
    guard = main(["fit", "linear", *SHORT, *rescued.split()]).guard
    assert (guard.action, guard.rollback, guard.margin) == ("rescale", True, 0.5)


@pytest.mark.parametrize(("columns", "left"), [("80", 3), ("", 3), ("120", 5)])
def test_the_bar_has_room_for_the_numbers_where_80_columns_are_all_there_is(columns, left, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("os.get_terminal_size", lambda _: (_ for _ in ()).throw(OSError("no terminal")))
    assert len(StepBar().configure_columns(None)) == left


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"lightning-maml-guard {__version__}\n"


def test_help_reads_well():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train.py", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert done.returncode == 0
    assert (
        "train.py [linear|sinusoid|omniglot|omniglot_5way|omniglot_20way|miniimagenet|miniimagenet_5shot] [--guard [log|warn|rescale|stop]]"
        in done.stdout
    )
    assert "--guard" in done.stdout


def test_the_quickstart_tells_which_rate_to_lower(capsys):
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) < 40
    module = runpy.run_path(str(EXAMPLES / "quickstart.py"))
    with guard_warns(r"beta = 1 is too large\. Set the optimizer's lr to 0\.\d+\."):
        guard = module["main"](steps=60)
    assert max(report.beta_applied for report in guard.history) < 0.3
    # A network whose units died has the curvature of its last bias alone, 2, and is "safe" at any rate below 1.
    assert min(report.lambda_max for report in guard.history) > 3
    assert Path("safe_region.png").stat().st_size > 10_000
    assert "beta = 1 was applied as" in capsys.readouterr().out
