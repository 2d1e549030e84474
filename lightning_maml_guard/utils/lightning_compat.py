"""The only file that names Lightning: pytorch_lightning, or lightning if the user has that one."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info as inform

from lightning_maml_guard.utils.distributed import ProcessGroup, Ranks, ShardedRanks
from lightning_maml_guard.utils.warnings import GuardWarning

# Two packages with the same code and different classes: a Trainer of one does not accept a module of the other.
_NAMES = ("pytorch_lightning", "lightning.pytorch")


def _packages_in_use() -> tuple[str, ...]:
    """The packages that are already imported; else the first one that is installed."""
    imported = tuple(name for name in _NAMES if sys.modules.get(name) is not None)
    if imported:
        return imported
    for name in _NAMES:
        root = name.partition(".")[0]
        if sys.modules.get(root, root) is not None and find_spec(root) is not None:
            return (name,)
    raise ImportError(
        "lightning_maml_guard's callback, module and data module need pytorch-lightning or lightning (2.6 or newer), "
        "and neither is installed: pip install pytorch-lightning. The mathematics (measure, critical_rates) works "
        "without."
    )


PACKAGES = _packages_in_use()
PACKAGE = PACKAGES[0]

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
    from pytorch_lightning import LightningModule as MixinBase  # of a mixin before a module of either package
    from pytorch_lightning.callbacks import RichProgressBar
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
    from pytorch_lightning.loggers.logger import DummyLogger
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
else:
    MixinBase = object
    _first = import_module(PACKAGE)
    LightningModule, Trainer, seed_everything = _first.LightningModule, _first.Trainer, _first.seed_everything
    DummyLogger = import_module(f"{PACKAGE}.loggers.logger").DummyLogger
    MisconfigurationException = import_module(f"{PACKAGE}.utilities.exceptions").MisconfigurationException
    # A callback and a data module that inherit from both packages work in the Trainers and the CLIs of both.
    Callback = type("Callback", tuple(import_module(name).Callback for name in PACKAGES), {})
    LightningDataModule = type(
        "LightningDataModule", tuple(import_module(name).LightningDataModule for name in PACKAGES), {}
    )


# Only the command line needs these, and with them jsonargparse, which other users need not have.
_FIRST_USE = {"LightningArgumentParser": "cli", "LightningCLI": "cli", "RichProgressBar": "callbacks"}


def __getattr__(name: str) -> Any:
    if name in _FIRST_USE:
        return getattr(import_module(f"{PACKAGE}.{_FIRST_USE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def default_loggers() -> tuple[tuple[Any, str], ...]:
    """Return the loggers of the command line, each with the folder it writes into."""
    loggers = import_module(f"{PACKAGE}.loggers")
    return (loggers.CSVLogger, "runs"), (loggers.TensorBoardLogger, "runs/tensorboard")


__all__ = [
    "PACKAGE",
    "PACKAGES",
    "Callback",
    "DummyLogger",
    "LightningArgumentParser",
    "LightningCLI",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "MixinBase",
    "Plan",
    "RichProgressBar",
    "Trainer",
    "check_data_module",
    "check_module",
    "check_strategy",
    "default_loggers",
    "hyperparameters_given",
    "inform",
    "least_run",
    "no_loader",
    "overrides",
    "plan_of",
    "planned_steps",
    "quiet_lightning",
    "ranks_of",
    "seed_everything",
    "trainer_and_loader_of",
]


def check_module(module: Any, chosen: bool) -> None:
    """Raise a TypeError for a module of no Lightning package; warn if the user's Trainer may not accept it.

    ``chosen`` is True if the package was chosen here and not by the user.
    """
    imported = {name: sys.modules[name] for name in _NAMES if sys.modules.get(name) is not None}
    of = [name for name, package in imported.items() if isinstance(module, package.LightningModule)]
    kind = type(module).__name__
    if not of:
        raise TypeError(
            f"Expected {kind} to be a LightningModule as well, of the package whose Trainer you use, but it derives "
            f"from MetaLearning alone. Write class {kind}(MetaLearning, lightning.pytorch.LightningModule)."
        )
    if chosen:
        _warn_of_the_other_package(
            f"{kind} is a module", of, ", or write class Mine(lightning_maml_guard.MetaLearning, {}.LightningModule)"
        )


def check_data_module(data: Any) -> None:
    """Warn if the user's Trainer may not accept a data module: its package was imported after this one."""
    _warn_of_the_other_package(f"{type(data).__name__} is a data module", PACKAGES)


