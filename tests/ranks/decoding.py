"""What each of two processes runs: `python -m tests.ranks.decoding DATA FOLDER OUT` writes how many images it decoded."""

import sys
from pathlib import Path

import torch

from lightning_maml_guard import MetaLearningModule, TaskDataModule
from lightning_maml_guard.networks import conv4
from lightning_maml_guard.tasks import image_cache
from lightning_maml_guard.tasks.images import ClassFolders, MiniImageNet, Omniglot
from lightning_maml_guard.utils.lightning_compat import Trainer

FAMILIES = {
    "folders": lambda root: ClassFolders(root, n_way=2, queries=1, image_size=28, shares=(1, 1, 1)),
    "omniglot": lambda root: Omniglot(root, n_way=2, queries=1),
    "miniimagenet": lambda root: MiniImageNet(root, n_way=2, queries=1, image_size=28),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    decode, decoded = image_cache.decode, []
    image_cache.decode = lambda *args, **options: decoded.append(args) or decode(*args, **options)
    data, folder, out = sys.argv[1:]
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False, enable_checkpointing=False
    )
    tasks = TaskDataModule(FAMILIES[data](folder), meta_batch_size=1, steps_per_epoch=1, val_episodes=0)
    channels = 1 if data == "omniglot" else 3
    trainer.fit(MetaLearningModule(conv4(2, channels, 4, image_size=28)), tasks)
    (Path(out) / f"rank{trainer.global_rank}").write_text(str(len(decoded)))
