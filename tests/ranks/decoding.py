"""What each of two processes runs: `python -m tests.ranks.decoding CLASS_FOLDERS OUT` writes how many images it decoded."""

import sys
from pathlib import Path

import torch

from lightning_maml_guard import MetaLearningModule, TaskDataModule
from lightning_maml_guard.networks import conv4
from lightning_maml_guard.tasks import image_cache
from lightning_maml_guard.tasks.images import ClassFolders
from lightning_maml_guard.utils.lightning_compat import Trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    decode, decoded = image_cache.decode, []
    image_cache.decode = lambda *args, **options: decoded.append(args) or decode(*args, **options)
    family = ClassFolders(sys.argv[1], n_way=2, queries=1, image_size=28, shares=(1, 1, 1))
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False, enable_checkpointing=False
    )
    data = TaskDataModule(family, meta_batch_size=1, steps_per_epoch=1, val_episodes=0)
    trainer.fit(MetaLearningModule(conv4(2, 3, 4, image_size=28)), data)
    (Path(sys.argv[2]) / f"rank{trainer.global_rank}").write_text(str(len(decoded)))
