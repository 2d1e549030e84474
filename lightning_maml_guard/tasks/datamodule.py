"""TaskDataModule: episodes for a Trainer, reproducible with any number of workers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_maml_guard.tasks.episodes import EpisodeBatch, TaskFamily, episode_generator
from lightning_maml_guard.utils.checks import check_count, check_flag
from lightning_maml_guard.utils.lightning_compat import (
    LightningDataModule,
    check_data_module,
    is_sharded,
    no_loader,
)


class _Episodes(Dataset[EpisodeBatch]):
    """Meta-batches by index; a batch depends on ``(seed, split, index)`` alone."""

    def __init__(self, family: TaskFamily, split: str, tasks: int, batches: int, seed: int, remainder: int = 0) -> None:
        self.family, self.split, self.tasks = family, split, tasks
        self.batches, self.seed, self.remainder = batches, seed, remainder

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> EpisodeBatch:
        tasks = self.remainder if self.remainder and index == self.batches - 1 else self.tasks
        return self.family.sample(tasks, episode_generator(self.seed, self.split, index), self.split)


class EpochSampler(DistributedSampler[int]):
    """Indices that continue from epoch to epoch, so that no epoch repeats the tasks of another.

    Every process draws its own tasks. (The base class makes Lightning keep this sampler.)

    Args:
        length: Batches per epoch.
        resample: False: every index is the first of the process, so that every step has the same tasks.
        shared: True: all processes draw the same tasks, as they must where they hold one model in pieces.
    """

    def __init__(self, length: int, resample: bool = True, shared: bool = False) -> None:
        together = not shared and dist.is_available() and dist.is_initialized()
        self.num_replicas, self.rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)
        self.length, self.resample, self.epoch = length, resample, 0
        # After a resume: how many batches of which epoch were already loaded.
        self.skip, self.skip_epoch = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch (called by Lightning, also when a run is resumed).

        Args:
            epoch: Its number.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        # A generator, since the loaders of worker processes create an iterator that they never use.
        first = self.skip if self.epoch == self.skip_epoch else 0
        self.skip = 0
        for step in range(first, self.length):
            yield (self.epoch * self.length + step) * self.num_replicas + self.rank if self.resample else self.rank


class _EveryIndex(DistributedSampler[int]):
    """All indices, in order, on every process: all hold one model and go through the same tasks together."""

    def __init__(self, length: int) -> None:
        self.length = length

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: every epoch has the same tasks."""

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


class EpisodeLoader(DataLoader[EpisodeBatch]):
    """A loader that continues within an epoch when an interrupted run is resumed (at the request of Lightning)."""

    _given = 0

    def __iter__(self) -> Iterator[EpisodeBatch]:  # type: ignore[override]
        """Load an epoch, or the rest of an interrupted one.

        Yields:
            The meta-batches.
        """
        # Lightning may replace the sampler (overfit_batches): then start at the first batch.
        sampler = self.sampler
        resumed = isinstance(sampler, EpochSampler) and sampler.epoch == sampler.skip_epoch
        self._given = sampler.skip if resumed else 0  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of which epoch were loaded.

        Returns:
            The argument of :meth:`load_state_dict`.
        """
        epoch = self.sampler.epoch if isinstance(self.sampler, EpochSampler) else 0
        return {"given": self._given, "epoch": epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue within an epoch.

        Args:
            state: What :meth:`state_dict` returned.
        """
        # At the end of an epoch continue with the next one.
        self._given = state["given"] % len(self)
        if isinstance(self.sampler, EpochSampler):
            self.sampler.skip, self.sampler.skip_epoch = self._given, state["epoch"]


