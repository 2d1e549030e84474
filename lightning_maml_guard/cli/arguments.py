"""The words of the command line: from the task word and ``--guard [action]`` to LightningCLI's options."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lightning_maml_guard.guard.convergence_guard import ACTIONS
from lightning_maml_guard.utils.checks import check_count, check_number, checked

CONFIGS = Path(__file__).parent / "configs"
TASKS = (
    "linear",
    "sinusoid",
    "omniglot",
    "omniglot_5way",
    "omniglot_20way",
    "miniimagenet",
    "miniimagenet_5shot",
)
# Options of the command suggest alone.
SUGGESTS = ("batches", "margin")
COMMANDS = ("fit", "validate", "test", "suggest", "phase-diagram")
_CONFIG = ("-c", "--config")


def program() -> str:
    """Say how the program was called.

    Returns:
        ``train.py`` or the installed command's name.
    """
    return "train.py" if Path(sys.argv[0]).name == "train.py" else "lightning-maml-guard"


def synopsis() -> str:
    """Sum the command line up.

    Returns:
        The lines that begin the help, and every complaint.
    """
    prog = program()
    return f"""usage: {prog} [{"|".join(TASKS)}] [--guard [{"|".join(ACTIONS)}]] [LightningCLI options]
       {prog} fit|validate|test|suggest [the same words and options]
       {prog} phase-diagram [linear|sinusoid|omniglot|miniimagenet] [--help]"""


def refuse(message: str) -> NoReturn:
    """End the program for a command line that is wrong, as argparse does.

    Args:
        message: What is wrong.

    Raises:
        SystemExit: Always, with status 2.
    """
    sys.stderr.write(f"{message}\n")
    raise SystemExit(2)


def translate(words: Sequence[str]) -> list[str]:
    """Turn the task word and ``--guard [action]`` into LightningCLI options.

    Args:
        words: The command line, without the program's name and the command.

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
            refuse(
                f"{synopsis()}\nerror: expected the task to be one of {', '.join(TASKS)} but got {task!r}. Before it "
                f"may stand one of {', '.join(COMMANDS)}."
            )
    own_config = any(word in _CONFIG or word.startswith("--config=") for word in rest)
    options = [] if own_config and not (words and words[0] in TASKS) else ["--config", str(CONFIGS / f"{task}.yaml")]
    names_guard = any(word == "--guard" or word.startswith("--guard=") for word in rest)
    if not own_config and not names_guard and any(word.startswith("--guard.") for word in rest):
        rest.insert(0, "--guard=")
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
                refuse(f"{synopsis()}\nerror: expected --guard to be one of {', '.join(ACTIONS)} but got {mode!r}.")
            options += ["--guard=lightning_maml_guard.ConvergenceGuard", f"--guard.action={mode or 'warn'}"]
        else:
            options.append(word)
    return options


def name_of(words: Sequence[str]) -> str:
    """Name what a run leaves in ``runs``.

    Args:
        words: The command line, without the program's name and the command.

    Returns:
        The task word; without one the name of the last file of ``--config``, without its ending.
    """
    if words and words[0] in TASKS:
        return words[0]
    files = [
        following if word in _CONFIG else word.removeprefix("--config=")
        for word, following in itertools.zip_longest(words, words[1:], fillvalue="")
        if word in _CONFIG or word.startswith("--config=")
    ]
    return Path(files[-1]).stem if files else "sinusoid"


def options_of_suggest(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the options of ``suggest`` out, which are no part of a configuration: one YAML serves every command.

    Args:
        words: The command line, without the program's name and the command.

    Returns:
        ``batches`` and ``margin``, and the other words.
    """
    parser = argparse.ArgumentParser(prog=f"{program()} suggest", add_help=False, allow_abbrev=False)
    count, fraction = partial(check_count, "batches"), partial(check_number, "margin", above=0, below=1)
    parser.add_argument("--batches", type=checked(int, count), default=4)
    parser.add_argument("--margin", type=checked(float, fraction), default=0.5)
    named, rest = parser.parse_known_args(words)
    return vars(named), rest
