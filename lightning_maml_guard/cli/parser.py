"""LightningCLI that knows ``--guard``, and whose errors are short."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning_maml_guard.cli.errors import explained, refusal
from lightning_maml_guard.guard.convergence_guard import ACTIONS, ConvergenceGuard
from lightning_maml_guard.guard.messages import Spelling
from lightning_maml_guard.tuner.suggestion import RateSuggestion
from lightning_maml_guard.utils.lightning_compat import (
    Callback,
    LightningArgumentParser,
    LightningCLI,
    RichProgressBar,
    Trainer,
)


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with short errors.

    Args:
        trains: Whether the command trains, so that its help lists ``--guard``; a configuration may hold one anyway.
        beside: Options that are taken before this parser sees the command line.
        **kwargs: LightningCLI's own.
    """

    def __init__(self, *args: Any, trains: bool = True, beside: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trains, self.beside = trains, beside

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with an error.

        Args:
            message: The error.
            ex: Its cause.
        """
        # Parsers of single classes raise theirs, and the one of the command line tells them all in one.
        if self.exit_on_error:
            words = [word for action in self._actions if action.help != SUPPRESS for word in action.option_strings]
            known = [word.removeprefix("--") for word in words if not word.endswith(".help")]
            message = explained(message, [*known, *self.beside])
        super().error(message, ex)


class StepBar(RichProgressBar):
    """Lightning's default bar, which without a number of epochs would count them as ``Epoch 0/-2``."""

    def _get_train_description(self, current_epoch: int) -> str:
        described = super()._get_train_description(current_epoch)
        return described.replace("/-2", "").ljust(len(self.validation_description))


class OptionSpelling(Spelling):
    """How a guard's arguments are written at the command line."""

    def arguments(self, **given: Any) -> str:
        """Write the options.

        Args:
            **given: Names and values of arguments, the action among them.

        Returns:
            The text.
        """
        others = [f"--guard.{name} {str(value).lower()}" for name, value in given.items() if name != "action"]
        return " ".join([f"--guard {given['action']}", *others])

    guard = arguments


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
        for action in parser._actions:
            if not parser.trains and any(word.startswith("--guard") for word in action.option_strings):
                action.help = SUPPRESS
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
            args: Options as :func:`~lightning_maml_guard.cli.arguments.translate` gives them.
        """
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Build guard, module, data and Trainer; what an argument check of this package refuses is a parser's error."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            refused = refusal(error, self.config.as_dict())
            if refused is None:
                raise
            self.parser.error(refused)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the guard among its callbacks.

        Args:
            **kwargs: Trainer arguments.

        Returns:
            The Trainer.
        """
        self.guard = self._get(self.config_init, "guard")
        if self.guard is not None:
            self.guard.spelling = OptionSpelling()
            callbacks: list[Callback] = list(self._get(self.config_init, "trainer").callbacks or [])
            kwargs["callbacks"] = [*callbacks, self.guard]
        trainer = super().instantiate_trainer(**kwargs)
        bar, among = trainer.progress_bar_callback, trainer.callbacks  # type: ignore[attr-defined]
        if type(bar) is RichProgressBar:
            among[among.index(bar)] = StepBar()
        return trainer
