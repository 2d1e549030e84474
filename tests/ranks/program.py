"""What each of two processes runs: `torchrun -m tests.ranks.program FOLDER CASE`, or through ddp_spawn."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_maml_guard import ConvergenceGuard, EpisodeBatch, GuardWarning, MetaLearningModule
from lightning_maml_guard.utils.lightning_compat import Callback, Trainer
from tests.helpers import grouped

STEPS = 24
# (guard options, outer rate, step at which a check fails on rank 1)
CASES = {
    "log": ({"action": "log"}, 0.05, None),
    "simplified": ({"action": "log", "criterion": "simplified", "tasks": "worst"}, 0.05, None),
    "rescale": ({"action": "rescale"}, 3.0, None),
    "rollback": ({"action": "rescale", "rollback": True}, 3.0, None),
    "failing": ({"action": "rescale"}, 0.05, 6),
}


def episodes(tasks: int = 4, shots: int = 6) -> EpisodeBatch:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, noise = draw(tasks, 2 * shots, 3), draw(tasks, 2 * shots, 1)
    y = (x.sum(-1, keepdim=True) * draw(tasks, 1, 1)).sin() + 0.1 * noise
    return EpisodeBatch((x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:]))


def part(batch: EpisodeBatch, rank: int, size: int) -> EpisodeBatch:
    support, query = (tuple(each[rank::size] for each in pair) for pair in batch)
    return EpisodeBatch(support, query)


class Module(MetaLearningModule):
    def __init__(self, beta: float) -> None:
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        super().__init__(network, inner_lr=0.05, optimizer=SGDAt(beta))
        self.fails_at: int | None = None

    def meta_problem(self, batch):
        now = self.trainer.global_rank, self.trainer.global_step
        if now == (1, self.fails_at) and not self._in_training_step:
            raise OSError("the disk of rank 1 is full")
        return super().meta_problem(batch)

    _in_training_step = False

    def training_step(self, batch, batch_idx):
        self._in_training_step = True
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self._in_training_step = False

    def train_dataloader(self):
        own = part(episodes(), self.trainer.global_rank, self.trainer.world_size)
        return DataLoader([own] * STEPS, batch_size=None)


class SGDAt:
    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(self, parameters):
        return SGD(parameters, lr=self.beta)


class Write(Callback):
    """Leaves what a rank ended with in a file: spawned processes hand nothing else back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []

    def on_train_end(self, trainer, pl_module) -> None:
        (guard,) = [each for each in trainer.callbacks if isinstance(each, ConvergenceGuard)]
        found = {
            "guard": guard.state_dict(),
            "weights": {name: value.detach().clone() for name, value in pl_module.named_parameters()},
            "steps": trainer.global_step,
            "said": list(self.said),
        }
        torch.save(found, self.folder / f"rank{trainer.global_rank}.pt")


def train(folder: Path, case: str, **arguments) -> None:
    options, beta, fails_at = CASES[case]
    torch.set_num_threads(1)
    write, guard = Write(folder), ConvergenceGuard(**grouped(every_n_steps=6, **options))
    module = Module(beta)
    module.fails_at = fails_at
    trainer = Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, **arguments},
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Hear(write), guard, write],
    )
    trainer.fit(module)


class Hear(Callback):
    """Collects the guard's warnings in the process that gives them."""

    def __init__(self, write: Write) -> None:
        self.write = write

    def on_train_start(self, trainer, pl_module) -> None:
        warnings.simplefilter("always", GuardWarning)
        warnings.showwarning = lambda message, *_, **__: self.write.said.append(str(message))


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], strategy="ddp", devices=2)