def _warn_of_the_other_package(what: str, of: Sequence[str], or_write: str = "") -> None:
    others = [name for name in _NAMES if sys.modules.get(name) is not None and name not in of]
    if others:
        warnings.warn(
            f"{what} of {of[0]}, and {others[0]} is imported as well, whose Trainer does not accept "
            f"it: the two packages do not mix. If your Trainer is {of[0]}'s, do nothing. If it is {others[0]}'s, "
            f"import {others[0].partition('.')[0]} alone and before lightning_maml_guard{or_write.format(others[0])}.",
            GuardWarning,
            stacklevel=4,
        )


def overrides(module: Any, hook: str) -> bool:
    """Return True if a module has a hook of its own instead of Lightning's."""
    home = str(getattr(getattr(module, hook), "__module__", ""))
    return not any(home == package or home.startswith(f"{package}.") for package in _NAMES)


def hyperparameters_given() -> bool:
    """Return True inside LightningCLI, which supplies the hyperparameters of a module itself."""
    for name in PACKAGES:
        given = getattr(import_module(f"{name}.core.mixins.hparams_mixin"), "_given_hyperparameters", None)
        if given is not None and given.get() is not None:
            return True
    return False


def trainer_and_loader_of(module: Any, name: str) -> tuple[Any, Any]:
    """Return the ``Trainer`` and the ``CombinedLoader`` of a module's package.

    Raises a TypeError that calls the module ``name`` if it is a LightningModule of neither package.
    """
    for package in _NAMES:
        imported = sys.modules.get(package)
        if imported is not None and isinstance(module, imported.LightningModule):
            return imported.Trainer, import_module(f"{package}.utilities.combined_loader").CombinedLoader
    raise TypeError(
        f"Expected argument `{name}` to be a LightningModule but got {type(module).__name__}. Pass the instance you "
        "would give to trainer.fit (of torch.compile's wrapper, the module inside)."
    )


