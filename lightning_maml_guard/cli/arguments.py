"""Commands, task words and ``--guard [action]``: the words of the command line, as options of LightningCLI.

Nothing here imports torch or Lightning, so that help and an error about a word come at once.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lightning_maml_guard.utils.checks import check_count, check_number, checked, did_you_mean

# What each command does, as its help says it; the task word alone trains and then tests.
TRAIN_THEN_TEST = ""
DESCRIPTIONS = {
    TRAIN_THEN_TEST: (
        "Train MAML on a task and test it; with --guard, watch the learning rates and draw the safe region."
    ),
    "fit": "Train MAML on a task; with --guard, watch the learning rates and draw the safe region.",
    "validate": (
        "Evaluate a checkpoint (--ckpt_path; without one the network as initialised) on the validation episodes."
    ),
    "test": "Evaluate a checkpoint (--ckpt_path; without one the network as initialised) on the test episodes.",
    "suggest": (
        "Try learning rates before training, each for --steps N (default 40) and the better ones four times as long, "
        "and suggest the pair whose loss ends lowest, up to --margin M (default 0.25) of the largest outer rate that "
        "trains. --apply OUT.yaml writes the configuration with the pair in it, which fit --config OUT.yaml trains. "
        "--batches N (default 4) training batches are measured beside it; --guard.NAME options say how."
    ),
    "phase-diagram": (
        "Train a grid of inner and outer learning rates, one of the experiments of Takagi et al., and draw it."
    ),
}
COMMANDS = tuple(filter(None, DESCRIPTIONS))
# Commands that evaluate a checkpoint and train nothing.
EVALUATION = ("validate", "test")
# The guard's actions, in the order of guard.actions.
ACTIONS = ("log", "warn", "rescale", "stop")
# Data sets from simple to hard, which are the panels of phase-diagram too.
DATASETS = ("linear", "sinusoid", "omniglot", "miniimagenet")
DEFAULT_TASK = "sinusoid"
CONFIGS = Path(__file__).parent / "configs"
# Options of the command suggest alone.
SUGGEST_OPTIONS = ("apply", "batches", "margin", "steps")


def _position(task: str) -> tuple[int, str, int]:
    """Order by data set, those not listed last, and then by the number in the rest of the word (5way, 20way)."""
    dataset, _, variant = task.partition("_")
    place = DATASETS.index(dataset) if dataset in DATASETS else len(DATASETS)
    return place, dataset, int("0" + "".join(filter(str.isdigit, variant)))


# A task is added by adding its file.
TASKS = tuple(sorted((path.stem for path in CONFIGS.glob("*.yaml")), key=_position))


def program() -> str:
    """Return the name the program was called by."""
    return "train.py" if Path(sys.argv[0]).name == "train.py" else "lightning-maml-guard"


def synopsis() -> str:
    """Return the usage lines at the top of the help and of errors."""
    prog = program()
    return f"""usage: {prog} [{"|".join(TASKS)}] [--guard [{"|".join(ACTIONS)}]] [LightningCLI options]
       {prog} fit|validate|test|suggest [the same words and options]
       {prog} phase-diagram [{"|".join(DATASETS)}|near-minimum] [--help]"""


def exit_with_error(message: str) -> NoReturn:
    """Print what is wrong with the command line, and exit with argparse's status."""
    sys.stderr.write(f"{message}\n")
    raise SystemExit(2)


@contextmanager
def interruptible(advice: str = "") -> Iterator[None]:
    """End the command on Ctrl-C with a line, and with the status that shells know it by."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"\nInterrupted. {advice}".rstrip() + "\n")
        raise SystemExit(128 + signal.SIGINT) from None


def translate(words: Sequence[str]) -> list[str]:
    """Turn the words after the command into LightningCLI options."""
    rest, task = list(words), None
    if rest and not rest[0].startswith("-"):
        task = rest.pop(0)
        if task not in TASKS:
            exit_with_error(
                f"{synopsis()}\nerror: expected the task to be one of {', '.join(TASKS)} but got {task!r}. Before it "
                f"may stand one of {', '.join(COMMANDS)}. {did_you_mean(task, (*TASKS, *COMMANDS))}".rstrip()
            )
    own_config = _config_files(rest)
    options = [] if own_config and not task else ["--config", str(CONFIGS / f"{task or DEFAULT_TASK}.yaml")]
    # --guard.NAME alone means --guard too, unless the user's own file may say which guard.
    if not own_config and not any(map(_is_guard, rest)) and any(word.startswith("--guard.") for word in rest):
        rest.insert(0, "--guard=")
    while rest:
        word = rest.pop(0)
        if not _is_guard(word):
            options.append(word)
            continue
        action = word.partition("=")[2]
        if not action and rest and not rest[0].startswith("-"):
            action = rest.pop(0)
        if action not in {"", *ACTIONS}:
            exit_with_error(
                f"{synopsis()}\nerror: expected --guard to be one of {', '.join(ACTIONS)} but got {action!r}. "
                f"{did_you_mean(action, ACTIONS)}".rstrip()
            )
        options += ["--guard=lightning_maml_guard.ConvergenceGuard", f"--guard.action={action or 'warn'}"]
    return options


def run_name(words: Sequence[str]) -> str:
    """Return the folder of ``runs`` to write into: the task, or the stem of the last ``--config`` file."""
    if words and words[0] in TASKS:
        return words[0]
    files = _config_files(words)
    if not files:
        return DEFAULT_TASK
    path = Path(files[-1])
    # The configuration that a run has saved, runs/NAME/version_N/config.yaml, goes on under that run's name.
    saved = path.name == "config.yaml" and path.parent.name.startswith("version_")
    return path.parent.parent.name if saved else path.stem


def take_data_folder(words: Sequence[str]) -> list[str]:
    """Take ``--data FOLDER`` out, and let ``$LMG_DATA`` name the folder; ``--data CLASS`` is LightningCLI's."""
    rest = list(words)
    for index, word in enumerate(rest):
        name, _, value = word.partition("=")
        given = [value] if value else rest[index + 1 : index + 2]
        if name != "--data" or not given or not _is_folder(given[0]):
            continue
        os.environ["LMG_DATA"] = given[0]  # the environment, so that processes started from here find it
        return rest[:index] + rest[index + (1 if value else 2) :]
    return rest


def parse_suggest_options(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the options of suggest out: as no part of a configuration, so that one YAML serves every command."""
    parser = argparse.ArgumentParser(prog=f"{program()} suggest", add_help=False, allow_abbrev=False)
    count, fraction = partial(check_count, "batches"), partial(check_number, "margin", above=0, below=1)
    parser.add_argument("--batches", type=checked(int, count), default=4)
    parser.add_argument("--margin", type=checked(float, fraction), default=0.25)
    parser.add_argument("--steps", type=checked(int, partial(check_count, "steps", least=1)), default=40)
    parser.add_argument("--apply", type=Path, default=None)
    options, rest = parser.parse_known_args(words)
    return vars(options), rest


def _is_folder(word: str) -> bool:
    """Return False for a class, a file or a dictionary, which LightningCLI's own ``--data`` takes."""
    return "/" in word or Path(word).is_dir() or (word.islower() and "." not in word)


def _is_guard(word: str) -> bool:
    return word == "--guard" or word.startswith("--guard=")


def _config_files(words: Sequence[str]) -> list[str]:
    return [
        following if word in ("-c", "--config") else word.removeprefix("--config=")
        for word, following in itertools.zip_longest(words, words[1:], fillvalue="")
        if word in ("-c", "--config") or word.startswith("--config=")
    ]