class TaskDataModule(LightningDataModule):
    """Samples meta-batches from a family of tasks.

    Every meta-batch is drawn from its own seed, which is made from ``seed``, the split and the number of the batch.
    Runs are therefore reproducible with any number of workers and when resumed, also in the middle of an epoch. Each of
    several processes draws ``meta_batch_size`` tasks of its own per step; under ``ModelParallelStrategy``, where they
    hold one model in pieces, all draw the same.

    Args:
        tasks: The family of tasks.
        meta_batch_size: Tasks per training step and process.
        steps_per_epoch: Training steps per epoch.
        val_episodes: Episodes of the validation set (the same at every validation); 0 for none.
        test_episodes: Episodes of the test set.
        num_workers: Worker processes of each loader.
        resample: False: the same tasks and data at every training step (the assumption of Takagi et al.).
        seed: Seed of all episodes.

    Raises:
        TypeError: If ``tasks`` is not a family of tasks.
        ValueError: If a number is out of its range.

    Example:
        >>> from lightning_maml_guard import TaskDataModule
        >>> from lightning_maml_guard.tasks.regression import Sinusoid
        >>> data = TaskDataModule(Sinusoid(shots=5, queries=10), meta_batch_size=8)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.support[0].shape, batch.query[0].shape
        (torch.Size([8, 5, 1]), torch.Size([8, 10, 1]))
    """

    def __init__(
        self,
        tasks: TaskFamily,
        meta_batch_size: int = 4,
        steps_per_epoch: int = 1000,
        val_episodes: int = 100,
        test_episodes: int = 600,
        num_workers: int = 0,
        resample: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_data_module(self)
        if not isinstance(tasks, TaskFamily):
            raise TypeError(
                f"Expected argument `tasks` to be a TaskFamily (such as Sinusoid()) but got {type(tasks).__name__}. "
                "Pass an instance of one; your own is a subclass with a method `sample`."
            )
        for name, number, least in (
            ("meta_batch_size", meta_batch_size, 1),
            ("steps_per_epoch", steps_per_epoch, 1),
            ("val_episodes", val_episodes, 0),
            ("test_episodes", test_episodes, 1),
            ("num_workers", num_workers, 0),
        ):
            check_count(name, number, least)
        check_count("seed", seed, 0, math.inf)
        check_flag("resample", resample)
        self.tasks, self.meta_batch_size, self.steps_per_epoch = tasks, meta_batch_size, steps_per_epoch
        self.val_episodes, self.test_episodes = val_episodes, test_episodes
        self.num_workers, self.resample, self.seed = num_workers, resample, seed

    def prepare_data(self) -> None:
        """Load the data of the family in one process per machine: what that downloads and decodes, the others find."""
        self.tasks.setup()

    def setup(self, stage: str) -> None:
        """Load the data of the family; without workers, onto the device that trains.

        Args:
            stage: Lightning's stage; not used.
        """
        self.tasks.setup()
        if self.trainer is not None and not self.num_workers:
            self.tasks.to(self.trainer.strategy.root_device)

    def train_dataloader(self) -> DataLoader[EpisodeBatch]:
        """Build the loader of training episodes.

        Returns:
            A loader of ``steps_per_epoch`` meta-batches.
        """
        episodes = _Episodes(self.tasks, "train", self.meta_batch_size, self.steps_per_epoch, self.seed)
        sampler = EpochSampler(self.steps_per_epoch, self.resample, self._shared)
        return EpisodeLoader(episodes, sampler=sampler, **self._options)

    def val_dataloader(self) -> Any:
        """Build the loader of validation episodes.

        Returns:
            A loader over the same ``val_episodes`` episodes each time. Without episodes an empty loader, or an empty
            list if no Trainer is attached.
        """
        if self.val_episodes:
            return self._evaluation("val", self.val_episodes)
        return [] if self.trainer is None else no_loader(self.trainer.lightning_module)

    def test_dataloader(self) -> DataLoader[EpisodeBatch]:
        """Build the loader of test episodes.

        Returns:
            A loader over ``test_episodes`` episodes.
        """
        return self._evaluation("test", self.test_episodes)

    def _evaluation(self, split: str, number: int) -> DataLoader[EpisodeBatch]:
        batches, remainder = -(-number // self.meta_batch_size), number % self.meta_batch_size
        episodes = _Episodes(self.tasks, split, self.meta_batch_size, batches, self.seed, remainder)
        return DataLoader(episodes, sampler=_EveryIndex(batches) if self._shared else None, **self._options)

    @property
    def _shared(self) -> bool:
        """Whether the processes go through the same tasks."""
        return self.trainer is not None and is_sharded(self.trainer)

    @property
    def _options(self) -> dict[str, Any]:
        return {"batch_size": None, "num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
