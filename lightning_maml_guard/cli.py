"""The command line: LightningCLI with a task word and ``--guard``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
from lightning_maml_guard.guard.callback import ACTIONS, ConvergenceGuard

CONFIGS = Path(__file__).parent / "configs"
TASKS = ("linear", "sinusoid", "omniglot")
USAGE = f"""usage: train.py [{"|".join(TASKS)}] [--guard [{"|".join(ACTIONS)}]] [LightningCLI options]

Trains MAML on a task (default: sinusoid), tests it on held-out episodes and, with --guard, watches whether
the learning rates can converge and draws the safe region. The task word stands for a configuration shipped
with the package; every value of it can be overridden, for example

  train.py sinusoid --guard rescale --guard.every_n_steps 50 --model.inner_lr 0.02 --trainer.max_steps 2000
  train.py omniglot --guard --data.tasks.k_shot 5
"""


class GuardCLI(LightningCLI):
    """LightningCLI that knows ``--guard`` and tests after it has trained."""

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
        self.guard: ConvergenceGuard | None = self._get(self.config_init, "guard")
        if self.guard is not None:
            callbacks: list[Callback] = list(self._get(self.config_init, "trainer").callbacks or [])
            kwargs["callbacks"] = [*callbacks, self.guard]
        return super().instantiate_trainer(**kwargs)


def translate(words: Sequence[str]) -> list[str]:
    """Turn the task word and ``--guard [action]`` into LightningCLI options.

    Args:
        words: The command line, without the program's name.

    Returns:
        Options LightningCLI understands.

    Raises:
        SystemExit: If the first word is neither a task nor an option.
    """
    rest = list(words)
    task = "sinusoid"
    if rest and not rest[0].startswith("-"):
        task = rest.pop(0)
        if task not in TASKS:
            raise SystemExit(f"{USAGE}\nerror: expected the task to be one of {', '.join(TASKS)} but got {task!r}.")
    own_config = any(word in {"-c", "--config"} or word.startswith("--config=") for word in rest)
    options = [] if own_config and not (words and words[0] in TASKS) else ["--config", str(CONFIGS / f"{task}.yaml")]
    index = 0
    while index < len(rest):
        word, following = rest[index], rest[index + 1 : index + 2]
        index += 1
        if word == "--guard" or word.startswith("--guard="):
            mode = word.partition("=")[2]
            if not mode and following and not following[0].startswith("-"):
                mode = following[0]
                index += 1
            if mode not in {"", *ACTIONS}:
                raise SystemExit(
                    f"{USAGE}\nerror: expected --guard to be one of {', '.join(ACTIONS)} but got {mode!r}."
                )
            options += ["--guard=lightning_maml_guard.ConvergenceGuard", f"--guard.action={mode or 'warn'}"]
        else:
            options.append(word)
    return options


def main(words: Sequence[str] | None = None) -> GuardCLI:
    """Train and test; the installed command ``lightning-maml-guard`` and ``examples/train.py``.

    Args:
        words: The command line without the program's name (default: ``sys.argv``).

    Returns:
        The CLI, with ``.trainer``, ``.model``, ``.datamodule`` and ``.guard``.

    Raises:
        SystemExit: If the command line is wrong, or after ``--help``.
    """
    given = sys.argv[1:] if words is None else list(words)
    if given in (["-h"], ["--help"]):
        print(USAGE)
    cli = GuardCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"logger": _loggers(given[0] if given and given[0] in TASKS else "sinusoid")},
        args=translate(given),
        run=False,
        auto_configure_optimizers=False,
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    cli.trainer.test(cli.model, datamodule=cli.datamodule)
    if cli.guard is not None and cli.trainer.is_global_zero:
        _draw(cli)
    return cli


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
    assert cli.guard is not None
    folder = cli.trainer.log_dir
    if folder is None or not any(report.lambda_max > 0 for report in cli.guard.history):
        return
    import matplotlib

    matplotlib.use("Agg")
    figure, _ = cli.guard.plot()
    path = Path(folder) / "safe_region.png"
    figure.savefig(path, dpi=150)
    inform(f"ConvergenceGuard: the safe region is drawn in {path}")
