"""LightningCLI with ``--guard``, and its argument parser with errors of one line."""

from __future__ import annotations

import shutil
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, NoReturn

from lightning_maml_guard.cli.arguments import ACTIONS
from lightning_maml_guard.cli.errors import (
    ClassOptionError,
    option_names,
    with_nearest,
    wrong_argument,
    wrong_for_trainer,
    wrong_option,
    wrong_rate,
)
from lightning_maml_guard.guard.convergence_guard import ConvergenceGuard
from lightning_maml_guard.maml.meta_learning import MetaLearningModule
from lightning_maml_guard.messages.spelling import Spelling
from lightning_maml_guard.tasks.datamodule import TaskDataModule
from lightning_maml_guard.tuner.suggestion import RateSuggestion
from lightning_maml_guard.utils.lightning_compat import (
    Callback,
    LightningArgumentParser,
    LightningCLI,
    MisconfigurationException,
    RichProgressBar,
    Trainer,
    default_loggers,
)


class Parser(LightningArgumentParser):
    """LightningCLI's parser; ``trains`` shows ``--guard`` in the help, ``also`` names options parsed elsewhere."""

    def __init__(self, *args: Any, trains: bool = True, also: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trains, self.also = trains, also

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with an error of one line."""
        if not self.exit_on_error:  # the parser of one class: the command line's own writes the option in full
            raise ClassOptionError(message, self._actions) from ex
        known = [*option_names(self._actions), *self.also, *_options_of_our_classes(self.trains)]
        super().error(wrong_option(ex, self._actions) or with_nearest(message, known), ex)


def _options_of_our_classes(trains: bool) -> list[str]:
    """List the options of the shipped configurations' classes, which the parser knows only once a class is named."""
    classes: dict[str, Any] = {"model": MetaLearningModule, "data": TaskDataModule}
    if trains:
        classes["guard"] = ConvergenceGuard
    names = [f"{key}.{name}" for key, each in classes.items() for name in signature(each).parameters]
    return [*names, "model.optimizer.lr"]


_IN_WIDE_TERMINALS = ("CustomBarColumn", "ProcessingSpeedColumn")


class StepBar(RichProgressBar):
    """Lightning's default bar on one line of 80 columns, without ``Epoch 0/-2`` where no number of epochs is set."""

    def __init__(self) -> None:
        super().__init__()
        self.theme = replace(self.theme, metrics_format=".3g")

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Leave out of a narrow terminal what the numbers need the room of."""
        columns: list[Any] = super().configure_columns(trainer)
        left_out = _IN_WIDE_TERMINALS if shutil.get_terminal_size((80, 24)).columns < 100 else ()
        return [each for each in columns if type(each).__name__ not in left_out]

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Leave out the run's number, which the folder's name holds."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        described = super()._get_train_description(current_epoch)
        return described.replace("/-2", "").ljust(len(self.validation_description))


class OptionSpelling(Spelling):
    """Write a guard's arguments as options of the command line."""

    def arguments(self, **given: Any) -> str:
        """Write the options, ``action`` first."""
        others = [f"--guard.{name} {str(value).lower()}" for name, value in given.items() if name != "action"]
        return " ".join([f"--guard {given['action']}", *others])

    guard = arguments

    def trainer(self, **given: Any) -> str:
        """Write the options of the Trainer."""
        return " ".join(f"--trainer.{name} {value}" for name, value in given.items())


class GuardCLI(LightningCLI):
    """LightningCLI with ``--guard`` and ``--ckpt_path``; ``suggestion`` is what the command ``suggest`` found."""

    guard: ConvergenceGuard | None = None
    suggestion: RateSuggestion | None = None

    def __init__(self, *args: Any, name: str, **kwargs: Any) -> None:
        self.name = name  # of the folder in runs
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the two options."""
        parser.add_argument(
            "--guard",
            type=ConvergenceGuard | None,
            default=None,
            help=f"Watch the learning rates. A word of {ACTIONS} names the action; --guard.NAME sets an argument.",
        )
        for action in parser._actions:
            # A configuration may hold a guard under every command.
            if not parser.trains and any(word.startswith("--guard") for word in action.option_strings):
                action.help = SUPPRESS
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to continue from (fit) or evaluate (validate, test); 'last': the newest in runs/NAME.",
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the given options; LightningCLI's own method warns of those in ``sys.argv``."""
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Build guard, module, data and Trainer; a failed check of an argument is an error of its option."""
        if message := wrong_rate(self.config):
            self.parser.error(message)
        try:
            super().instantiate_classes()
        except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
            message = wrong_argument(error, self.config) or wrong_for_trainer(error)
            if message is None:
                raise
            self.parser.error(message)

    @property
    def logs_by_default(self) -> bool:
        """Return True if the configuration names no logger."""
        return self._get(self.config_init, "trainer").logger in (None, True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the guard among its callbacks."""
        self.guard = self._get(self.config_init, "guard")
        if self.guard is not None:
            self.guard.spelling = OptionSpelling()
            given: list[Callback] | Callback = self._get(self.config_init, "trainer").callbacks or []
            kwargs["callbacks"] = [*(given if isinstance(given, list) else [given]), self.guard]
        if self.logs_by_default:
            kwargs["logger"] = [logger(save_dir=folder, name=self.name) for logger, folder in default_loggers()]
        trainer = super().instantiate_trainer(**kwargs)
        bar, among = trainer.progress_bar_callback, trainer.callbacks  # type: ignore[attr-defined]
        if type(bar) is RichProgressBar:
            among[among.index(bar)] = StepBar()
        return trainer
