"""What each of the processes that hold one model runs: ``python -m tests.sharding.program FOLDER CASE [CASE ...]``.

The processes find each other as torchrun's do, by RANK, WORLD_SIZE and MASTER_PORT. With ``alone`` one process runs the
same cases on all of the data, without sharding.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, EpisodeBatch, GuardWarning, MetaLearningModule, MetaProblem
from lightning_maml_guard.utils.lightning_compat import Callback, LightningModule, Trainer
from tests.helpers import QUIET, grouped
from tests.ranks.program import episodes

SPLITS_ON_CPUS = hasattr(torch.cpu.Stream, "record_event")  # torch 2.6's fully_shard runs on GPUs alone

# (kind of module, guard options, options of the module, steps)
LOG: dict[str, Any] = {"action": "log", "every_n_steps": 2, "steps": 1, "batches": 1, "max_iter": 6}
ACT: dict[str, Any] = {"action": "rescale", "every_n_steps": 2, "steps": 4, "batches": 1, "max_iter": 6}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "plain": ("plain", LOG, {"lr": 0.05}, 3),
    "maml": ("maml", LOG, {"lr": 0.05}, 1),
    "adam": ("plain", {**LOG, "criterion": "simplified"}, {"lr": 0.02, "adam": True}, 3),
    "accumulated": ("plain", LOG, {"lr": 0.05, "accumulate": 2}, 3),
    "first": ("maml", {**LOG, "max_iter": 10}, {"lr": 0.05, "order": "first", "inner_steps": 2}, 1),
    "simplified": (
        "maml",
        {**LOG, "criterion": "simplified"},
        {"lr": 0.05, "order": "simplified", "inner_steps": 2},
        1,
    ),
    "steps": ("maml", LOG, {"lr": 0.05, "inner_lr": [0.05, 0.02], "inner_steps": 2, "adapt": "2"}, 1),
    "worst": ("maml", {**LOG, "tasks": "worst"}, {"lr": 0.05}, 1),
    "stated": ("stated", {**LOG, "max_iter": 10}, {"lr": 0.05}, 3),
    "rescale": ("plain", ACT, {"lr": 40.0}, 8),
    "rescale_maml": ("maml", {**ACT, "steps": 0}, {"lr": 2.0, "inner_lr": 0.6}, 1),
    "rolled_back": ("plain", {**ACT, "every_n_steps": 4}, {"lr": 0.05, "struck_at": 1}, 6),
    "resumed": ("plain", ACT, {"lr": 40.0}, 8),
    "killed": ("plain", LOG, {"lr": 0.05, "killed_at": 1}, 100),
    "validated": ("maml", {**LOG, "max_iter": 1}, {"lr": 0.05, "order": "first", "validates": True}, 1),
}


def share(batch: EpisodeBatch, rank: int, size: int) -> EpisodeBatch:
    """A process's share of the examples of every task."""
    support, query = (tuple(each[:, rank::size] for each in pair) for pair in batch)
    return EpisodeBatch(support, query)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 1)).double()


class Data:
    """The loaders of a module, and the sharding of its network: as one unit, or layer by layer."""

    layered = False

    def configure_model(self):
        if self.trainer.world_size > 1:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            if self.layered:
                fully_shard(self.network[0], mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def train_dataloader(self):
        own = share(episodes(2, 12), self.trainer.global_rank, self.trainer.world_size)
        return DataLoader([own] * 100, batch_size=None)


class Plain(Data, LightningModule):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.options = network(), options

    def training_step(self, batch, batch_idx):
        if self.options.get("killed_at") == batch_idx and self.trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch.support
        loss = nn.functional.mse_loss(self.network(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return (Adam if self.options.get("adam") else SGD)(self.parameters(), lr=self.options["lr"])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.options.get("struck_at") == batch_idx:
            with torch.no_grad():
                for value in self.network.parameters():
                    value.mul_(100.0)


class Maml(Data, MetaLearningModule):
    def __init__(self, options: dict[str, Any]) -> None:
        lr, self.validates = options["lr"], options.get("validates", False)
        known = {"inner_lr": 0.05, **{k: v for k, v in options.items() if k not in ("lr", "validates")}}
        super().__init__(network(), optimizer=lambda parameters: SGD(parameters, lr=lr), **known)

    def val_dataloader(self):
        return self.train_dataloader() if self.validates else []


class Stated(Plain):
    """First-order MAML by hand, on the live parameters; the guard is told its problem."""

    layered = True
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, (support, query) = self.optimizers(), batch
        theta = [value.detach().clone() for value in self.network.parameters()]
        total = [torch.zeros_like(value) for value in theta]
        for task in range(2):
            for data, rate in ((support, 0.05), (query, 0.0)):
                self.network.zero_grad()
                nn.functional.mse_loss(self.network(data[0][task]), data[1][task]).backward()
                with torch.no_grad():
                    for value in self.network.parameters():
                        value -= rate * value.grad
            with torch.no_grad():
                for value, start, summed in zip(self.network.parameters(), theta, total, strict=True):
                    summed += value.grad / 2
                    value.copy_(start)
        for value, summed in zip(self.network.parameters(), total, strict=True):
            value.grad = summed
        optimizer.step()

    def problem(self, batch):
        def task_loss(params, data):
            return nn.functional.mse_loss(torch.func.functional_call(self.network, params, (data[0],)), data[1])

        return MetaProblem(dict(self.network.named_parameters()), task_loss, *batch, inner_lr=0.05, order="first")


MODULES = {"plain": Plain, "maml": Maml, "stated": Stated}


class Hear(Callback):
    """Collects the guard's warnings in the process that gives them."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def on_train_start(self, trainer, pl_module) -> None:
        warnings.simplefilter("always", GuardWarning)
        warnings.showwarning = lambda message, *_, **__: self.said.append(str(message))


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def train(folder: Path, case: str, rank: int, size: int) -> dict[str, Any]:
    kind, options, given, steps = CASES[case]
    given = dict(given)
    accumulate = given.pop("accumulate", 1)
    problem = {"problem": lambda module, batch: module.problem(batch)} if kind == "stated" else {}

    def run(most: int, **arguments: Any) -> tuple[Any, ConvergenceGuard, Any]:
        module, hear = MODULES[kind](given), Hear()
        guard = ConvergenceGuard(**grouped(**options), **problem)
        strategy: dict[str, Any] = {}
        if size > 1:
            from pytorch_lightning.strategies import ModelParallelStrategy

            strategy = {"strategy": ModelParallelStrategy(size, 1), "devices": size}
        trainer = Trainer(
            **{**QUIET, **strategy},
            max_steps=most,
            max_epochs=-1,
            use_distributed_sampler=False,
            accumulate_grad_batches=accumulate,
            callbacks=[hear, guard],
            limit_val_batches=1,
        )
        trainer.fit(module, **arguments)
        guard.hear = hear
        return module, guard, trainer

    if case == "resumed":
        _, _, trainer = run(4)
        trainer.save_checkpoint(folder / "resumed.ckpt")
        module, guard, trainer = run(steps, ckpt_path=folder / "resumed.ckpt")
    else:
        module, guard, trainer = run(steps)
    return {
        "guard": guard.state_dict(),
        "weights": {name: whole(value.detach()).clone() for name, value in module.named_parameters()},
        "steps": trainer.global_step,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "said": guard.hear.said,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    at, cases = Path(sys.argv[1]), sys.argv[2:]
    here, number = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for each in cases:
        torch.save(train(at, each, here, number), at / f"{each}-{number}-{here}.pt")
