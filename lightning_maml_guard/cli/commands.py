"""What each command does, and what it prints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_maml_guard.cli.arguments import EVALUATION, TRAIN_THEN_TEST
from lightning_maml_guard.cli.parser import GuardCLI
from lightning_maml_guard.guard.convergence_guard import ConvergenceGuard
from lightning_maml_guard.messages.advice_sentences import advised
from lightning_maml_guard.messages.notices import not_written
from lightning_maml_guard.messages.terminal import inform, warn
from lightning_maml_guard.stability.estimators import estimates_per_task
from lightning_maml_guard.tasks.datamodule import TaskDataModule
from lightning_maml_guard.tuner.ladder import LadderOptions
from lightning_maml_guard.tuner.suggest_rates import suggest_rates
from lightning_maml_guard.tuner.suggestion import RateSuggestion
from lightning_maml_guard.utils.checks import did_you_mean
from lightning_maml_guard.utils.io import write_atomically

# What suggest takes from the configuration's Trainer.
_TRAINER_OPTIONS = (
    "accelerator",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
)
# Lightning's own code causes it in every run (2.6.6 under torch 2.13).
_IGNORED = (r"`isinstance\(treespec, LeafSpec\)` is deprecated",)
# An evaluation needs neither the guard that watched the training nor the training's checkpoint folder.
_IGNORED_IN_EVALUATION = (
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided .* add the "
    r"""following callbacks: \["ConvergenceGuard\{[^"]*"\]\.$""",
    r"The dirpath has changed from .*, therefore `best_model_score`, .* won't be reloaded\.",
)
# Episodes are sampled without worker processes: their data then lies on the device that trains.
_IGNORED_WITHOUT_WORKERS = (r"The '\w+_dataloader' does not have many workers",)


@contextmanager
def known_warnings_ignored(command: str, cli: GuardCLI) -> Iterator[None]:
    """Ignore those warnings of Lightning that the user of the command line cannot act on."""
    messages = [*_IGNORED, *(_IGNORED_IN_EVALUATION if command in EVALUATION else ())]
    if isinstance(cli.datamodule, TaskDataModule) and not cli.datamodule.num_workers:
        messages += _IGNORED_WITHOUT_WORKERS
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=message)
        yield


def _train_then_test(cli: GuardCLI) -> None:
    _train(cli)
    cli.trainer.test(cli.model, datamodule=cli.datamodule)
    _conclude(cli)


def _fit(cli: GuardCLI) -> None:
    _train(cli)
    _conclude(cli)


def _validate(cli: GuardCLI) -> None:
    if getattr(cli.datamodule, "val_episodes", None) == 0:
        cli.parser.error(
            "--data.val_episodes: validate judges on the validation episodes, of which there are 0. Pass a number of "
            "at least 1, or use test."
        )
    _warn_untrained(cli, "validate")
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, **_checkpoint(cli))


def _test(cli: GuardCLI) -> None:
    _warn_untrained(cli, "test")
    cli.trainer.test(cli.model, datamodule=cli.datamodule, **_checkpoint(cli))


def _suggest(cli: GuardCLI, name: str, batches: int, margin: float, steps: int, apply: Path | None) -> None:
    if apply is not None:
        _check_place(cli, apply)
    found = cli.suggestion = suggest_rates(
        cli.model,
        cli.datamodule,
        batches=batches,
        margin=margin,
        ladder=LadderOptions(steps=steps, longest=4 * steps),
        **{each: cli.config["trainer"][each] for each in _TRAINER_OPTIONS},
        **_measuring_options(cli.guard),
    )
    print(found)
    if found.ladder is not None:
        _save_picture(found, Path("runs") / "suggest" / f"{name}.png", "the ladder of rates", "suggest")
    if apply is not None:
        _write_applied(cli, found, apply)


RUNS: dict[str, Callable[..., None]] = {
    TRAIN_THEN_TEST: _train_then_test,
    "fit": _fit,
    "validate": _validate,
    "test": _test,
    "suggest": _suggest,
}


def _measuring_options(guard: ConvergenceGuard | None) -> dict[str, Any]:
    if guard is None:
        return {}
    # Before training the sharpest task counts, where the estimator can treat the tasks one by one.
    tasks = "worst" if estimates_per_task(guard.curvature.estimator) else "mean"
    curvature = replace(guard.curvature, tasks=tasks)
    return {"problem": guard.problem, "curvature": curvature, "lookahead": guard.lookahead}


def _checkpoint(cli: GuardCLI, must_exist: bool = True) -> dict[str, Any]:
    """Return what Lightning is told of ``--ckpt_path``: ``last`` is the newest that this configuration has written."""
    path = cli.config["ckpt_path"]
    if path is None or "://" in path or Path(path).exists():
        return {} if path is None else {"ckpt_path": path}
    kept, where = _kept_checkpoints(cli)
    if path == "last" and (kept or not must_exist):
        return {"ckpt_path": str(kept[-1]) if kept else path}
    if path == "best":
        said = "only the process that trains knows which checkpoint is the 'best'. Name the file."
    elif path == "last":
        said = f"there is no checkpoint in {where}. Train first, or name the file."
    else:
        beside = [str(each) for each in sorted(Path(path).parent.glob("*.ckpt"))]
        said = f"there is no checkpoint {path}. {did_you_mean(path, beside)}".rstrip()
    cli.parser.error(f"--ckpt_path: {said}" + (f" The newest in {where} is {kept[-1]}." if kept else ""))


