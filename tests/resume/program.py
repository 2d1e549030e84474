"""A guarded run that kills itself: `python -m tests.resume.program FOLDER CASE STEP` (STEP -1: none)."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.optim import SGD, Adam

from lightning_maml_guard import ConvergenceGuard, GuardWarning, MetaLearningModule, TaskDataModule
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import Trainer
from tests.helpers import grouped

STEPS = 60
# (guard options, optimizer, factor by which one step takes the parameters away)
CASES = {
    "rescale": ({"criterion": "simplified", "rollback": False}, lambda p: SGD(p, lr=1.0, momentum=0.5), 1.0),
    "rollback": ({"rollback": True, "batches": 3}, lambda p: Adam(p, lr=0.2), 30.0),
}


class Killed(MetaLearningModule):
    """Kills its process in a training step, and makes its loss diverge in another."""

    kill_at: int
    factor: float
    diverges_at = 31

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == self.diverges_at:
            with torch.no_grad():
                for parameter in self.network.parameters():
                    parameter.mul_(self.factor)
        return loss


def train(folder: Path, case: str, kill_at: int = -1) -> tuple[ConvergenceGuard, MetaLearningModule]:
    """Train, from the latest checkpoint in the folder if there is one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options, optimizer, factor = CASES[case]
    module = Killed(mlp(), inner_lr=0.05, optimizer=optimizer)
    module.kill_at, module.factor = kill_at, factor
    guard = ConvergenceGuard(**grouped(every_n_steps=10, action="rescale", **options))
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[guard, keep],
    )
    kept = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    data = TaskDataModule(Sinusoid(shots=5), meta_batch_size=4, steps_per_epoch=25, val_episodes=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuardWarning)
        trainer.fit(module, data, ckpt_path=kept[-1] if kept else None, weights_only=True)
    return guard, module


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
