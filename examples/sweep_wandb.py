"""A sweep of Weights & Biases over both learning rates: the guard ends runs whose rates cannot converge, with an alert.

Needs ``pip install wandb`` and an account. Plot ``guard/alpha_ratio`` and ``guard/beta_ratio`` beside ``val/loss``.
"""

from typing import Any

import wandb
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import WandbLogger
from torch.optim import SGD

from lightning_maml_guard import ConvergenceGuard, MetaLearningModule, TaskDataModule
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid

SWEEP: dict[str, Any] = {
    "method": "bayes",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {
        "inner_lr": {"distribution": "log_uniform_values", "min": 1e-3, "max": 0.3},
        "lr": {"distribution": "log_uniform_values", "min": 1e-3, "max": 3.0},
    },
}


def train(steps: int = 500) -> ConvergenceGuard:
    """Train with the rates that the sweep chose for this run."""
    with wandb.init() as run:
        lr = run.config["lr"]
        seed_everything(0, verbose=False)
        module = MetaLearningModule(
            mlp(), inner_lr=run.config["inner_lr"], optimizer=lambda parameters: SGD(parameters, lr=lr)
        )
        episodes = TaskDataModule(Sinusoid(shots=10), meta_batch_size=25, val_episodes=100)
        guard = ConvergenceGuard(action="stop")
        logger = WandbLogger(experiment=run)
        trainer = Trainer(max_steps=steps, callbacks=[guard], logger=logger, limit_val_batches=0)
        trainer.fit(module, episodes)
        if guard.stopped_step is None:
            evaluation = Trainer(logger=logger, enable_checkpointing=False)
            evaluation.validate(module, episodes)
        return guard


if __name__ == "__main__":
    wandb.agent(wandb.sweep(SWEEP, project="maml-learning-rates"), train, count=20)
