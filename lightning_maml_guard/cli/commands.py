"""What each command of the command line does with the CLI that was built from its words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_maml_guard.cli.parser import GuardCLI
from lightning_maml_guard.guard.convergence_guard import ConvergenceGuard
from lightning_maml_guard.stability.report import StabilityReport, applied_instead
from lightning_maml_guard.tasks.datamodule import TaskDataModule
from lightning_maml_guard.theory.limits import UNSAFE
from lightning_maml_guard.tuner.suggest_rates import suggest_rates
from lightning_maml_guard.tuner.suggestion import RateSuggestion
from lightning_maml_guard.utils.lightning_compat import inform
from lightning_maml_guard.utils.warnings import GuardWarning

TRAIN_THEN_TEST = ""
# Commands that train nothing, and judge what was trained.
JUDGING = ("validate", "test")
# What a guard and suggest_rates have in common: how to measure, and how to try the coming steps.
MEASURING = ("problem", "criterion", "estimator", "max_iter", "tol", "basis", "data", "trial_steps", "alarm")
# What suggest follows of the Trainer it is given.
_FOLLOWED = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm")
# Said by Lightning's own code of itself, in every run (2.6.6 under torch 2.13).
_POINTLESS = (r"`isinstance\(treespec, LeafSpec\)` is deprecated",)
# Said of a checkpoint that is only judged: that the guard which watched its training is missing, and where the training
# kept its checkpoints.
_POINTLESS_WHERE_JUDGED = (
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided .* add the "
    r"""following callbacks: \["ConvergenceGuard\{[^"]*"\]\.$""",
    r"The dirpath has changed from .*, therefore `best_model_score`, .* won't be reloaded\.",
)
# Episodes have no worker processes by design: their data then lies on the device that trains.
_POINTLESS_OF_EPISODES = (r"The '\w+_dataloader' does not have many workers",)


@contextmanager
def without_the_pointless(command: str, cli: GuardCLI) -> Iterator[None]:
    """Hold back warnings of Lightning's that nobody at a command line can act on.

    Args:
        command: The command that runs.
        cli: What it runs on.

    Yields:
        Nothing.
    """
    messages = [*_POINTLESS, *(_POINTLESS_WHERE_JUDGED if command in JUDGING else ())]
    if isinstance(cli.datamodule, TaskDataModule) and not cli.datamodule.num_workers:
        messages += _POINTLESS_OF_EPISODES
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=message)
        yield


def _train_then_test(cli: GuardCLI) -> None:
    """Train MAML on a task, test it, and draw the safe region where a guard watched."""
    _train(cli)
    cli.trainer.test(cli.model, datamodule=cli.datamodule)
    _conclude(cli)


def _fit(cli: GuardCLI) -> None:
    """Train MAML on a task; with --guard, watch the learning rates and draw the safe region."""
    _train(cli)
    _conclude(cli)


def _validate(cli: GuardCLI) -> None:
    """Judge a checkpoint (--ckpt_path; without one the network as initialised) on the validation episodes."""
    if getattr(cli.datamodule, "val_episodes", None) == 0:
        cli.parser.error(
            "--data.val_episodes: validate judges on the validation episodes, of which there are 0. Pass a number of "
            "at least 1, or use test."
        )
    _warn_untrained(cli, "validate")
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, **_checkpoint(cli))


def _test(cli: GuardCLI) -> None:
    """Judge a checkpoint (--ckpt_path; without one the network as initialised) on the test episodes."""
    _warn_untrained(cli, "test")
    cli.trainer.test(cli.model, datamodule=cli.datamodule, **_checkpoint(cli))


def _suggest(cli: GuardCLI, name: str, batches: int, margin: float) -> None:
    """Measure before training, and suggest learning rates at --margin M (default 0.5) times their critical values,
    over --batches N (default 4) training batches; --guard.NAME options say how to measure.
    """
    options = {} if cli.guard is None else {each: getattr(cli.guard, each) for each in MEASURING}
    if options.get("estimator", "lanczos") != "lanczos":
        options["tasks"] = "mean"  # the others treat one Hessian at a time
    found = cli.suggestion = suggest_rates(
        cli.model,
        cli.datamodule,
        batches=batches,
        margin=margin,
        **{each: cli.config["trainer"][each] for each in _FOLLOWED},
        **options,
    )
    print(found)
    if any(report.lambda_max > 0 for report in found.reports) and math.isfinite(found.alpha):
        _save(found, Path("runs") / "suggest" / f"{name}.png")