def _kept_checkpoints(cli: GuardCLI) -> tuple[list[Path], Path]:
    """Return the checkpoints that runs of this configuration have written, the newest last, and their folder."""
    folder, pattern = _where_checkpoints_go(cli)
    return sorted(folder.glob(f"{pattern}*.ckpt"), key=lambda path: path.stat().st_mtime), folder


def _warn_untrained(cli: GuardCLI, command: str) -> None:
    if cli.config["ckpt_path"] is not None:
        return
    kept, folder = _kept_checkpoints(cli)
    unknown = f"{folder}/{_where_checkpoints_go(cli)[1].replace('*', 'version_N')}NAME.ckpt"
    path = f"{kept[-1]} (the newest in {folder})" if kept else unknown
    warn(
        f"{command} judges the initial parameters, as no --ckpt_path was passed. Pass --ckpt_path {path} to judge "
        "the trained ones."
    )


def _where_checkpoints_go(cli: GuardCLI) -> tuple[Path, str]:
    """Return the folder of a run's checkpoints by ModelCheckpoint's rule, and the pattern of the path below it."""
    trainer, given = cli.trainer, cli.config_init["trainer"]["logger"]
    named = next(filter(None, (getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks)), None)
    if named is not None:
        return Path(named), ""
    # The configuration's before the Trainer's: fast_dev_run replaces them by one that writes nothing.
    loggers = given if isinstance(given, list) else [given] if given not in (None, True, False) else trainer.loggers
    if cli.logs_by_default:
        return Path("runs", cli.name), "*/checkpoints/"
    if not loggers:
        return Path(trainer.default_root_dir), "checkpoints/"
    return Path(loggers[0].save_dir or trainer.default_root_dir, str(loggers[0].name)), "*/checkpoints/"


def _train(cli: GuardCLI) -> None:
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, **_checkpoint(cli, must_exist=False))
    loss = float(cli.trainer.callback_metrics.get("train/loss", 0.0))
    if not math.isfinite(loss):
        inform(_diverged(f"its last loss is {loss}", cli.guard))
    elif not all(bool(torch.isfinite(each).all()) for each in cli.model.parameters()):
        inform(_diverged("its parameters are not finite", cli.guard))


def _conclude(cli: GuardCLI) -> None:
    folder, guard = cli.trainer.log_dir, cli.guard
    if guard is None or folder is None or not cli.trainer.is_global_zero:
        return
    if guard.history and not guard.acting.speaks:  # else it has summed the run up by itself
        inform(guard.summary())
    if any(report.lambda_max > 0 for report in guard.history):
        _save_safe_region(guard, Path(folder) / "safe_region.png")


def _place_of(cli: GuardCLI) -> tuple[Any, Any]:
    """Where a configuration holds the inner rate and the optimizer's: the arguments of the module and the optimizer."""
    model = cli.config["model"]["init_args"]
    optimizer = model.get("optimizer")
    return model, None if optimizer is None else optimizer.get("init_args")


def _check_place(cli: GuardCLI, path: Path) -> None:
    """Exit if the rates or the file have no place, before they are looked for."""
    model, optimizer = _place_of(cli)
    missing = [word for word, holder in (("inner_lr", model), ("optimizer.init_args.lr", optimizer)) if holder is None]
    missing += ["inner_lr"] if "inner_lr" not in model else []
    if missing or "lr" not in optimizer:
        cli.parser.error(
            f"--apply: the configuration has no model.init_args.{(missing or ['optimizer.init_args.lr'])[0]} to write "
            "the rate into. Set one, as in --model.optimizer torch.optim.SGD --model.optimizer.lr 0.1."
        )
    if not path.parent.is_dir():
        cli.parser.error(f"--apply: the folder {path.parent} does not exist. Make it first.")


def _write_applied(cli: GuardCLI, found: RateSuggestion, path: Path) -> None:
    if math.isnan(found.beta):
        warn(f"--apply {path} writes nothing, as no rates are suggested.")
        return
    model, optimizer = _place_of(cli)
    kept = model["inner_lr"], optimizer["lr"]
    rates = found.alpha, found.beta
    if isinstance(kept[0], list):
        rates = [found.alpha * each / max(kept[0]) for each in kept[0]], found.beta  # type: ignore[assignment]
    try:
        model["inner_lr"], optimizer["lr"] = rates
        text = cli.parser.dump(cli.config, skip_none=False)
    finally:
        model["inner_lr"], optimizer["lr"] = kept
    write_atomically(path, lambda stream: stream.write(text.encode()), mode=0o644)
    inform(f"written: {path}, with the suggested rates. Train with: fit --config {path}")


def _save_safe_region(drawable: ConvergenceGuard, path: Path) -> None:
    _save_picture(drawable, path, "the safe region", "ConvergenceGuard")


def _save_picture(drawable: ConvergenceGuard | RateSuggestion, path: Path, what: str, who: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    figure = drawable.plot()[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda stream: figure.savefig(stream, dpi=150, format="png"), mode=0o644)
    except OSError as error:
        warn(not_written(f"the picture of {what}", path, error))
        return
    inform(f"{who}: {what} is drawn in {path}")


# Sentences about what the guard found.


def _diverged(symptom: str, guard: ConvergenceGuard | None) -> str:
    return f"The training diverged: {symptom}. {_what_to_do(guard)}"


def _what_to_do(guard: ConvergenceGuard | None) -> str:
    if guard is None:
        return "Run it again with --guard, which tells the rate to lower; --guard rescale lowers it."
    if guard.advice is not None:
        return f"The guard's advice: {advised(guard.advice, guard.spelling)}"
    if guard.action == "log":
        return "--guard log warns of nothing: --guard tells the rate to lower, and --guard rescale lowers it."
    return "No check of the guard saw it coming: --guard.every_n_steps 5 looks more often."
