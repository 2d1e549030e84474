"""The command line: LightningCLI with commands, a task word and ``--guard``."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from lightning_maml_guard.cli.arguments import (
    COMMANDS,
    CONFIGS,
    SUGGESTS,
    name_of,
    options_of_suggest,
    program,
    refuse,
    synopsis,
    translate,
)
from lightning_maml_guard.cli.commands import JUDGING, RUNS, TRAIN_THEN_TEST, without_the_pointless
from lightning_maml_guard.cli.parser import GuardCLI, Parser
from lightning_maml_guard.cli.phase_diagram import main as phase_diagram_command
from lightning_maml_guard.guard.convergence_guard import ACTIONS
from lightning_maml_guard.utils.lightning_compat import PACKAGE, LightningDataModule, LightningModule

__all__ = ["CONFIGS", "GuardCLI", "console", "main", "translate"]


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
linear trains on one fixed task, as the poster assumes: its test loss, on other tasks, rises as it learns that one.
omniglot is a first look of 300 steps; omniglot_5way, omniglot_20way, miniimagenet (1 shot) and miniimagenet_5shot
follow the published settings (Finn et al. 2017: 60,000 steps, for a GPU). Image data is read from $LMG_DATA.
"""


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
    if importlib.util.find_spec("jsonargparse") is None:
        refuse(
            "error: the command line needs packages that training does not, jsonargparse among them. Install them with "
            "pip install 'lightning-maml-guard[examples]' (in a checkout: pip install '.[examples]')."
        )
    given = sys.argv[1:] if words is None else list(words)
    command = given.pop(0) if given and given[0] in COMMANDS else TRAIN_THEN_TEST
    if command == "phase-diagram":
        return phase_diagram_command(given, f"{program()} phase-diagram")
    if command == TRAIN_THEN_TEST and given in (["-h"], ["--help"]):
        print(usage())
    named, given = options_of_suggest(given) if command == "suggest" else ({}, given)
    if command in JUDGING and any(word.startswith("--guard") for word in given):
        refuse(f"error: {command} trains nothing, so --guard has nothing to watch. Leave it out, or use fit.")
    cli = _built(command, given)
    if command == "suggest" and cli.config["ckpt_path"] is not None:
        refuse("error: suggest measures the network as initialised, so it takes no --ckpt_path. Leave it out.")
    with without_the_pointless(command, cli):
        RUNS[command](cli, **named, **({"name": name_of(given)} if command == "suggest" else {}))
    return cli


def console() -> None:
    """Run the installed command ``lightning-maml-guard``: a script's exit status is what its function returns."""
    main()


def _built(command: str, given: Sequence[str]) -> GuardCLI:
    return GuardCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"logger": _loggers(name_of(given))},
        parser_class=Parser,
        parser_kwargs={
            "usage": _usage_of(command),
            "description": _description(RUNS[command]),
            "trains": command not in JUDGING,
            "beside": SUGGESTS if command == "suggest" else (),
        },
        args=translate(given),
        run=False,
        auto_configure_optimizers=False,
    )


def _usage_of(command: str) -> str:
    watched = "" if command in JUDGING else f"[--guard [{'|'.join(ACTIONS)}]] "
    own = "[--batches N] [--margin M] " if command == "suggest" else ""
    return " ".join(f"{program()} {command} [task] {watched}{own}[options below]".split())


def _description(run: Callable[..., None]) -> str:
    return " ".join((inspect.getdoc(run) or "").split())


def _summaries() -> str:
    said = {command: _description(run) for command, run in RUNS.items() if command}
    said["phase-diagram"] = "Train a grid of inner and meta rates, one of the poster's experiments, and draw it."
    return "\n".join(
        textwrap.fill(text, 112, initial_indent=f"  {command:15s}", subsequent_indent=" " * 17)
        for command, text in said.items()
    )


def _loggers(name: str) -> list[dict[str, Any]]:
    return [
        {
            "class_path": f"{PACKAGE}.loggers.CSVLogger",
            "init_args": {"save_dir": "runs", "name": name},
        },
        {
            "class_path": f"{PACKAGE}.loggers.TensorBoardLogger",
            "init_args": {"save_dir": "runs/tensorboard", "name": name},
        },
    ]
