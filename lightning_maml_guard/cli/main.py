"""The command line: builds LightningCLI from the words and runs the command.

Imports of torch and Lightning stand in the functions that need them: help and an error about a word come without.
"""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_maml_guard import __version__
from lightning_maml_guard.cli.arguments import (
    ACTIONS,
    COMMANDS,
    DESCRIPTIONS,
    EVALUATION,
    SUGGEST_OPTIONS,
    TRAIN_THEN_TEST,
    exit_with_error,
    interruptible,
    parse_suggest_options,
    program,
    run_name,
    synopsis,
    take_data_folder,
    translate,
)

if TYPE_CHECKING:
    from lightning_maml_guard.cli.parser import GuardCLI

__all__ = ["console", "main"]


def usage() -> str:
    """Return the help of the command line as a whole."""
    prog = program()
    return f"""{synopsis()}

Trains MAML on a task (default: sinusoid) and tests it on held-out episodes. With --guard, it also checks whether
the learning rates can converge, and draws the safe region. The task word stands for a configuration shipped
with the package; every value of it can be overridden, for example

  {prog} sinusoid --guard rescale --guard.every_n_steps 50 --model.inner_lr 0.02 --trainer.max_steps 2000
  {prog} omniglot --guard --data.tasks.k_shot 5

A command before the task word does one thing:

{_summaries()}

{prog} fit --help lists every option. Under every command but phase-diagram, --print_config prints the
configuration as YAML, which --config OWN.yaml reads back. {prog} --version prints the version.
linear trains on one fixed task, as Takagi et al. assume: its test loss, on other tasks, rises as it learns that one.
omniglot trains 300 steps, to try it out; omniglot_5way, omniglot_20way, miniimagenet (1 shot) and miniimagenet_5shot
follow the published settings (Finn et al. 2017: 60,000 steps, for a GPU). Image data is read from the folder that
--data FOLDER or $LMG_DATA names (default: data); --data.tasks.download true downloads Omniglot into it.
"""


@interruptible()
def main(words: Sequence[str] | None = None) -> Any:
    """Run the command line (default: ``sys.argv``), and return the CLI; for ``phase-diagram``, what it wrote."""
    if importlib.util.find_spec("jsonargparse") is None:
        exit_with_error(
            "error: the command line needs packages that training does not, jsonargparse among them. Install them with "
            "pip install 'lightning-maml-guard[examples]' (in a checkout: pip install '.[examples]')."
        )
    given = sys.argv[1:] if words is None else list(words)
    if given == ["--version"]:
        print(f"lightning-maml-guard {__version__}")
        raise SystemExit(0)
    command = given.pop(0) if given and given[0] in COMMANDS else TRAIN_THEN_TEST
    if command == "phase-diagram":
        from lightning_maml_guard.cli.phase_diagram import main as phase_diagram_command

        return phase_diagram_command(given, f"{program()} phase-diagram")
    given = take_data_folder(given)
    if command == TRAIN_THEN_TEST and given in (["-h"], ["--help"]):
        print(usage(), end="")
        raise SystemExit(0)
    options: dict[str, Any] = {}
    if command == "suggest":
        options, given = parse_suggest_options(given)
        options["name"] = run_name(given)
    if command in EVALUATION and any(word.startswith("--guard") for word in given):
        exit_with_error(f"error: {command} trains nothing, so --guard has nothing to watch. Leave it out, or use fit.")
    cli = _built(command, given)
    if command == "suggest" and cli.config["ckpt_path"] is not None:
        exit_with_error("error: suggest measures the network as initialised, so it takes no --ckpt_path. Leave it out.")
    from lightning_maml_guard.cli.commands import RUNS, known_warnings_ignored
    from lightning_maml_guard.tasks.image_files import DatasetError  # the help comes without torch

    with known_warnings_ignored(command, cli):
        try:
            RUNS[command](cli, **options)
        except DatasetError as error:
            cli.parser.error(f"--data: {error}")
    return cli


def console() -> None:
    """Run the installed command; what this returned would become the exit status."""
    main()


def _built(command: str, given: Sequence[str]) -> GuardCLI:
    words = translate(given)
    from lightning_maml_guard.cli.parser import GuardCLI, Parser
    from lightning_maml_guard.utils.lightning_compat import LightningDataModule, LightningModule

    return GuardCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        name=run_name(given),
        parser_class=Parser,
        parser_kwargs={
            "usage": _usage_of(command),
            "description": DESCRIPTIONS[command],
            "trains": command not in EVALUATION,
            "also": SUGGEST_OPTIONS if command == "suggest" else (),
        },
        args=words,
        run=False,
        auto_configure_optimizers=False,
    )


def _usage_of(command: str) -> str:
    guard = "" if command in EVALUATION else f"[--guard [{'|'.join(ACTIONS)}]] "
    own = "[--batches N] [--margin M] [--steps N] [--apply OUT.yaml] " if command == "suggest" else ""
    return " ".join(f"{program()} {command} [task] {guard}{own}[options below]".split())


def _summaries() -> str:
    return "\n".join(
        textwrap.fill(DESCRIPTIONS[command], 112, initial_indent=f"  {command:15s}", subsequent_indent=" " * 17)
        for command in COMMANDS
    )
