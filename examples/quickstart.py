"""A Trainer you already have, plus the callback: its outer learning rate is too large, and the guard lowers it."""

from pytorch_lightning import Trainer, seed_everything
from torch.optim import SGD

from lightning_maml_guard import ConvergenceGuard, MetaLearningModule, TaskDataModule  # added: ConvergenceGuard
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid


def main(steps: int = 500) -> ConvergenceGuard:
    """Train, print the rate that was lowered, and draw the safe region."""
    seed_everything(0)
    module = MetaLearningModule(mlp(), inner_lr=0.01, optimizer=lambda parameters: SGD(parameters, lr=1.0))
    episodes = TaskDataModule(Sinusoid(shots=10), meta_batch_size=25, val_episodes=0)

    guard = ConvergenceGuard(every_n_steps=10, action="rescale", margin=0.5)  # added
    trainer = Trainer(
        max_steps=steps,
        callbacks=[guard],  # added
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, episodes)

    last = guard.history[-1]
    print(f"beta = {last.beta:.3g} was applied as {last.beta_applied:.3g}; beta_c = {last.beta_c:.3g}")
    print(f"training loss: {float(trainer.callback_metrics['train/loss']):.3g}")
    guard.plot()[0].savefig("safe_region.png", dpi=150)
    return guard


if __name__ == "__main__":
    main()
