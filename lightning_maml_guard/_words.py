"""The words of the command line: from the task word and ``--guard [action]`` to LightningCLI's options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_maml_guard.guard.callback import ACTIONS

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
COMMANDS = ("fit", "validate", "test", "suggest", "phase-diagram")


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
            raise SystemExit(
                f"{synopsis()}\nerror: expected the task to be one of {', '.join(TASKS)} but got {task!r}. Before it "
                f"may stand one of {', '.join(COMMANDS)}."
            )
    own_config = any(word in {"-c", "--config"} or word.startswith("--config=") for word in rest)
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
                raise SystemExit(
                    f"{synopsis()}\nerror: expected --guard to be one of {', '.join(ACTIONS)} but got {mode!r}."
                )
            options += ["--guard=lightning_maml_guard.ConvergenceGuard", f"--guard.action={mode or 'warn'}"]
        else:
            options.append(word)
    return options


def options_of_suggest(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the options of ``suggest`` out, which are no part of a configuration: one YAML serves every command.

    Args:
        words: The command line, without the program's name and the command.

    Returns:
        ``batches`` and ``margin``, and the other words.
    """
    parser = argparse.ArgumentParser(prog=f"{program()} suggest", add_help=False, allow_abbrev=False)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--margin", type=float, default=0.5)
    named, rest = parser.parse_known_args(words)
    return vars(named), rest
