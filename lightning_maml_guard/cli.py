"""The command line: LightningCLI with commands, a task word and ``--guard``."""

from __future__ import annotations

import inspect
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_maml_guard._lightning import (
    PACKAGE,
    Callback,
    LightningCLI,
    LightningDataModule,
    LightningModule,
    Trainer,
    inform,
)
from lightning_maml_guard._words import COMMANDS, CONFIGS, TASKS, options_of_suggest, program, synopsis, translate
from lightning_maml_guard.guard.callback import ACTIONS, ConvergenceGuard
from lightning_maml_guard.guard.report import StabilityReport
from lightning_maml_guard.guard.suggest import suggest_rates
from lightning_maml_guard.guard.suggestion import RateSuggestion
from lightning_maml_guard.poster.command import main as phase_diagram_command

__all__ = ["CONFIGS", "GuardCLI", "console", "main", "translate"]

TRAIN_THEN_TEST = ""
# What a guard and suggest_rates have in common: how to measure, and how to try the coming steps.
MEASURING = ("problem", "criterion", "estimator", "max_iter", "tol", "basis", "data", "trial_steps", "alarm")
# What suggest follows of the Trainer it is given.
_FOLLOWED = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm")


def usage() -> str:
    """Describe the command line.

    Returns:
        The text, with the program's name as it was called.
    """
    prog = program()
    return f"""{synopsis()}

Trains MAML on a task (default: sinusoid), tests it on held-out episodes and, with --guard, watches whether
the learning rates can converge and draws the safe region. The task word stands for a configuration shipped
with the package; every value of it can be overridden, for example

  {prog} sinusoid --guard rescale --guard.every_n_steps 50 --model.inner_lr 0.02 --trainer.max_steps 2000
  {prog} omniglot --guard --data.tasks.k_shot 5

A command before the task word does one thing:

{_summaries()}

--print_config prints the configuration as YAML, which --config OWN.yaml reads back, under every command but
phase-diagram.
omniglot is a first look of 300 steps; omniglot_5way, omniglot_20way, miniimagenet (1 shot) and miniimagenet_5shot
follow the published settings (Finn et al. 2017: 60,000 steps, for a GPU). Image data is read from $LMG_DATA.
"""


class GuardCLI(LightningCLI):
    """LightningCLI that knows ``--guard`` and ``--ckpt_path``.

    Attributes:
        guard: The guard; None without one.
        suggestion: What the command ``suggest`` found.
    """

    guard: ConvergenceGuard | None = None
    suggestion: RateSuggestion | None = None

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the guard.

        Args:
            parser: LightningCLI's parser.
        """
        parser.add_argument(
            "--guard",
            type=ConvergenceGuard | None,
            default=None,
            help=f"Watch the learning rates. A word of {ACTIONS} names the action; --guard.NAME sets an argument.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to go on from (fit), or to judge (validate, test); 'last' and 'best' as in Lightning.",
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the translated command line.

        Args:
            parser: LightningCLI's parser.
            args: Options as :func:`translate` gives them.
        """
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the guard among its callbacks.

        Args:
            **kwargs: Trainer arguments.

        Returns:
            The Trainer.
        """
        self.guard = self._get(self.config_init, "guard")
        if self.guard is not None:
            callbacks: list[Callback] = list(self._get(self.config_init, "trainer").callbacks or [])
            kwargs["callbacks"] = [*callbacks, self.guard]
        return super().instantiate_trainer(**kwargs)


def main(words: Sequence[str] | None = None) -> Any:
    """Do what the command line says; ``examples/train.py``, and :func:`console` for the installed command.

    Args:
        words: The command line without the program's name (default: ``sys.argv``).

    Returns:
        The CLI, with ``.trainer``, ``.model``, ``.datamodule``, ``.guard`` and ``.suggestion``; of ``phase-diagram``
        what it wrote.

    Raises:
        SystemExit: If the command line is wrong, or after ``--help``.
    """
    given = sys.argv[1:] if words is None else list(words)
    command = given.pop(0) if given and given[0] in COMMANDS else TRAIN_THEN_TEST
    if command == "phase-diagram":
        return phase_diagram_command(given, f"{program()} phase-diagram")
    if command == TRAIN_THEN_TEST and given in (["-h"], ["--help"]):
        print(usage())
    named, given = options_of_suggest(given) if command == "suggest" else ({}, given)
    task = given[0] if given and given[0] in TASKS else "sinusoid"
    run = _RUNS[command]
    if run in {_validate, _test} and any(word.startswith("--guard") for word in given):
        raise SystemExit(f"error: {command} trains nothing, so --guard has nothing to watch. Leave it out, or use fit.")
    cli = GuardCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"logger": _loggers(task)},
        parser_kwargs={"usage": _usage_of(command), "description": _description(run)},
        args=translate(given),
        run=False,
        auto_configure_optimizers=False,
    )
    if run is _suggest and cli.config["ckpt_path"] is not None:
        raise SystemExit(
            "error: suggest measures the network as initialised, so it takes no --ckpt_path. Leave it out."
        )
    run(cli, **named, **({"task": task} if run is _suggest else {}))
    return cli


def console() -> None:
    """Run the installed command ``lightning-maml-guard``: a script's exit status is what its function returns."""
    main()