RUNS: dict[str, Callable[..., None]] = {
    TRAIN_THEN_TEST: _train_then_test,
    "fit": _fit,
    "validate": _validate,
    "test": _test,
    "suggest": _suggest,
}


def _checkpoint(cli: GuardCLI) -> dict[str, Any]:
    path = cli.config["ckpt_path"]
    return {} if path is None else {"ckpt_path": path}


def _warn_untrained(cli: GuardCLI, command: str) -> None:
    if cli.config["ckpt_path"] is not None:
        return
    folder, inside = _where_checkpoints_go(cli)
    kept = sorted(folder.glob(f"{inside}*.ckpt"), key=lambda path: path.stat().st_mtime)
    newest = f"{kept[-1]} (the newest in {folder})" if kept else f"{folder}/{inside.replace('*', 'version_N')}NAME.ckpt"
    rank_zero_warn(
        f"{command} judges the initial parameters, as no --ckpt_path was passed. Pass --ckpt_path {newest} to judge "
        "the trained ones.",
        category=GuardWarning,
    )


def _where_checkpoints_go(cli: GuardCLI) -> tuple[Path, str]:
    """Name the folder of a run's checkpoints, by ModelCheckpoint's rule, and what of the path below it to search."""
    trainer, given = cli.trainer, cli.config_init["trainer"]["logger"]
    named = next(filter(None, (getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks)), None)
    if named is not None:
        return Path(named), ""
    # The configuration's before the Trainer's: fast_dev_run puts one in their place that keeps nothing.
    loggers = given if isinstance(given, list) else [given] if given not in (None, True, False) else trainer.loggers
    if not loggers:
        return Path(trainer.default_root_dir), "checkpoints/"
    return Path(loggers[0].save_dir or trainer.default_root_dir, str(loggers[0].name)), "*/checkpoints/"


def _train(cli: GuardCLI) -> None:
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, **_checkpoint(cli))
    loss = cli.trainer.callback_metrics.get("train/loss", torch.zeros(()))
    lost = f"its last loss is {float(loss)}" if not math.isfinite(loss) else ""
    if not lost and not all(bool(torch.isfinite(each).all()) for each in cli.model.parameters()):
        lost = "its parameters are not finite"
    if lost:
        inform(f"The training diverged: {lost}. {_what_to_do(cli.guard)}")


def _what_to_do(guard: ConvergenceGuard | None) -> str:
    if guard is None:
        return "Run it again with --guard, which tells the rate to lower; --guard rescale lowers it."
    if guard.action != "log" and any(report.status == UNSAFE for report in guard.history):
        return "The guard's warning above says why, and which rate to lower."
    if guard.action == "log":
        return "--guard log warns of nothing: --guard tells the rate to lower, and --guard rescale lowers it."
    return "No check of the guard saw it coming: --guard.every_n_steps 5 looks more often."


def _conclude(cli: GuardCLI) -> None:
    """Tell what the last check found, and draw the safe region where there is one to draw."""
    folder, guard = cli.trainer.log_dir, cli.guard
    if guard is None or folder is None or not cli.trainer.is_global_zero:
        return
    if guard.history:
        inform(f"ConvergenceGuard: {_verdict(guard.history)}")
    if any(report.lambda_max > 0 for report in guard.history):
        _save(guard, Path(folder) / "safe_region.png")


def _verdict(history: list[StabilityReport]) -> str:
    last = history[-1]
    rates = ", ".join(
        (f"{name} not judged" if math.isnan(ratio) else f"{name} at {ratio:.2g} of {name}_c")
        + (f" ({applied})" if (applied := applied_instead(last, name)) else "")
        for name, ratio in (("alpha", last.alpha_ratio), ("beta", last.beta_ratio))
    )
    number = f"{len(history)} checks, the last" if len(history) > 1 else "1 check,"
    return f"{number} at step {last.step}: {last.status}, {rates}."


def _save(drawable: ConvergenceGuard | RateSuggestion, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawable.plot()[0].savefig(path, dpi=150)
    inform(f"ConvergenceGuard: the safe region is drawn in {path}")