def no_loader(module: Any) -> Any:
    """Return an empty ``CombinedLoader`` for a ``val_dataloader`` without data.

    Lightning takes an empty list for a loader, and warns.
    """
    combined_loader = trainer_and_loader_of(module, "module")[1]
    return type("NoLoader", (combined_loader,), {"flattened": []})([], "sequential")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's messages about devices and tips, for a Trainer that the user did not make."""
    loggers = [logging.getLogger(name) for name in _NAMES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# Strategies by name, so that both packages' classes, and those derived from them, are known: the one that keeps the
# pieces of one model on its processes, and those that keep whole parameters on every process.
_SHARDING = "ModelParallelStrategy"
_TESTED_STRATEGIES = frozenset({"SingleDeviceStrategy", "DDPStrategy", _SHARDING})
_UNTESTED_STRATEGIES = frozenset({"DeepSpeedStrategy"})  # though derived from DDP's


def _is_one_of(trainer: Any, names: Collection[str]) -> bool:
    return any(base.__name__ in names for base in type(trainer.strategy).__mro__)


def check_strategy(trainer: Any, allow_untested: bool) -> None:
    """Raise a MisconfigurationException under a strategy that the guard was not tested with."""
    tested = _is_one_of(trainer, _TESTED_STRATEGIES) and not _is_one_of(trainer, _UNTESTED_STRATEGIES)
    if allow_untested or tested:
        return
    raise MisconfigurationException(
        f"ConvergenceGuard was not tested with {type(trainer.strategy).__name__}: it needs whole parameters, or pieces "
        "that fully_shard made. Use strategy='ddp', one device, or ModelParallelStrategy with fully_shard, or pass "
        "ConvergenceGuard(allow_untested=True): a check that fails is then one warning, and training goes on."
    )


def is_sharded(trainer: Any) -> bool:
    """Return True if the processes hold one model in pieces, and go through the same tasks together."""
    return _is_one_of(trainer, {_SHARDING})


def ranks_of(trainer: Any) -> Ranks:
    """Find the processes that train together."""
    if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
        group = ShardedRanks if is_sharded(trainer) else ProcessGroup
        return group(trainer.strategy.root_device)
    return Ranks()


def least_run(trainer: Any) -> tuple[str, ...]:
    """Name what a Trainer reaches before it stops when it is asked to: ``min_epochs`` and ``min_steps``."""
    reached = {"min_epochs": trainer.current_epoch, "min_steps": trainer.global_step + 1}
    least = {name: getattr(trainer, name) or 0 for name in reached}
    return tuple(f"{name} = {least[name]}" for name, now in reached.items() if now < least[name])


class Plan(NamedTuple):
    """What of a run decides its coming learning rates.

    Attributes:
        batch: The coming batch, from 0 in its epoch.
        epoch: Its epoch.
        batches: Batches per epoch; None if not known.
        accumulate: Batches per optimizer step.
        steps: Optimizer steps to the planned end; None without one.
        schedulers: The configs (``scheduler``, ``interval``, ``frequency``, ``reduce_on_plateau``) Lightning steps.
        shared: Objects that schedulers may read and that are not to be copied.
        failure: Why it is not known when the schedulers are stepped.
    """

    batch: int
    epoch: int
    batches: int | None
    accumulate: int
    steps: int | None
    schedulers: tuple[Any, ...] = ()
    shared: tuple[Any, ...] = ()
    failure: Exception | None = None


def planned_steps(trainer: Any, *, step: int = 0, epoch: int = 0, batch: int = 0) -> int | None:
    """Optimizer steps from a place of a run, its start by default, to its end; None where no end is known."""
    ends = [] if trainer.max_steps == -1 else [trainer.max_steps - step]
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    if not math.isinf(batches) and trainer.max_epochs not in (None, -1):
        ends.append(math.ceil(batches / accumulate) * (trainer.max_epochs - epoch) - batch // accumulate)
    return max(0, min(ends)) if ends else None


def plan_of(trainer: Any) -> Plan:
    """Read where a run is and how far it is to go, without setting up a data loader."""
    loop, module = trainer.fit_loop, trainer.lightning_module
    progress, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress.current
    batches = None if math.isinf(trainer.num_training_batches) else int(trainer.num_training_batches)
    accumulate = trainer.accumulate_grad_batches
    # `started` is behind `ready` in on_train_batch_start, and only there.
    batch, epoch = progress.current.started, epochs.completed
    at_the_end = progress.is_last_batch and batch == progress.current.ready
    if batch and (at_the_end or (batches is not None and batch >= batches)):
        # A run resumed from the end of an epoch does not count the next one as started.
        in_batch_end = progress.current.completed < batch and not loop.epoch_loop.restarting
        batch, epoch = 0, max(epochs.processed, epochs.started, epoch + in_batch_end)
    failure: Exception | None = None
    schedulers = tuple(trainer.lr_scheduler_configs)
    if schedulers and not module.automatic_optimization:
        failure = NotImplementedError("under manual optimization the module steps its schedulers itself")
    elif schedulers and overrides(module, "lr_scheduler_step"):
        failure = NotImplementedError("the module has an lr_scheduler_step of its own")
    steps = planned_steps(trainer, step=trainer.global_step, epoch=epoch, batch=batch)
    shared = tuple(each for each in (trainer, trainer.datamodule) if each is not None)
    return Plan(batch, epoch, batches, accumulate, steps, schedulers, shared, failure)