def _train_then_test(cli: GuardCLI) -> None:
    """Train MAML on a task, test it, and draw the safe region where a guard watched."""
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, **_checkpoint(cli))
    cli.trainer.test(cli.model, datamodule=cli.datamodule)
    _draw(cli)


def _fit(cli: GuardCLI) -> None:
    """Train MAML on a task; with --guard, watch the learning rates and draw the safe region."""
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, **_checkpoint(cli))
    _draw(cli)


def _validate(cli: GuardCLI) -> None:
    """Judge a checkpoint (--ckpt_path; without one the network as initialised) on the validation episodes."""
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, **_checkpoint(cli))


def _test(cli: GuardCLI) -> None:
    """Judge a checkpoint (--ckpt_path; without one the network as initialised) on the test episodes."""
    cli.trainer.test(cli.model, datamodule=cli.datamodule, **_checkpoint(cli))


def _suggest(cli: GuardCLI, task: str, batches: int, margin: float) -> None:
    """Measure before training, and suggest learning rates at --margin M (default 0.5) times their critical values,
    over --batches N (default 4) training batches; --guard.NAME options say how to measure.
    """
    options = {} if cli.guard is None else {name: getattr(cli.guard, name) for name in MEASURING}
    if options.get("estimator", "lanczos") != "lanczos":
        options["tasks"] = "mean"  # the others treat one Hessian at a time
    found = cli.suggestion = suggest_rates(
        cli.model,
        cli.datamodule,
        batches=batches,
        margin=margin,
        **{name: cli.config["trainer"][name] for name in _FOLLOWED},
        **options,
    )
    print(found)
    if any(report.lambda_max > 0 for report in found.reports) and math.isfinite(found.alpha):
        _save(found, Path("runs") / "suggest" / f"{task}.png")


_RUNS: dict[str, Callable[..., None]] = {
    TRAIN_THEN_TEST: _train_then_test,
    "fit": _fit,
    "validate": _validate,
    "test": _test,
    "suggest": _suggest,
}


def _checkpoint(cli: GuardCLI) -> dict[str, Any]:
    path = cli.config["ckpt_path"]
    return {} if path is None else {"ckpt_path": path}


def _usage_of(command: str) -> str:
    watched = "" if command in {"validate", "test"} else f"[--guard [{'|'.join(ACTIONS)}]] "
    own = "[--batches N] [--margin M] " if command == "suggest" else ""
    return " ".join(f"{program()} {command} [task] {watched}{own}[options below]".split())


def _description(run: Callable[..., None]) -> str:
    return " ".join((inspect.getdoc(run) or "").split())


def _summaries() -> str:
    said = {command: _description(run) for command, run in _RUNS.items() if command}
    said["phase-diagram"] = "Train a grid of inner and meta rates, one of the poster's experiments, and draw it."
    return "\n".join(
        textwrap.fill(text, 112, initial_indent=f"  {command:15s}", subsequent_indent=" " * 17)
        for command, text in said.items()
    )


def _loggers(task: str) -> list[dict[str, Any]]:
    return [
        {
            "class_path": f"{PACKAGE}.loggers.CSVLogger",
            "init_args": {"save_dir": "runs", "name": task},
        },
        {
            "class_path": f"{PACKAGE}.loggers.TensorBoardLogger",
            "init_args": {"save_dir": "runs/tensorboard", "name": task},
        },
    ]


def _draw(cli: GuardCLI) -> None:
    folder, guard = cli.trainer.log_dir, cli.guard
    if guard is None or folder is None or not cli.trainer.is_global_zero:
        return
    if guard.history:
        inform(f"ConvergenceGuard: {_summary(guard.history)}")
    if any(report.lambda_max > 0 for report in guard.history):
        _save(guard, Path(folder) / "safe_region.png")


def _summary(history: list[StabilityReport]) -> str:
    last = history[-1]
    rates = ", ".join(
        f"{name} not judged" if math.isnan(ratio) else f"{name} at {ratio:.2g} of {name}_c"
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
